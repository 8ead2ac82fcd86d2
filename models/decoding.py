"""The decoder token by token: hidden states of new tokens after those in a cache.

Layers are laid out one after the other here, not stacked: a layer taken out of a stacked array is
copied at every step on some backends, and a step does little else than to read parameters.

All rows of a batch write to the same slots, so that a write is one contiguous update; a row that
has nothing to put there, because its prompt was shorter, leaves slots that nobody sees.

Shapes: B batch, T new tokens, S slots, M model dim, H heads, D head dim, Q query dim, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from laser.attention.decode import BLOCK
from models.config import ModelConfig
from models.decoder import embed, output_logits
from models.layers import Block, LayerCache, Norm, Parameters
from models.stack import product_precision

Array = jax.Array

# Weights that are used in the activations' dtype; all others are used in float32.
CAST = ("embedding", "query", "key", "value", "output", "gate", "up", "down")


class Cache(NamedTuple):
    """What a batch of rows has seen.

    layers: L of them.
    real_BS: which slots hold a token of the row.
    length_B: how many do, int32; the position of the row's next token.
    slot: () int32, the next one to write.
    """

    layers: tuple[LayerCache, ...]
    real_BS: Array
    length_B: Array
    slot: Array


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> Cache:
    """A cache with `capacity` slots, a multiple of `BLOCK`."""
    assert capacity % BLOCK == 0, f"capacity {capacity} is no multiple of {BLOCK}"

    def zeros(size):
        return jnp.zeros((batch, config.kv_heads, capacity, size), jnp.dtype(config.dtype))

    maps = config.head_dim // config.query_dim
    layers = tuple(
        LayerCache(tuple(zeros(config.query_dim) for _ in range(maps)), zeros(config.head_dim))
        for _ in range(config.num_layers)
    )
    return Cache(
        layers, jnp.zeros((batch, capacity), bool), jnp.zeros(batch, jnp.int32), jnp.int32(0)
    )


def unstack(config: ModelConfig, params: Parameters) -> Parameters:
    """Parameters for `append`: `blocks` is a list of layers, and weights have their final dtype."""

    def cast(path, x):
        return x.astype(config.dtype) if path[-1].key in CAST else x

    params = jax.tree_util.tree_map_with_path(cast, params)
    blocks = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(config.num_layers)]
    return {**params, "blocks": blocks}


def append(
    config: ModelConfig, params: Parameters, tokens_BT: Array, real_BT: Array, cache: Cache
) -> tuple[Array, Cache]:
    """Runs T new tokens of each row, which attend to the row's cached ones and themselves.

    Args:
      config: of the model.
      params: of `unstack`.
      tokens_BT: (B, T) int32, for the slots from `cache.slot` on, which must be there.
      real_BT: (B, T) bool, False for padding: no token sees it, no position counts it. A row's
        first token must be real.
      cache: of `empty_cache`, or of the last call.

    Returns:
      (B, T, M) hidden states after the final norm, arbitrary where there was padding, and the
      cache with the new tokens.
    """
    count = tokens_BT.shape[1]
    real_BS = jax.lax.dynamic_update_slice_in_dim(cache.real_BS, real_BT, cache.slot, axis=1)
    slots_S, new_T = jnp.arange(real_BS.shape[1]), cache.slot + jnp.arange(count)
    visible_BTS = real_BS[:, None, :] & (slots_S <= new_T[:, None])
    order_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32)
    positions_BT = jnp.maximum(cache.length_B[:, None] + order_BT - 1, 0)

    block_graph = nnx.graphdef(nnx.eval_shape(lambda: Block(config, nnx.Rngs(params=0))))
    norm_graph = nnx.graphdef(nnx.eval_shape(lambda: Norm(config.model_dim, config.norm)))
    x_BTM = embed(config, params["embedding"], tokens_BT, positions_BT)
    layers = []
    for i, (block, layer) in enumerate(zip(params["blocks"], cache.layers, strict=True)):
        with product_precision(config):
            x_BTM, layer = nnx.merge(block_graph, block).decode(
                x_BTM, i, positions_BT, layer, cache.slot, visible_BTS
            )
        layers.append(layer)
    hidden_BTM = nnx.merge(norm_graph, params["final_norm"])(x_BTM)
    return hidden_BTM, Cache(
        tuple(layers), real_BS, cache.length_B + order_BT[:, -1], cache.slot + count
    )


def next_logits(config: ModelConfig, params: Parameters, hidden_BM: Array) -> Array:
    """(B, M) -> (B, V) float32."""
    with product_precision(config):
        return output_logits(hidden_BM, params["embedding"], config.logits_soft_cap)
