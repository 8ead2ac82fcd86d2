"""Table 6: the 7.7B, trained on 44 B tokens. Argument: attention=laser|standard..."""

from ml_collections import ConfigDict

from configs import c4
from configs.arguments import parse_arguments
from configs.study import Comparison, Stage, Study


def get_config(arguments: str = "") -> ConfigDict:
    chosen = parse_arguments(arguments, {"attention": "laser"})
    config = c4.get_config(f"size=7p7b,attention={chosen['attention']}")
    config.training.steps = 41_962  # 44 B tokens at 1024 x 1024 a step
    return config


def get_study() -> Study:
    main = Stage("main", {"attention": ("standard", "laser")}, why="both on 44 B tokens")
    return Study([main], [Comparison("main", {"attention": "laser"}, {"attention": "standard"})])
