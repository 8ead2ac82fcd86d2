"""The paper's comparison at the paper's sizes: --study=configs/studies/paper.py

Table 9's grid, learning rates from 1e-1 to 1e-5 by weight decays of 0.01, 0.1 and 1, on the
16-layer model, and the best point of each attention carried to all sizes. The paper does not say
whether each attention had its own point; nor in which dtype its main runs were: here all are in
bfloat16 with float32 weights. Arguments as in configs/c4.py; the study has the layouts of v5e
slices.
"""

from ml_collections import ConfigDict

from configs import c4
from configs.study import Best, Comparison, Stage, Study

ARMS = ("standard", "laser")
POINT = ("optimizer.learning_rate", "optimizer.weight_decay")
GRID = [(rate, decay) for rate in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5) for decay in (0.01, 0.1, 1.0)]
SIZES = dict.fromkeys(("234m", "301m", "435m"), "v5e-64")
SIZES |= {"1p1b": "v5e-128", "2p2b": "v5e-256"}


def get_config(arguments: str = "") -> ConfigDict:
    return c4.get_config(arguments)


def get_study() -> Study:
    grid = Stage(
        "grid", {POINT: GRID, "attention": ARMS}, {"size": "234m", "slice": "v5e-64"}, "table 9"
    )
    sizes = Stage(
        "sizes",
        {("size", "slice"): tuple(SIZES.items()), "attention": ARMS, POINT: Best(("grid",))},
        why="tables 1 and 11, figure 4: each at the best point of the 234m",
    )
    compare = [
        Comparison("sizes", {"size": size, "attention": "laser"},
                   {"size": size, "attention": "standard"})
        for size in SIZES
    ]  # fmt: skip
    return Study([grid, sizes], compare, sizes=("sizes",))
