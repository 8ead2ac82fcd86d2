"""What rows in blocks cost: the quickstart without blocks and with its own of 16 rows.

    python scripts/study.py --study=configs/studies/blocks.py --output=studies/blocks

Six runs of the quickstart's length; the store is the quickstart's. docs/buckets.md says what a
block is.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.study import Comparison, Stage, Study

BLOCK, SEEDS = "data.block_rows", ("training.seed", "data.shuffle_seed")


def get_config(arguments: str = "") -> ConfigDict:
    return quickstart.get_config(arguments)


def get_study() -> Study:
    orders = Stage(
        "orders",
        {BLOCK: (1, 16), SEEDS: tuple((i, i) for i in range(3))},
        why="loss at the end of the quickstart by the length of a block",
    )
    return Study([orders], [Comparison("orders", {BLOCK: 16}, {BLOCK: 1})])
