"""Trains the runs of a study, each by train.py, until all have a result.

    OUTPUT/study.json            the study that the folder belongs to
    OUTPUT/STAGE/NAME/           an ordinary run's folder, with train.log and result.json besides

Killed at any moment and started again, it goes on with the run that was cut short, from its newest
checkpoint. Several machines may work on one folder, each on its share of the runs.
"""

import ctypes
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from configs.study import Stage
from laser.training import exits
from laser.training.config import to_dict
from laser.training.folders import write_atomically
from laser.training.metrics import METRICS_FILE, format_duration, read_metrics
from laser.training.run_folder import OF_NO_MATTER
from study import results
from study.plan import Cell, Plan, number_of_runs, of_share

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
STUDY, LOG = "study.json", "train.log"
OTHER_TRAINS = "another process trains here"
POLL, TELL, WAIT = 1.0, 60.0, 10.0  # seconds
ENDS = 2  # of one run without a result: then nothing is tried any more
OUT_OF_MEMORY = re.compile("out of memory|RESOURCE_EXHAUSTED")
_PR_SET_PDEATHSIG = 1


@dataclass
class Progress:
    """A run that is being trained."""

    cell: Cell
    process: subprocess.Popen | None = None  # None: it was trained before
    log_from: int = 0  # where in its log this process began
    measuring: bool = False
    chips: Mapping[str, str] = field(default_factory=dict)  # variables that name them
    started: float = field(default_factory=time.monotonic)


class Folder:
    """The output of a study."""

    def __init__(self, path: Path, plan: Plan):
        """Raises ValueError if it holds another study, or runs that this one does not have."""
        self.path = path
        self.plan = plan
        self._results: dict[str, dict[str, Any]] = {}
        self._adopted: dict[str, dict[str, Any]] = {}  # not written yet
        self._data = self._data_of = ""  # fingerprint of what all runs read, and the first of them
        begun, asked = _begun(path), self._record()
        if begun is None and path.exists() and not all(map(_is_unfinished, path.iterdir())):
            raise ValueError(f"output={path}: is not empty and holds no study; choose another one")
        if begun is not None and _comparable(begun) != _comparable(asked):
            there = " ".join([begun["study"], *begun["flags"]])
            raise ValueError(f"output={path}: holds the study {there}; choose another folder")
        self._check_results()

    def has_results(self) -> bool:
        """Whether any run has one."""
        return any(self.result(cell) for _, cells in self.stages() for cell in cells or ())

    def begin(self) -> None:
        """Makes the folder, if it is not there yet, and writes into it what was adopted."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / STUDY).exists():  # another machine may have its data elsewhere
            write_atomically(self.path / STUDY, json.dumps(self._record(), indent=2) + "\n")
        for key, run in self._adopted.items():
            results.write_adopted(self.path / key, run)
        self._adopted.clear()

    def result(self, cell: Cell) -> dict[str, Any] | None:
        if cell.key not in self._results:
            result = results.read(self.path / cell.key) or self._adopted.get(cell.key)
            if result is None:
                return None
            data = result.get("data", self._data)
            if data != (self._data or data):
                raise ValueError(
                    f"output={self.path}: {cell.key} was trained on other data ({data[:12]}) than "
                    f"{self._data_of} ({self._data[:12]}); delete or leave out what is wrong, or "
                    "choose another output"
                )
            if not self._data:
                self._data, self._data_of = data, cell.key
            self._results[cell.key] = result
        return self._results[cell.key]

    def adopt(self, numbers: Mapping[str, Any]) -> int:
        """Takes over runs that were trained elsewhere, by study/report.py's record of them, where
        their configs are those of this study's runs. Returns how many. `begin` writes them."""
        known = {
            f"{run['stage']}/{run['name']}": {**run, "config": numbers["config"] | run["config"]}
            for run in numbers["runs"]
            if run["status"] == "done"
        }
        for _, cells in self.stages():  # a choice among them opens the next stage
            for cell in cells or ():
                run = known.get(cell.key)
                if run is None or self.result(cell) is not None:
                    continue
                if not results.changes(run, to_dict(cell.config())):
                    self._adopted[cell.key] = run
        return len(self._adopted)

    def final_of(self, cell: Cell) -> float | None:
        result = self.result(cell)
        return None if result is None else results.final(result, self.plan.study.measure)

    def stages(self) -> Iterator[tuple[Stage, list[Cell] | None]]:
        """With their runs; None where a choice waits for others."""
        for stage in self.plan.study.stages:
            yield stage, self.plan.cells(stage, self.final_of)

    def _record(self) -> dict[str, Any]:
        return {"study": Path(self.plan.file).as_posix(), "flags": list(self.plan.extra)}

    def _check_results(self) -> None:
        """Raises ValueError where a result is not that of the run which the study now has."""
        wanted = self.plan.study.measure
        for _, cells in self.stages():
            for cell in cells or ():
                result = self.result(cell) or {}
                lines = results.changes(result, to_dict(cell.config()))
                if (told := result.get("measure", wanted)) != wanted:
                    lines.append(f"measure: {told} -> {wanted}")
                if lines:
                    raise ValueError(
                        f"output={self.path}: {cell.key} was trained with another config "
                        f"({'; '.join(lines)}); choose another folder, or delete that run"
                    )


