"""Table 6: the 7.7B, trained on 44 B tokens.

    attention   laser (default) | standard...
    slice       as in configs/c4.py; the study has v5e-256         (default any)

Hours of each run are in docs/studies.md.
"""

from ml_collections import ConfigDict

from configs import c4
from configs.arguments import parse_arguments
from configs.study import Comparison, Stage, Study


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser", "slice": "any"})
    config = c4.get_config(f"size=7p7b,attention={chosen['attention']},slice={chosen['slice']}")
    config.training.steps = 41_962  # 44 B tokens at 1024 x 1024 a step
    return config


def get_study() -> Study:
    hold = {"slice": "v5e-256"}
    main = Stage("main", {"attention": ("standard", "laser")}, hold, "both on 44 B tokens")
    return Study([main], [Comparison("main", {"attention": "laser"}, {"attention": "standard"})])
