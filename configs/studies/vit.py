"""Section 4.3: ViT-S/16 on ImageNet-1k, searched for standard attention, then table 4's eight rows.

Table 8's space: learning rate 1e-4 to 1e-2, 1 - b1 from 0.01 to 0.15 and weight decay 0.005 to 1,
each uniform in its logarithm, b2 of 0.9, 0.99 or 0.999, label smoothing of 0.1 or 0.2, dropout 0.1,
warm-up 5 %. The paper drew 50 points and does not list them: these 50 are Halton's sequence, which
fills the space evenly. The best of standard attention serves all, as in the paper: that favours it.
What decides is the share of wrong answers, as in table 4. A seed stands for the parameters that a
run starts from and for all that is drawn of its data: order, crops, mixup, dropout. The paper ran
five seeds and does not say whether the table has their mean, their median or the best; the report
here has mean and deviation, and differences by pairs of seeds with their interval.

The temperature of the rows `+ temp` is not in the paper, only that lower ones tend to do worse.
Each attention takes the best of four here, of one seed each at the point of the search.
Arguments as in configs/vit.py.
"""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import vit
from configs.study import Best, Comparison, Stage, Study

KINDS = ("standard", "laser")
ARMS = KINDS + tuple(f"{kind}+{m}" for m in ("qk_norm", "per_dim_temp") for kind in KINDS)
TEMPERATURE, TEMPERATURES = "attention.temperature", (0.5, 0.7, 1.4, 2.0)  # ours: around 1
POINTS, SEEDS = 50, 5
SEED = ("training.seed", "data.shuffle_seed")
POINT = (
    "optimizer.learning_rate",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.weight_decay",
    "images.label_smoothing",
)
BASES = (2, 3, 5, 7, 11)  # of Halton's sequence, one for each of these


def get_config(arguments: str = "") -> ConfigDict:
    config = vit.get_config(arguments)
    config.model.dropout = 0.1  # paper
    return config


def get_study() -> Study:
    search = Stage(
        "search",
        {POINT: [point(i) for i in range(1, POINTS + 1)]},
        {"attention": "standard"},
        why="table 8: one seed of standard attention at each point",
    )
    stages = [search, *rows(POINT, ARMS, "table 4")]
    return Study(stages, pairs(ARMS), measure="eval/error")


def rows(point: tuple[str, ...], arms: Sequence[str], table: str) -> list[Stage]:
    """The stages of a table of section 4.3, behind a stage `search` that varies `point`."""
    best = {point: Best(("search",), where={"attention": "standard"})}
    # Not the search's own seed: its best run is the luckiest of 50.
    seeds = [(seed, seed) for seed in range(1, SEEDS + 1)]
    return [
        Stage(
            "seeds",
            {SEED: seeds, "attention": arms, **best},
            why=f"{table}: at the best point of standard attention",
        ),
        Stage(
            "temperatures",
            {TEMPERATURE: TEMPERATURES, "attention": KINDS, **best},
            why="the temperature of each attention, one seed",
        ),
        Stage(
            "tempered",
            {SEED: seeds, "attention": KINDS, TEMPERATURE: Best(("temperatures",)), **best},
            why=f"{table}: each at its best temperature",
        ),
    ]


def pairs(arms: Sequence[str]) -> list[Comparison]:
    """LASER and standard attention with the same modifier, and each at its temperature."""
    compare = [
        Comparison("seeds", {"attention": arm}, {"attention": arm.replace("laser", "standard")})
        for arm in arms
        if arm.startswith("laser")
    ]
    return [*compare, Comparison("tempered", {"attention": "laser"}, {"attention": "standard"})]


def point(index: int) -> tuple[float, ...]:
    """Values of the fields of POINT."""
    rate, beta, square, decay, smooth = (_halton(index, base) for base in BASES)
    return (
        float(f"{_log(1e-4, 1e-2, rate):.4g}"),
        round(1 - _log(1e-2, 0.15, beta), 4),
        (0.9, 0.99, 0.999)[int(3 * square)],
        float(f"{_log(5e-3, 1.0, decay):.4g}"),
        (0.1, 0.2)[int(2 * smooth)],
    )


def _halton(index: int, base: int) -> float:
    """The digits of `index` to the base, mirrored at the point: at least 0, below 1."""
    value, unit = 0.0, 1.0 / base
    while index:
        index, digit = divmod(index, base)
        value, unit = value + digit * unit, unit / base
    return value


def _log(low: float, high: float, share: float) -> float:
    return math.exp(math.log(low) + share * math.log(high / low))
