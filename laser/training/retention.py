"""Which checkpoints of a run are kept, and by which scores."""

import functools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

from orbax.checkpoint import checkpoint_managers

from data.addresses import is_address
from laser.training.config import CheckpointConfig
from laser.training.run_folder import COMMITTED

log = logging.getLogger(__name__)

LOWEST_WINS = ("loss", "error", "wer")


class _NewestInTurn(checkpoint_managers.PreservationPolicy):
    """Keeps the newest of those that were saved in turn, and the newest of all."""

    def __init__(self, count: int, interim: set[int]):
        self._count, self._interim = count, interim

    def should_preserve(self, checkpoints, *, context):
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        in_turn = [step for step in steps if step not in self._interim]
        kept = {*in_turn[-self._count :], *steps[-1:]}
        return [step in kept for step in steps]


def policy(config: CheckpointConfig, interim: set[int]) -> checkpoint_managers.PreservationPolicy:
    """The newest ones, the multiples of a period, the best one. Of equally good ones the newest."""
    policies: list[checkpoint_managers.PreservationPolicy] = [_NewestInTurn(config.keep, interim)]
    if config.keep_period:
        policies.append(checkpoint_managers.EveryNSteps(config.keep_period))
    if config.best != "none":
        best = checkpoint_managers.BestN(
            get_metric_fn=functools.partial(score, config.best),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    return checkpoint_managers.AnyPreservationPolicy(policies)


def score(best: str, metrics: Mapping[str, float]) -> float:
    """The larger, the better; the worst for what is not finite, or was not measured."""
    value = metrics.get(f"eval/{best}", math.nan)
    if not math.isfinite(value):
        return -math.inf
    return -value if best in LOWEST_WINS else value


def write_score(folder: Path, text: str) -> None:
    """Metrics as Orbax writes them, whole or not at all."""
    if is_address(folder):
        (folder / "metrics").write_text(text)
        (folder / COMMITTED).write_text("")
        return
    temporary = folder.with_name("metrics.new")
    temporary.mkdir(exist_ok=True)
    (temporary / "metrics").write_text(text)
    temporary.rename(folder)


def drop_unreadable_score(checkpoint: Path) -> None:
    """Takes a score away that Orbax could not read, and would end with: the checkpoint itself is
    whole, and counts as one that was not evaluated."""
    file = checkpoint / "metrics" / "metrics"
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text())
        readable = isinstance(found, dict) and all(type(x) in (int, float) for x in found.values())
    except ValueError:  # no JSON, or no text
        readable = False
    if not readable:
        log.warning("%s is damaged: this checkpoint counts as not evaluated", file)
        for path in file.parent.iterdir():
            path.unlink()
        file.parent.rmdir()
