"""LASER as the `attention_fn` of Flax's layers, NNX's and Linen's, by the arguments of Flax's own.

    nnx.MultiHeadAttention(..., attention_fn=laser_attention)
    linen.MultiHeadDotProductAttention(..., attention_fn=laser_attention)

Needs no import of Flax. Decoding with a cache works as Flax has it: by a mask.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from laser.attention import dot_product_attention

Array = jax.Array


def laser_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
) -> Array:
    """log(softmax(Q Kᵀ / √D + bias) exp(V)) (arXiv 2411.03493), see `dot_product_attention`.

    Args:
      query: (batch..., T, N, D).
      key: (batch..., S, K, D), where K divides N.
      value: (batch..., S, K, D_v).
      bias: broadcasts to (batch..., N, T, S).
      mask: broadcasts to the same; a key is seen where it is not 0.
      broadcast_dropout, dropout_rng: of no effect without dropout.
      dropout_rate: 0, unless `deterministic`.
      deterministic: no dropout, whatever the rate.
      dtype: of the computation outside of the softmax; promoted from the inputs if None.
      precision, module, qk_attn_weights_einsum, attn_weights_value_einsum: None.
      is_causal: query t sees no key after t; for as many queries as keys.

    Returns:
      (batch..., T, N, D_v), float32, bfloat16 or float16.

    Raises:
      ValueError: what LASER has not, by its name; shapes that do not fit.
    """
    if dropout_rate and not deterministic:
        raise ValueError(
            f"dropout_rate={dropout_rate}: LASER has no dropout of probabilities; make the layer "
            "with dropout_rate=0, or call it with deterministic=True"
        )
    if module is not None:
        raise ValueError("sow_weights=True: LASER keeps no attention weights; leave it out")
    if precision is not None:
        raise ValueError(f"precision={precision!r}: set jax_default_matmul_precision instead")
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise ValueError(
            "qk_attn_weights_einsum_cls, attn_weights_value_einsum_cls: LASER has einsums of its "
            "own; leave them out"
        )
    if is_causal and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"is_causal=True of {query.shape[-3]} queries over {key.shape[-3]} keys counts both "
            "from the first, which a cache does not mean; give a mask"
        )
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    out = dot_product_attention(
        query,
        key,
        value,
        _one_batch(bias, batch),
        None if mask is None else _one_batch(mask.astype(bool), batch),
        kind="laser",
        is_causal=is_causal,
    )
    return out.reshape(*batch, *out.shape[1:])


def _one_batch(x: Array | None, batch: tuple[int, ...]) -> Array | None:
    """Several dims of the batch as one, and none as 1."""
    if x is None or x.ndim < 4:
        return x
    rest = x.shape[-3:]
    if math.prod(x.shape[:-3]) == 1:
        return x.reshape(1, *rest)
    return jnp.broadcast_to(x, (*batch, *rest)).reshape(-1, *rest)
