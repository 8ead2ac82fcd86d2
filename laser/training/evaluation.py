"""The loss on the validation split, and what an evaluation is to the loop of training."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator

from laser.training import preemption
from laser.training.objectives.base import Batch, Sums
from laser.training.program import Program
from laser.training.rows import Rows
from laser.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of a state, wanted every so many steps and after the last one.

    On several hosts all of them call `metrics`, and process 0 writes what it returns.
    """

    every: int
    metrics: Callable[[TrainState], dict[str, float]]


def on_validation(program: Program, rows: Rows, state: TrainState) -> dict[str, float]:
    """Loss in nats per token, the objective's shares, and bits per byte of text, on the validation
    split.

    Where it has several parts, these of each part, and their mean by the parts' shares. Bits per
    byte is there only where the whole of every split was read. Raises preemption.Interrupted if a
    signal came.
    """
    metrics: dict[str, float] = {}
    means: dict[str, float] = collections.defaultdict(float)
    bits = 0.0
    for part in rows.validation_parts(program.config, program.batch_sharding):
        if part.at_end and int(state.step) < program.config.training.steps:
            continue
        total: dict[str, float] = collections.defaultdict(float)
        tokens = 0.0
        for sums in _sums(program, state, part.batches):
            for name, x in {"loss": sums.nll, **sums.shares}.items():
                total[name] += float(x)
            tokens += float(sums.tokens)
        whole = part.bytes > 0 and tokens == part.tokens
        bits += part.share * total["loss"] / math.log(2) / part.bytes if whole else math.nan
        for name, value in total.items():
            if part.share:  # else what is not finite there would count all the same
                means[name] += part.share * value / tokens
            if part.name:
                metrics[f"eval/{name}/{part.name}"] = value / tokens
    metrics |= {f"eval/{name}": mean for name, mean in means.items()}
    if math.isfinite(bits):
        metrics["eval/bits_per_byte"] = bits
    return metrics


def _sums(program: Program, state: TrainState, batches: Iterator[Batch]) -> Iterator[Sums]:
    """The sums of each batch, when the next one is on its way: the device works while the host
    reads."""
    before: list[Sums] = []
    for batch in batches:
        preemption.between_batches()
        sums = program.eval_step(state.params, batch)
        yield from before
        before = [sums]
    yield from before
