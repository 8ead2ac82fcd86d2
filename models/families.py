"""Which module a config's model is of: for what training and planning ask of any model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from flax import nnx

from models import conformer, decoder, vit
from models.config import BertConfig, ConformerConfig, ModelConfig, VitConfig
from models.layers import Parameters

AnyModelConfig: TypeAlias = ModelConfig | VitConfig | ConformerConfig


class Family(NamedTuple):
    """A kind of model.

    Attributes:
      module: made of a config and random streams; its blocks are below `blocks`.
      train_flops_per_token: of a config and the length of rows: matrix-product FLOPs of forward
        and backward pass; recomputation is not counted.
    """

    module: Callable[[Any, nnx.Rngs], nnx.Module]
    train_flops_per_token: Callable[[Any, int], float]


FAMILIES: dict[type, Family] = {
    ModelConfig: Family(decoder.Decoder, decoder.train_flops_per_token),
    BertConfig: Family(decoder.Decoder, decoder.train_flops_per_token),
    VitConfig: Family(vit.Vit, vit.train_flops_per_token),
    ConformerConfig: Family(conformer.Conformer, conformer.train_flops_per_token),
}


def init_parameters(config: AnyModelConfig, seed: int) -> Parameters:
    """Initial parameters as nested dicts of float32 arrays, a function of config and seed."""
    module = FAMILIES[type(config)].module(config, nnx.Rngs(params=seed))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@functools.cache
def abstract_parameters(config: AnyModelConfig) -> Parameters:
    """The parameters as ShapeDtypeStructs."""
    return jax.eval_shape(functools.partial(init_parameters, config, 0))


@functools.cache
def structure(config: AnyModelConfig) -> nnx.GraphDef:
    """The model without its parameters: `nnx.merge(structure(config), parameters)` is the model."""
    module = FAMILIES[type(config)].module
    return nnx.graphdef(nnx.eval_shape(lambda: module(config, nnx.Rngs(params=0))))


def train_flops_per_token(config: AnyModelConfig, seq_len: int) -> float:
    """See `Family`."""
    return FAMILIES[type(config)].train_flops_per_token(config, seq_len)
