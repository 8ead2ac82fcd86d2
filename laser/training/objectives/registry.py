"""The objective of every kind of model, by the class of its config."""

from laser.training.config import RunConfig
from laser.training.objectives import images, tokens
from laser.training.objectives.base import Objective
from models.config import BertConfig, ModelConfig, VitConfig

OBJECTIVES: dict[type, Objective] = {
    ModelConfig: tokens.NEXT_TOKEN,
    BertConfig: tokens.MASKED_TOKENS,
    VitConfig: images.CLASSES,
}


def objective(config: RunConfig) -> Objective:
    return OBJECTIVES[type(config.model)]
