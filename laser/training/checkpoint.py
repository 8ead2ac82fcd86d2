"""Checkpoints by Orbax that are checked when they are read, and fall back to an older one.

`workdir/checkpoints/<step>` holds the TrainState and a small sealed JSON record beside it, the
sidecar, with type and checksum of every tensor, so that a restore onto any mesh is verified bit for
bit. Orbax writes asynchronously into a temporary folder and renames it, or behind an address into
the folder itself and a file last that says that it is finished; so a killed save leaves the older
ones.

Only a checkpoint whose checksum or format says that it is damaged is passed over, and it is moved
aside once an older one was read. Any other error, such as no memory or another model, leaves all of
them where they are. Every host writes and reads its own shards; what one of them cannot read is
passed over by all, so that they go on from the same step.
"""

import contextlib
import functools
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from data.errors import first_line
from data.sealed import seal
from laser.training import hosts, retention, run_folder
from laser.training.config import CheckpointConfig
from laser.training.folders import absolute, folder_of
from laser.training.run_folder import UNREADABLE
from laser.training.tensors import checksums, tensor_types

log = logging.getLogger(__name__)

# What tensorstore calls data that are not what was written. Others are about memory, disks, rights.
OF_DAMAGE = ("DATA_LOSS", "NOT_FOUND", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read; the message says what is left."""


class DamagedError(CheckpointError):
    """The checksum or the format of a checkpoint says that it is not what was written."""


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save.

    Args:
      workdir: the run's folder.
      config: how many to keep.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig):
        self._workdir = absolute(folder_of(workdir))
        self._folder = self._workdir / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.restored: dict[str, Any] = {}
        self._failed = False
        self._interim = {step for step in self._steps() if _is_interim(self._folder / str(step))}
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=retention.policy(config, self._interim),
            best_fn=functools.partial(retention.score, config.best)
            if config.best != "none"
            else None,
            cleanup_tmp_directories=True,
            # Threads that write would wait 20 minutes for a folder that could not be made.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._best = config.best
        if config.best != "none":
            with hosts.together("look at the scores of checkpoints"):
                for step in self._steps() if hosts.is_first() else ():
                    retention.drop_unreadable_score(self._folder / str(step))
        self._manager = _Manager(self._folder, options=self._options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        if not self._failed:  # else its threads may wait for what does not come
            with self._explained():  # a save that failed in the background may be told only now
                self._manager.close()

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        *,
        interim: bool = False,
        note: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to save `state` (a tree of jax.Arrays) as `step`; returns when it has been copied.

        Args:
          step: steps done.
          state: what to save.
          metrics: of the evaluations of this step; they say whether it is the best one.
          interim: saved out of turn; the next checkpoint takes its place, and no other's.
          note: JSON for the sidecar. Its "config" is the checksum of the config.json it belongs to.

        Raises:
          CheckpointError: this save or the one before it failed, on a full disk for example.
        """
        sums = jax.device_get(checksums(state))
        tensors = {
            name: {"type": kind, "sum": int(sums[name])}
            for name, kind in tensor_types(state).items()
        }
        sidecar = {"step": step, "interim": interim, **(note or {}), "tensors": tensors}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            record=ocp.args.JsonSave(seal(sidecar)),
        )
        (self._interim.add if interim else self._interim.discard)(step)
        name = f"eval/{self._best}"
        score = {name: metrics[name]} if metrics and name in metrics else None
        with self._explained():
            self._manager.save(step, args=args, metrics=score)
            self._mark_saved()

    def add_score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics for a checkpoint that was saved before its evaluation had ended."""
        name, folder = f"eval/{self._best}", self._folder / str(step) / "metrics"
        if name not in metrics:
            return
        with self._explained(), hosts.together(f"add metrics to checkpoint {step}"):
            if hosts.is_first() and not folder.exists():
                retention.write_score(folder, json.dumps({name: metrics[name]}))
        self._manager.reload()

    def best(self) -> tuple[int, float] | None:
        """Step and metric of the best checkpoint; None if none was evaluated, or none is wanted."""
        step = self._manager.best_step() if self._best != "none" else None
        metrics = self._manager.metrics(step) if step is not None else None
        value = (metrics or {}).get(f"eval/{self._best}", math.nan)
        return (step, value) if step is not None and math.isfinite(value) else None

    def wait(self) -> None:
        """Waits for the save that is under way. Raises CheckpointError if it failed."""
        with self._explained():
            self._manager.wait_until_finished()
            self._mark_saved()

    def _mark_saved(self) -> None:
        mark = self._workdir / ".saved"
        if hosts.is_first() and self._steps() and not mark.exists():
            mark.touch()

    def _steps(self) -> list[int]:
        return list(run_folder.saved_step_folders(self._workdir))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many types: TensorStore reports a full disk as ValueError
            self._failed = True
            raise CheckpointError(
                f"could not save a checkpoint in {self._folder}: {_first_line(error)}. Those "
                f"before it are intact: steps {self._steps()}"
            ) from error

    def restore_latest(self, abstract_state: Any) -> Any | None:
        """The newest state that can be read and verified, or None where there never was one.

        Damaged ones are passed over, and moved aside once an older one was read. The sidecar of the
        one that was taken is in `restored`.

        Args:
          abstract_state: the tree of ShapeDtypeStructs with the shardings wanted.

        Raises:
          CheckpointError: none of the checkpoints can be read, or they are gone, or reading failed
            for a reason that is not theirs. All of them are where they were.
        """
        found = hosts.exchange("list checkpoints", json.dumps([self._steps(), self._lost()]))
        steps, lost = json.loads(found[0])
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            folder = self._folder / str(step)
            try:
                state, self.restored = _read(folder, abstract_state)
            except DamagedError as error:
                log.error("checkpoint %s cannot be read (%s)", folder, error)
                damaged[step] = str(error)
            except CheckpointError as error:
                raise CheckpointError(
                    f"checkpoint {folder} could not be read: {error}. Nothing says that it is "
                    "damaged, so it was left where it is"
                ) from error
            else:
                self._set_aside(damaged)
                return state
        look = f"python scripts/verify_run.py {self._workdir}"
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"none of the checkpoints {sorted(damaged)} in {self._folder} can be read "
                f"({reasons}); they were left where they are. Restore a backup, or start in "
                f"another workdir; `{look}` says what is intact"
            )
        if lost:
            raise CheckpointError(
                f"{self._folder}: this run has lost its checkpoints ({lost}) and is not started "
                f"anew. `{look}` takes back what was set aside and is intact; or restore a backup, "
                "or start in another workdir"
            )
        return None

    def _lost(self) -> str:
        """What says that there were checkpoints once."""
        aside = [path.name for path in run_folder.set_aside(self._workdir)]
        if aside:
            return f"{', '.join(aside)} was set aside"
        return "there is a file .saved" if (self._workdir / ".saved").exists() else ""

    def _set_aside(self, steps: Sequence[int] | Mapping[int, str]) -> None:
        if not steps:
            return
        with hosts.together("move damaged checkpoints aside"):
            for step in steps if hosts.is_first() else ():
                target = _free_place(self._workdir, step)
                (self._folder / str(step)).rename(target)
                log.error("checkpoint %d moved to %s", step, target.name)
        self._interim.difference_update(steps)
        self._manager.reload()


class _Manager(ocp.CheckpointManager):
    """Orbax's, without its questions to jax's preemption service.

    The service counts calls by the number that it is given, and has all hosts stop at one to come.
    Orbax gives the step, `laser.training.preemption` counts its own calls: after a mixture of both
    hosts could agree on a number that never comes, and the signal would be lost.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def _free_place(workdir: Path, step: int) -> Path:
    """Where to move a damaged checkpoint, so that none that was moved before is lost."""
    path, number = workdir / f"{step}.{UNREADABLE}", 1
    while path.exists():
        path, number = workdir / f"{step}.{number}.{UNREADABLE}", number + 1
    return path


