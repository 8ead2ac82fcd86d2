"""What a run is about to do, said before its first step: how large its model is, how much it reads,
and which of its text it reads again."""

import logging
import math
from typing import Any

import jax

from laser.training.config import RunConfig
from laser.training.metrics import format_count
from laser.training.rows import Rows
from models.config import ModelConfig

log = logging.getLogger(__name__)

REPEATED = 1.1  # epochs of text that are no mistake: the paper's runs have 1.09 of C4


def outlook(config: RunConfig, rows: Rows, params: Any) -> str:
    """Such as `301 M parameters (268 M beside the embedding); 1.05 M tokens a step, 168 B in all =
    1.09 epochs of stores/c4`.

    Args:
      config: with numbers for what was left to the data.
      rows: what it trains on.
      params: the model's, as arrays or ShapeDtypeStructs.
    """
    training = config.training
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    beside = ""
    if isinstance(config.model, ModelConfig):  # whose embedding is its output matrix, too
        blocks = format_count(count - config.model.outer_weights)
        beside = f" ({blocks} beside the embedding)"
    if rows.unit == "tokens":
        size = training.batch_size * config.data.seq_len
        reads = f"{format_count(size)} tokens a step, {format_count(training.steps * size)} in all"
    else:
        reads = f"{training.batch_size:,} {rows.unit} a step, {training.steps:,} steps"
    epochs = [
        f"{format_count(epochs)} epochs of {name}"
        for name, epochs in rows.epochs(config, training.steps).items()
    ]
    return f"{format_count(count)} parameters{beside}; {reads} = {', '.join(epochs)}"


def warn_of_repeated_text(config: RunConfig, rows: Rows) -> None:
    """Names each source of text that is read more than once, where steps and not epochs say for how
    long a run trains.

    Args:
      config: as in `outlook`.
    """
    steps = config.training.steps
    for name, epochs in rows.epochs(config, steps).items():
        if rows.unit == "tokens" and epochs > REPEATED:
            once = int(steps / epochs)
            log.warning(
                "%s is read %s times: from step %s on its text comes again; training.steps=%d "
                "reads it once", name, format_count(epochs), f"{once + 1:,}", once,
            )  # fmt: skip
