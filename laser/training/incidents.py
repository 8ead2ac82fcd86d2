"""Steps that a person will want to look at: those without an update, and spikes of the loss.

Each is told in the log and recorded with its rows, in skipped.jsonl and spikes.jsonl.
"""

import json
import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from laser.training import hosts
from laser.training.metrics import SKIPPED_FILE, SPIKES_FILE

if TYPE_CHECKING:
    from laser.training.loop import Run

log = logging.getLogger(__name__)


class TooManySkippedSteps(RuntimeError):
    """The loss or the gradient was not finite, and no step before had an update for too long."""


def record_skipped(run: "Run", step: int, metrics: dict[str, float]) -> None:
    """A step without an update. Raises TooManySkippedSteps."""
    config = run.config
    ids = run.rows.row_ids(config, step - 1)
    names = ("loss", "gradient_norm", "attention_range")
    values = ", ".join(f"{name} {metrics[name]:.4g}" for name in names)
    log.error("step %d skipped (%s); rows %s", step, values, np.array2string(ids, threshold=16))
    record: dict[str, Any] = {"step": step, "row_ids": ids.tolist()}
    _append(run, SKIPPED_FILE, record | {name: repr(metrics[name]) for name in names})
    in_a_row, limit = int(metrics["skipped_in_a_row"]), config.training.max_skipped_steps
    finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])
    if in_a_row >= limit and not finite:  # gradients that stay large become the usual ones
        raise TooManySkippedSteps(
            f"{in_a_row} steps in a row had no update, the last for a loss or gradient that is not "
            f"finite (step {step}, training.max_skipped_steps={limit}): lower "
            f"optimizer.learning_rate, or look at the rows in {run.workdir / SKIPPED_FILE}"
        )


def record_spike(run: "Run", step: int, metrics: dict[str, float]) -> None:
    """A step whose loss is far above the last ones."""
    loss = metrics["loss"]
    height = run.spikes.height(loss)
    if height is None:
        return
    log.warning("step %d: loss %.4g, %.1f standard deviations above the last", step, loss, height)
    ids = run.rows.row_ids(run.config, step - 1)
    record = {"step": step, "loss": loss, "deviations": height, "row_ids": ids.tolist()}
    _append(run, SPIKES_FILE, record)


def _append(run: "Run", name: str, record: dict[str, Any]) -> None:
    if hosts.is_first():
        with (run.records.folder / name).open("a") as file:
            file.write(json.dumps(record) + "\n")
