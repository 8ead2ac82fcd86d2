"""A study of minutes on the embedded corpus, to see how studies work: `make study`.

Standard attention and LASER, two seeds each, 0.6 M tokens: far too short to conclude anything
from, as its report says. The model is that of configs/quickstart.py, smaller.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.study import Comparison, Stage, Study


def get_config(arguments: str = "") -> ConfigDict:
    config = quickstart.get_config(arguments)
    config.model.num_layers = 2
    config.model.model_dim = 128
    config.model.mlp_dim = 512
    config.model.num_heads = 4
    config.model.head_dim = 32

    config.data.seq_len = 128
    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_steps = 20
    config.training.steps = 300
    config.training.eval_every = 100
    config.checkpoint.every = 50
    config.checkpoint.keep = 1
    return config


def get_study() -> Study:
    main = Stage(
        "main",
        {"training.seed": (0, 1), "attention": ("standard", "laser")},
        why="the same rows and initial parameters, one learning rate",
        measures=("continuations",),
    )
    return Study([main], [Comparison("main", {"attention": "laser"}, {"attention": "standard"})])
