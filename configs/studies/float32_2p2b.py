"""Table 11: the 2.2B with float32 activations, to stand beside the bfloat16 run of configs/c4.py.

Argument: attention=laser|standard...
"""

from ml_collections import ConfigDict

from configs import c4
from configs.arguments import parse_arguments
from configs.study import Comparison, Stage, Study


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser"})
    config = c4.get_config(f"size=2p2b,attention={chosen['attention']}")
    config.model.dtype = "float32"
    return config


def get_study() -> Study:
    vary = {"attention": ("standard", "laser"), "model.dtype": ("float32", "bfloat16")}
    main = Stage("main", vary, why="both dtypes")
    compare = [
        Comparison("main", {"attention": "laser", **dtype}, {"attention": "standard", **dtype})
        for dtype in ({"model.dtype": "float32"}, {"model.dtype": "bfloat16"})
    ]
    return Study([main], compare)
