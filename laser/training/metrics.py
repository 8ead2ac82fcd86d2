"""Where the numbers of a run go: a terminal line, metrics.jsonl and TensorBoard, by one interface.

metrics.jsonl is the record that scripts read: one JSON object per line, as
`{"step": 10, "loss": 3.2}`, at most one line for a step's training metrics and one for its
evaluation, also after kills and resumes. A value that is not finite is written as null, because NaN
is not JSON.

    loss, perplexity            mean over targets (tokens, images, labels), nats
    error                       share of wrong answers: of BERT's masked tokens, of images
    gradient_norm               before clipping          parameter_norm, learning_rate
    tokens, epoch               read so far, by the run; passes over its data, a fraction counts
    tokens_per_second           all devices              seconds_per_step
    mfu                         model FLOPs utilisation, 0 to 1; causal attention counted half
    of_bound                    0 to 1: the least time of a step by the chips' peaks, see
                                laser/training/roofline.py, over the time that it takes
    data_wait_seconds           per step, of the loop    memory_gib    most in use on a device
    skipped_steps               so far, in the run       attention_range    largest, nats
    share/STORE, epoch/STORE    of the rows so far, of each store of a mixture; its passes
    broken_images               named and left out by this host since it started, if any
    goodput, time/KIND          see laser/training/goodput.py: a fraction, and seconds so far
    eval/loss, eval/bits_per_byte                    eval/TASK/METRIC    a fraction
    eval/error, eval/wer        as error, on the validation split; the Conformer's word error rate
    eval/loss/PART, eval/error/PART, eval/wer/PART    of each store of a mixture, or of `test`:
                                other images or recordings, which have no share in those without
"""

import hashlib
import itertools
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from data.sealed import SEAL
from laser.training.folders import write_atomically
from laser.training.records import Records

METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"
SPIKES_FILE = "spikes.jsonl"
LOGGED_SECONDS, KEPT_SECONDS = 10.0, 60.0  # between two lines, of a log file and of a terminal

log = logging.getLogger(__name__)


class MetricsWriter(Protocol):
    """Takes the metrics of a step. Steps come in order."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics, floats on the host, under their names."""

    def close(self) -> None:
        """Writes out what is left."""


def make_writer(
    records: Records,
    steps: int,
    *,
    resume_step: int,
    enabled: bool,
    mark: Mapping[str, Any] | None = None,
    more: Sequence[MetricsWriter] = (),
) -> MetricsWriter:
    """All writers of a run.

    Args:
      records: of the run.
      steps: number of steps of the whole run, for the time left.
      resume_step: step of the checkpoint that the run goes on from, 0 at a start. What an earlier
        process recorded after it is dropped: those steps are done again.
      enabled: False on all processes but the first, which then write nothing.
      mark: of metrics.jsonl when that checkpoint was saved, see `mark_of`.
      more: writers beside those.
    """
    if not enabled:
        return MultiWriter([], records)
    jsonl = JsonlWriter(records.folder)
    jsonl.truncate_after(resume_step, mark)
    for name in (SKIPPED_FILE, SPIKES_FILE):
        drop_lines_after(resume_step, records.folder / name)
    from laser.training.tensorboard import TensorBoardWriter  # 0.3 seconds

    tensorboard = TensorBoardWriter(records, first_step=resume_step + 1)
    return MultiWriter([jsonl, tensorboard, *more, TerminalLine(steps)], records)


class MultiWriter:
    """Hands everything to several writers; with none of them it writes nothing."""

    def __init__(self, writers: Sequence[MetricsWriter], records: Records):
        self._writers, self._records = writers, records

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, metrics)
        self._records.write_now_and_then()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        self._records.write()


class JsonlWriter:
    """`workdir/metrics.jsonl`, each line whole and on its way to the disk when `write` returns."""

    def __init__(self, workdir: str | Path):
        self._path = Path(workdir) / METRICS_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = None

    def truncate_after(self, step: int, mark: Mapping[str, Any] | None = None) -> None:
        """Drops lines of later steps and a torn last line. The file is whole at any moment.

        With `mark`, see `mark_of`, the lines that were there then are compared with those that are
        there now, and a difference is told. An evaluation of this step may have come since.
        """
        if self._file is not None:
            raise RuntimeError("truncate_after comes before the first write")
        drop_lines_after(step, self._path)
        if mark and mark_of(self._path, mark["bytes"]) != mark:
            log.warning(
                "%s: the lines up to step %d are not those that were written: see them as damaged",
                self._path, step,
            )  # fmt: skip

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            self._file = self._path.open("a")
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def mark_of(path: Path, length: int | None = None) -> dict[str, Any]:
    """Size and checksum of a file, or of its first bytes; 0 bytes if there is none."""
    content = path.read_bytes()[:length] if path.exists() else b""
    return {"bytes": len(content), SEAL: hashlib.sha256(content).hexdigest()}