def commands(folder: Folder, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Flags of train.py for each run of the share without a result whose choices are settled; those
    of a run that has begun, and may be training, are a comment."""
    return [
        ("# begun: " if (folder.path / cell.key).exists() else "")
        + shlex.join([*cell.flags(), f"--workdir={folder.path / cell.key}"])
        for stage, cells in folder.stages()
        for cell in of_share(stage, cells or (), share)
        if folder.result(cell) is None
    ]


class Runner:
    """Works on a share of a study's runs, some at a time."""

    def __init__(
        self,
        folder: Folder,
        *,
        share: tuple[int, int] = (0, 1),
        chips: Sequence[Mapping[str, str]] = ({},),
        train: bool = True,
        data_dir: str = "",
    ):
        """`chips`: of each run that is trained at a time, see study/chips.py. `data_dir`: where the
        tasks' data are, for runs of which `oneshot` is measured."""
        self._folder = folder
        self._data_dir = data_dir
        self._share, self._train = share, train
        self._at_once, self._free_chips = len(chips), list(chips)
        self._running: dict[str, Progress] = {}
        self._ends: dict[tuple[str, bool], int] = {}  # key, measuring → how often in another way
        self._busy: dict[str, float] = {}  # key → when to try again what another process trains
        self._stop = ""
        self._told = 0.0

    def run(self) -> int:
        """Returns 0 when all runs of the share have a result, those without training that have
        been trained elsewhere, or 75 after a signal."""
        before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            while True:
                self._collect()
                is_full = len(self._running) >= self._at_once  # to look for more takes CPU
                waiting = "" if is_full else self._start_more()
                if not self._running:
                    if self._stop:
                        log.warning("%s: stopped; the same command goes on", self._stop)
                        return exits.PREEMPTED
                    if not waiting:
                        return exits.DONE
                    self._tell(f"waiting for {waiting}")
                time.sleep(POLL)
        finally:
            for process in self._processes():  # a mistake was found in one of them
                process.terminate()
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._stop:
            self._stop = signal.Signals(number).name
            for process in self._processes():
                process.send_signal(signal.SIGTERM)

    def _processes(self) -> list[subprocess.Popen]:
        return [p.process for p in self._running.values() if p.process is not None]

    def _start_more(self) -> str:
        """Starts what there is room for. Returns what is waited for, or "" if all is done."""
        waiting = ""
        for stage, cells in self._folder.stages():
            if cells is None:
                if self._train:
                    waiting = waiting or f"the runs that stage {stage.name} depends on"
                continue
            for cell in of_share(stage, cells, self._share):
                if self._folder.result(cell) is not None:
                    continue
                if not self._train and self._how_it_ended(cell) is None:
                    continue
                waiting = waiting or cell.key
                room = len(self._running) < self._at_once and not self._stop
                is_free = self._busy.get(cell.key, 0.0) < time.monotonic()
                if room and is_free and cell.key not in self._running:
                    self._start(cell)
        return waiting

    def _start(self, cell: Cell) -> None:
        folder = self._folder.path / cell.key
        folder.mkdir(parents=True, exist_ok=True)
        how = self._how_it_ended(cell)
        if how is None:
            done, total = self._count()
            log.info("%s: run %d of %d", cell.key, done + len(self._running) + 1, total)
            command = [str(ROOT / "train.py"), *cell.flags(), f"--workdir={folder}"]
            self._begin(cell, command)
        elif how:
            self._failed(cell, how)
        else:
            self._ended(Progress(cell), exits.DONE)

    def _begin(self, cell: Cell, command: list[str], measuring: bool = False) -> None:
        path = self._folder.path / cell.key / LOG
        before = path.stat().st_size if path.exists() else 0
        chips = self._free_chips.pop()
        process = _launch(command, path, chips)
        self._running[cell.key] = Progress(cell, process, before, measuring, chips)

    def _how_it_ended(self, cell: Cell) -> str | None:
        return results.ended(cell, self._folder.path / cell.key)

    def _failed(self, cell: Cell, reason: str) -> None:
        results.write_failed(cell, self._folder.path / cell.key, reason)
        log.warning("%s: failed, which is a result: %s", cell.key, reason)

    def _count(self) -> tuple[int, int]:
        """Runs with a result, and all of them."""
        done = total = 0
        for stage, cells in self._folder.stages():
            total += number_of_runs(stage) if cells is None else len(cells)
            done += sum(self._folder.result(cell) is not None for cell in cells or ())
        return done, total

    def _collect(self) -> None:
        for key, progress in list(self._running.items()):
            assert progress.process is not None
            code = progress.process.poll()
            if code is None:
                if self._is_time_to_tell():  # the state is read from all of the run's metrics
                    self._tell(self._state(progress))
                continue
            del self._running[key]
            self._free_chips.append(progress.chips)
            self._ended(progress, code)

    def _ended(self, progress: Progress, code: int) -> None:
        cell = progress.cell
        folder = self._folder.path / cell.key
        said = _lines_from(folder / LOG, progress.log_from)
        # It goes into numbers that others read, on whose machines the folder is elsewhere.
        reason = said[-1].replace(f"{folder}/", "")[:300] if said else "no message"
        of_memory = [line[:300] for line in said if OUT_OF_MEMORY.search(line)]
        if code == exits.DONE and (measures := self._measures(cell)) and not progress.measuring:
            if not self._stop:
                self._begin(cell, [*measures, f"--run={folder}"], measuring=True)
                self._running[cell.key].started = progress.started
        elif code == exits.DONE:
            measure = self._folder.plan.study.measure
            result = results.write_done(cell, folder, measure)
            took = format_duration(time.monotonic() - progress.started)
            value = results.final(result, measure)
            log.info("%s: %s %.4f (%s)", cell.key, measure, value, took)
        elif code == exits.PREEMPTED or self._stop:
            pass
        elif code == exits.MISTAKE and any(OTHER_TRAINS in line for line in said):
            self._busy[cell.key] = time.monotonic() + WAIT
        elif code == exits.MISTAKE or (progress.measuring and code > 0):
            raise ValueError(f"{cell.key}: {reason}")
        elif code == exits.DIVERGED:
            self._failed(cell, reason)
        elif code > 0 and of_memory:
            self._failed(cell, of_memory[-1])
        else:
            self._ended_otherwise(progress, code, reason)

    def _ended_otherwise(self, progress: Progress, code: int, reason: str) -> None:
        """By a signal, or an error that is no result: of the disk, of a device. Raises ValueError
        if it comes again."""
        cell, measuring = progress.cell, progress.measuring
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}: {reason}"
        if measuring:
            how = f"its measuring was {how}"
        count = self._ends[cell.key, measuring] = self._ends.get((cell.key, measuring), 0) + 1
        if count < ENDS:
            log.warning("%s: %s; it goes on", cell.key, how)
        elif code < 0 and not measuring:  # a run that has ended is none the worse for its measuring
            self._failed(cell, f"{how}, {count} times (9: out of memory?)")
        else:
            raise ValueError(
                f"{cell.key}: {how}, {count} times; see {self._folder.path / cell.key / LOG}, and "
                "when it is mended the same command goes on"
            )

    def _measures(self, cell: Cell) -> list[str]:
        stage = next(s for s in self._folder.plan.study.stages if s.name == cell.stage)
        if not stage.measures:
            return []
        study = self._folder.plan.study
        given = [f"--held_out={study.held_out}", f"--tasks={','.join(study.tasks)}"]
        given += [f"--data_dir={self._data_dir}"] if self._data_dir else []
        return ["-m", "study.measure", *given, *stage.measures]

    def _state(self, progress: Progress) -> str:
        path = self._folder.path / progress.cell.key / METRICS_FILE
        lines = read_metrics(path) if path.exists() else []
        step = lines[-1]["step"] if lines else 0
        done, total = self._count()
        what = "measuring" if progress.measuring else f"step {step:,}"
        return f"{progress.cell.key}: {what}; {done} of {total} runs done"

    def _is_time_to_tell(self) -> bool:
        return time.monotonic() - self._told > TELL

    def _tell(self, words: str) -> None:
        if self._is_time_to_tell():
            self._told = time.monotonic()
            log.info("%s", words)


