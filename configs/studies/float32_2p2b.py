"""After table 11: the 2.2B in float32, to stand beside the mixed precision of configs/c4.py.

    attention   laser (default) | standard...
    slice       as in configs/c4.py; the study has v5e-256         (default any)

The table's second row has weights in bfloat16, too. Here they are float32 in both, as in all runs
of this repository, because in bfloat16 an update below 1/512 of a weight rounds away: so this is
float32 against mixed precision, and stands beside the paper's first row alone. Learning rate and
weight decay are those of configs/studies/paper.py, POINTS.

It costs about six times the bfloat16 run: a TPU takes six passes for a product of float32
(model.matmul_precision, docs/precision.md). An estimate, not compiled and not measured: on v5e-256
a run takes about 95 hours as scheduled, and 79 at least, where bfloat16 takes 19.5 and 13.1
(docs/studies.md has the sum).
"""

from ml_collections import ConfigDict

from configs import c4
from configs.arguments import parse_arguments
from configs.studies import paper
from configs.study import Comparison, Stage, Study


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser", "slice": "any"})
    config = c4.get_config(f"size=2p2b,attention={chosen['attention']},slice={chosen['slice']}")
    config.model.dtype = "float32"
    paper.set_point(config)
    if chosen["slice"].startswith("v5e"):
        # What is kept for the backward pass doubles, to 14 of the 15.75 GiB of a chip. Both dtypes
        # of the study have it, so that they differ in nothing else.
        config.training.accumulation = 2
    return config


def get_study() -> Study:
    vary = {"attention": ("standard", "laser"), "model.dtype": ("float32", "bfloat16")}
    main = Stage("main", vary, {"slice": "v5e-256"}, "both dtypes")
    compare = [
        Comparison("main", {"attention": "laser", **dtype}, {"attention": "standard", **dtype})
        for dtype in ({"model.dtype": "float32"}, {"model.dtype": "bfloat16"})
    ]
    return Study([main], compare)