def drop_lines_after(step: int, path: Path) -> None:
    """Drops the lines of later steps from a file of JSON lines that each name their step.

    A torn last line goes with them. Where others cannot be read, as after a loss of power, the file
    is kept as it is with the ending .damaged, and a warning counts them.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    whole, _, _ = content.rpartition(b"\n")
    kept, broken = [], 0
    for text in whole.split(b"\n") if whole else ():
        line = _parsed(text)
        if line is None:
            broken += 1
        elif line["step"] <= step:
            kept.append(text.decode() + "\n")
    if broken:
        copy = path.with_name(path.name + ".damaged")
        copy.write_bytes(content)
        log.warning("%s: %d lines cannot be read and are left out; see %s", path, broken, copy)
    write_atomically(path, "".join(kept))


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line, or None if it is none of ours."""
    try:
        line = json.loads(text)
    except ValueError:  # no UTF-8 or no JSON
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def count_spikes(folder: Path) -> int:
    """Of a run, see laser/training/spikes.py."""
    path = folder / SPIKES_FILE
    return len(read_metrics(path)) if path.is_file() else 0


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl. A last line without its end, torn by a kill, is left out.

    Raises ValueError, with its number, where another one cannot be read.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = []
    for number, text in enumerate(whole.split(b"\n") if whole else (), start=1):
        line = _parsed(text)
        if line is None:
            raise ValueError(f"{path}, line {number} is damaged: {text[:60]!r}")
        lines.append(line)
    return lines


class TerminalLine:
    """The numbers as lines: in a log file now and then, on a terminal one that is written over.

    There the first line stays, one a minute, and the one before an evaluation or what the log says,
    so that the loss can be seen to fall. What does not fit into the line is left out, from its end.
    """

    def __init__(self, steps: int, stream: TextIO | None = None):
        self._steps = steps
        self._stream = stream or sys.stdout
        self._seconds_between = KEPT_SECONDS if self._stream.isatty() else LOGGED_SECONDS
        self._last_time = -math.inf
        self._line_open = False
        self._handlers = list(logging.getLogger().handlers)
        for handler in self._handlers:
            handler.addFilter(self._let_log)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        is_eval = any(name.startswith("eval/") for name in metrics)
        parts = self._parts(step, metrics)
        if is_eval:
            self._end_line()
            print("  ".join(parts), file=self._stream)
        elif self._stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{_fitting(parts, width)}", end="", file=self._stream)
            self._line_open = True
            if self._is_time():
                self._end_line()
        elif step >= self._steps or self._is_time():
            print("  ".join(parts), file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        self._end_line()
        for handler in self._handlers:
            handler.removeFilter(self._let_log)

    def _end_line(self) -> None:
        if self._line_open:
            print(file=self._stream, flush=True)
            self._line_open = False

    def _let_log(self, record: logging.LogRecord) -> bool:
        """A filter that lets all pass: what is logged begins a line of its own."""
        del record
        self._end_line()
        return True

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now - self._last_time < self._seconds_between:
            return False
        self._last_time = now
        return True

    def _parts(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What the line says, the most important first."""
        parts = [f"step {step:,}/{self._steps:,}"]
        if "seconds_per_step" in metrics:
            left = (self._steps - step) * metrics["seconds_per_step"]
            parts.append(f"left {format_duration(left)}")
        if metrics.get("skipped_steps"):
            parts.append(f"skipped {metrics['skipped_steps']:.0f}")
        formats = {
            "loss": "loss {:.4f}",
            "eval/loss": "eval loss {:.4f}",
            "eval/bits_per_byte": "bits per byte {:.4f}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "mfu": "MFU {:.1%}",
            "of_bound": "{:.0%} of the bound",
            "gradient_norm": "grad norm {:.3g}",
        }
        parts += [text.format(metrics[name]) for name, text in formats.items() if name in metrics]
        return parts + [
            f"{name.removeprefix('eval/')} {value:.4f}"
            for name, value in metrics.items()
            if name.startswith("eval/") and name not in formats
        ]


def _fitting(parts: Sequence[str], width: int) -> str:
    """As many of the first parts as have room, and of the very first one what has."""
    lines = itertools.accumulate(parts, "{}  {}".format)
    return max((line for line in lines if len(line) <= width), key=len, default=parts[0][:width])


def format_duration(seconds: float) -> str:
    """`2 d 3 h`, `3 h 25 min`, `4 min 10 s` or `12 s`."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hour} h {minute} min"
    return f"{minute} min {second} s" if minutes else f"{second} s"


def format_count(number: float) -> str:
    """Three digits: `1.09`, `301 M`, `168 B`."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