def _is_interim(folder: Path) -> bool:
    try:
        return run_folder.read_sidecar(folder).get("interim", False)
    except ValueError:  # told when it is read, and no reason to delete it
        return False


def saved_steps(workdir: Path) -> list[int]:
    """Steps of a run's checkpoints, in order. Raises CheckpointError where it has none."""
    steps = list(run_folder.saved_step_folders(absolute(workdir)))
    if not steps:
        raise CheckpointError(f"{workdir}: the run has no checkpoint yet")
    return steps


def restore_parameters(workdir: Path, abstract_params: Any, step: int | None = None) -> Any:
    """The parameters alone, verified, onto the shardings of `abstract_params`: for evaluation.

    Args:
      workdir: the run's folder.
      abstract_params: tree of ShapeDtypeStructs with shardings.
      step: which checkpoint; the newest if None.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    folder = absolute(workdir) / "checkpoints"
    steps = list(run_folder.saved_step_folders(absolute(workdir)))
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(
            f"no checkpoint{f' {step}' if step else ''} in {folder}; there are {steps}"
        )
    path = folder / str(step if step is not None else steps[-1])
    try:
        state, sidecar = _read(path, {"params": abstract_params}, partial=True)
        run_folder.check_origin(workdir, int(path.name), sidecar)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    return state["params"]


def _read(path: Path, abstract: Any, partial: bool = False) -> tuple[Any, dict[str, Any]]:
    """A checkpoint, or the part that `abstract` describes, verified, and its sidecar.

    Each host reads for itself, without the barriers that Orbax would put around it: there the
    others would wait for one that has failed. Raises DamagedError or CheckpointError on all hosts.
    """
    problem, is_damage = "", False
    try:
        sidecar = _sidecar_for(path, abstract, partial)
        state = _read_tensors(path / "state", abstract, partial)
    except Exception as error:  # of many types for a damaged file
        problem, is_damage = _first_line(error), _shows_damage(error)
    found = hosts.exchange(f"read checkpoint {path.name}", json.dumps([problem, is_damage]))
    problems = {i: said for i, said in enumerate(map(json.loads, found)) if said[0]}
    if problems:
        kind = DamagedError if all(damage for _, damage in problems.values()) else CheckpointError
        said = dict.fromkeys(
            f"{hosts.name(i)}: {text}" if hosts.several() else text
            for i, (text, _) in problems.items()
        )
        raise kind("; ".join(said))
    sums = jax.device_get(checksums(state))
    damaged = [name for name, x in sums.items() if sidecar["tensors"][name]["sum"] != int(x)]
    if damaged:
        raise DamagedError(f"checksum of {', '.join(damaged)} differs")
    return state, sidecar


def _sidecar_for(path: Path, abstract: Any, partial: bool) -> dict[str, Any]:
    """The sidecar of a checkpoint. Raises DamagedError, or CheckpointError if the tensors that it
    names are not those of `abstract`."""
    try:
        sidecar = run_folder.read_sidecar(path)
    except ValueError as error:
        raise DamagedError(str(error)) from error
    if sidecar["step"] != int(path.name):
        raise DamagedError(f"it was saved as {sidecar['step']}")
    wanted = tensor_types(abstract)
    tensors = sidecar["tensors"]
    if partial:
        tensors = {name: entry for name, entry in tensors.items() if name.startswith("params/")}
    if other := run_folder.different_tensors(sidecar | {"tensors": tensors}, wanted):
        raise CheckpointError(f"it is of another model or optimizer: {other}")
    return sidecar


def _read_tensors(path: Path, abstract: Any, partial: bool) -> Any:
    args = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=partial,
    )
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    ) as checkpointer:
        return checkpointer.restore(path, args=args)


def _shows_damage(error: BaseException) -> bool:
    """Whether an error is the checkpoint's own: of its format, and not of memory or the machine.

    Orbax wraps what tensorstore raises, so all that it came from must be so.
    """
    return all(map(_is_of_format, _causes(error)))


def _is_of_format(error: BaseException) -> bool:
    if isinstance(error, DamagedError | FileNotFoundError):
        return True
    if isinstance(error, MemoryError | OSError | RuntimeError):
        return False
    code = re.match(r"([A-Z]+(?:_[A-Z]+)*): ", str(error))
    return code is None or code[1] in OF_DAMAGE


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on to the first one."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    *_, first = _causes(error)
    error = error if isinstance(error, CheckpointError) else first
    line = first_line(error)
    return line if isinstance(error, CheckpointError) else f"{type(error).__name__}: {line}"