def recorded_flags(output: Path, file: str) -> list[str]:
    """Further flags of train.py that a study was begun with; none where it was not yet."""
    begun = _begun(output)
    return begun["flags"] if begun and begun["study"] == Path(file).as_posix() else []


def _begun(output: Path) -> dict[str, Any] | None:
    """The study that a folder belongs to. Raises ValueError if what says so is damaged."""
    mark = output / STUDY
    if not mark.exists():
        return None
    try:
        begun = json.loads(mark.read_text())
        return {"study": str(begun["study"]), "flags": list(begun["flags"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{mark}: is damaged ({type(error).__name__}: {error}); put it back as "
            '{"study": "configs/studies/FILE.py", "flags": []}, with the flags after `--`'
        ) from error


def _is_unfinished(path: Path) -> bool:
    """Whether it is a study.json that another machine is writing."""
    return path.name.startswith(f"{STUDY}.") and path.suffix == ".tmp"


def _comparable(record: dict[str, Any]) -> list[str]:
    """The study, and the flags that make a difference."""
    ignored = tuple(f"--config.{name}=" for name in OF_NO_MATTER)
    return [record["study"], *(flag for flag in record["flags"] if not flag.startswith(ignored))]


def _launch(arguments: list[str], log_file: Path, variables: Mapping[str, str]) -> subprocess.Popen:
    """Python with its output in a log and these variables; it ends with this process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with log_file.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": path, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _end_with_parent() -> None:
    """The kernel sends SIGTERM when this process's parent is gone, even by SIGKILL."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _lines_from(path: Path, offset: int) -> list[str]:
    """What a log says from there on. Another process may write into it, too."""
    if not path.exists():
        return []
    return path.read_bytes()[offset:].decode(errors="replace").strip().splitlines()
