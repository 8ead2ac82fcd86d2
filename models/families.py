"""Which module a config's model is of: for what training and planning ask of any model."""

from typing import Any, Protocol, TypeAlias

from models import decoder, vit
from models.config import BertConfig, ModelConfig, VitConfig

AnyModelConfig: TypeAlias = ModelConfig | VitConfig
Parameters = dict[str, Any]  # nested dicts with float32 arrays as leaves


class Family(Protocol):
    """A module of models/, as training and planning see it."""

    def init_parameters(self, config: Any, seed: int) -> Parameters:
        """Initial parameters, a function of config and seed. The blocks' are below 'blocks'."""

    def train_flops_per_token(self, config: Any, seq_len: int) -> float:
        """Matrix-product FLOPs of forward and backward pass; recomputation is not counted."""


FAMILIES: dict[type, Family] = {ModelConfig: decoder, BertConfig: decoder, VitConfig: vit}


def init_parameters(config: AnyModelConfig, seed: int) -> Parameters:
    """See `Family`."""
    return FAMILIES[type(config)].init_parameters(config, seed)


def train_flops_per_token(config: AnyModelConfig, seq_len: int) -> float:
    """See `Family`."""
    return FAMILIES[type(config)].train_flops_per_token(config, seq_len)
