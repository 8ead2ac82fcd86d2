"""Checkpoints by Orbax that are checked when they are read, and fall back to an older one.

`workdir/checkpoints/<step>` holds the TrainState and a small JSON record with a checksum of every
tensor. A checksum is the wrapping sum of the tensor's 32-bit words: it does not depend on the mesh
or the order of summation, so a restore onto any other mesh is verified bit for bit. Orbax writes
asynchronously into a temporary folder and renames it, so that a killed save leaves the older ones.

Every host writes and reads its own shards. What one of them cannot read counts as unreadable for
all, so that they go on from the same step.
"""

import contextlib
import functools
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from laser.training import hosts
from laser.training.config import CheckpointConfig

log = logging.getLogger(__name__)

UNREADABLE = "unreadable"  # ending of the folder that a damaged checkpoint is moved to


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read; the message says what is left."""


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save.

    Args:
      workdir: the run's folder.
      config: how many to keep.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig):
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=_preservation(config),
            best_fn=functools.partial(_score, config.best) if config.best != "none" else None,
            cleanup_tmp_directories=True,
        )
        self._best = config.best
        self._manager = ocp.CheckpointManager(self._folder, options=self._options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        with self._explained():  # a save that failed in the background may be told only now
            self._manager.close()

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to save `state` (a tree of jax.Arrays) as `step`; returns when it has been copied.

        Args:
          step: steps done.
          state: what to save.
          metrics: of the evaluations of this step; they say whether it is the best one.

        Raises:
          CheckpointError: this save or the one before it failed, on a full disk for example.
        """
        record = {"checksums": jax.tree.map(int, jax.device_get(_checksums(state)))}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        name = f"eval/{self._best}"
        score = {name: metrics[name]} if metrics and name in metrics else None
        with self._explained():
            self._manager.save(step, args=args, metrics=score)

    def best(self) -> tuple[int, float] | None:
        """Step and metric of the best checkpoint; None if none was evaluated, or none is wanted."""
        step = self._manager.best_step() if self._best != "none" else None
        metrics = self._manager.metrics(step) if step is not None else None
        return (step, metrics[f"eval/{self._best}"]) if step is not None and metrics else None

    def wait(self) -> None:
        """Waits for the save that is under way. Raises CheckpointError if it failed."""
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many types: TensorStore reports a full disk as ValueError
            raise CheckpointError(
                f"could not save a checkpoint in {self._folder}: {_first_line(error)}. Those "
                f"before it are intact: steps {_complete_steps(self._folder)}"
            ) from error

    def restore_latest(self, abstract_state: Any) -> Any | None:
        """The newest state that can be read and verified, or None where there is no checkpoint.

        One that can't be read is moved aside and reported, and the one before it is taken.

        Args:
          abstract_state: the tree of ShapeDtypeStructs with the shardings wanted.

        Raises:
          CheckpointError: there are checkpoints and none of them can be read.
        """
        found = hosts.exchange("list checkpoints", json.dumps(list(self._manager.all_steps())))
        steps = sorted(json.loads(found[0]), reverse=True)
        for step in steps:
            try:
                return _read(self._folder / str(step), abstract_state)
            except CheckpointError as error:
                self._set_aside(step, str(error))
        if steps:
            raise CheckpointError(
                f"none of the checkpoints {sorted(steps)} in {self._folder} can be read; they were "
                f"kept with the ending .{UNREADABLE}. Start in another workdir, or restore a backup"
            )
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        folder = self._folder / str(step)
        log.error(
            "checkpoint %s cannot be read (%s): moved to %s.%s, trying the one before",
            folder, reason, folder.name, UNREADABLE,
        )  # fmt: skip
        with hosts.together(f"move checkpoint {step} aside"):
            if hosts.is_first():
                target = self._folder.parent / f"{folder.name}.{UNREADABLE}"
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
        self._manager.reload()


def _preservation(config: CheckpointConfig) -> checkpoint_managers.PreservationPolicy:
    """The newest ones, the multiples of a period, the best one. Of equally good ones the newest."""
    policies: list[checkpoint_managers.PreservationPolicy] = [
        checkpoint_managers.LatestN(config.keep)
    ]
    if config.keep_period:
        policies.append(checkpoint_managers.EveryNSteps(config.keep_period))
    if config.best != "none":
        best = checkpoint_managers.BestN(
            get_metric_fn=functools.partial(_score, config.best),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    return checkpoint_managers.AnyPreservationPolicy(policies)


def _score(best: str, metrics: Mapping[str, float]) -> float:
    """The larger, the better."""
    value = metrics[f"eval/{best}"]
    return -value if best == "loss" else value


def saved_steps(workdir: Path) -> list[int]:
    """Steps of a run's checkpoints, in order. Raises CheckpointError where it has none."""
    folder = workdir.absolute() / "checkpoints"
    steps = _complete_steps(folder) if folder.is_dir() else []
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
    folder = workdir.absolute() / "checkpoints"
    steps = _complete_steps(folder) if folder.is_dir() else []
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(
            f"no checkpoint{f' {step}' if step else ''} in {folder}; there are {steps}"
        )
    path = folder / str(step if step is not None else steps[-1])
    try:
        return _read(path, {"params": abstract_params}, partial=True)["params"]
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def _read(path: Path, abstract: Any, partial: bool = False) -> Any:
    """A checkpoint, or the part that `abstract` describes, verified; CheckpointError on all hosts.

    Each host reads for itself, without the barriers that Orbax would put around it: there the
    others would wait for one that has failed.
    """
    args = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=partial,
    )
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    try:
        with hosts.together(f"read checkpoint {path.name}"):
            try:
                with ocp.Checkpointer(
                    ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
                    multiprocessing_options=alone,
                ) as checkpointer:
                    restored = checkpointer.restore(path / "state", args=args)
                record = json.loads((path / "record" / "metadata").read_text())
            except Exception as error:  # of many types for a damaged file
                raise ValueError(_first_line(error)) from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    _verify(restored, record["checksums"])
    return restored


def _verify(state: Any, expected: dict[str, int]) -> None:
    actual = jax.tree.map(int, jax.device_get(_checksums(state)))
    damaged = [name for name, value in actual.items() if expected.get(name) != value]
    if damaged:
        raise CheckpointError(f"checksum of {', '.join(damaged)} differs")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _complete_steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@jax.jit
def _checksums(state: Any) -> dict[str, jax.Array]:
    """Path of each tensor → wrapping sum of its 32-bit words, uint32."""

    def words(x):
        if x.dtype.itemsize != 4:
            raise ValueError(f"checkpoints hold 32-bit tensors, got {x.dtype}")
        return jax.lax.bitcast_convert_type(x, jnp.uint32).sum(dtype=jnp.uint32)

    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): words(x) for path, x in leaves}
