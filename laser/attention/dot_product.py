"""LASER under the name, and with the arguments, of `jax.nn.dot_product_attention`.

`kind` and `return_range` are added, and of jax.nn's arguments `return_residual` alone is not taken.
What the fused kernels know, they compute; the rest goes to `chunked`, and the log says why.

Shapes: B batch, T queries, S keys, N heads of queries, K heads of keys and values, D sizes.
"""

import math
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from laser.attention.chunked import Extras
from laser.attention.interface import Implementation, check_arrays, check_names, dispatch

Array = jax.Array


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    kind: Literal["standard", "laser"],
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | Literal["xla"] | None = "auto",
    return_range: bool = False,
):
    """softmax(scale · Q Kᵀ + bias) V, or LASER's log(softmax(scale · Q Kᵀ + bias) exp(V)).

    The arguments are those of `jax.nn.dot_product_attention`, with `kind` (arXiv 2411.03493), and
    so are the values of standard attention, to rounding, for every query that sees a key. What
    `laser.attention.attention` promises holds here: LASER is exact to rounding for every finite V,
    and a key that a query may not see, whatever hides it, has no part in its output or its
    gradients beyond the rounding that the keys of a chunk share. No array of the size T · S · D is
    made, and none of T · S but bias, mask, and the gradient of the bias.

    A query that sees no key gets 0, of either kind, and passes no gradient on. (jax.nn gives the
    mean of all values, which the query may not see, or 0 for one beyond `query_seq_lengths`.)

    Args:
      query: (B, T, N, D) or (T, N, D); float32, bfloat16 or float16, as key and value (float64 by
        `reference` alone).
      key: (B, S, K, D) or (S, K, D), where K divides N: each group of N / K neighbouring heads of
        queries shares a head of keys and values.
      value: (B, S, K, D_v) or (S, K, D_v).
      bias: added to the logits in float32; broadcasts to (B, N, T, S), and has a gradient. A key
        whose bias is -inf is not seen. (In LASER a large negative bias hides a key only as far as
        its value is not as large: use `mask`.)
      mask: bool, broadcasts to (B, N, T, S); True where a query may see a key.
      kind: which readout, always named.
      scale: factor of the logits; 1/√D if None.
      is_causal: query t sees no key after t, both counted from the first.
      query_seq_lengths: (B,) int; queries from there on see nothing.
      key_value_seq_lengths: (B,) int; keys from there on are not seen.
      local_window_size: (left, right), or one number for both: query t sees keys from t - left to
        t + right alone, and with `is_causal` none after t either.
      implementation: as of `laser.attention.attention`; "xla" stands for "chunked" and None for
        "auto", as jax.nn has them.
      return_range: also return the range in nats, a float32 scalar; see
        `laser.attention.attention`, which also says when it tells of the slower exact path.

    Returns:
      (B, T, N, D_v) or (T, N, D_v), in the dtype of `value`; with `return_range`, a pair of it and
      the range.

    Raises:
      ValueError: arguments that do not fit, or an implementation that does not serve them.
    """
    batched = jnp.ndim(query) == 4
    query, key, value = (
        _four_dims(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    chosen: Any = {"xla": "chunked", None: "auto"}.get(implementation, implementation)
    check_names(kind, chosen)
    _check_arrays(query, key, value, chosen)
    batch, length, heads, size = query.shape
    logits = (batch, heads, length, key.shape[1])
    options: dict[str, Any] = {
        "logits_scale": 1 / math.sqrt(size) if scale is None else scale,
        "causal": is_causal,
        "segment_ids": None,
        "logits_soft_cap": None,
    }
    if (window := _window(local_window_size)) is not None:
        causal = is_causal or window[1] == 0  # the same to every implementation
        options |= {"causal": causal, "window": (window[0], 0 if causal else window[1])}
    extras = Extras(
        bias=_broadcasting(bias, "bias", logits),
        mask=_broadcasting(mask, "mask", logits),
        query_lengths=_lengths(query_seq_lengths, "query_seq_lengths", batch),
        key_lengths=_lengths(key_value_seq_lengths, "key_value_seq_lengths", batch),
    )
    if extras.given():
        options["extras"] = extras
    out, range_nats = dispatch(query, key, value, kind, chosen, options)
    out = out if batched else out[0]
    return (out, range_nats) if return_range else out


def _four_dims(x: Any, name: str) -> Array:
    x = jnp.asarray(x)
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{name} must be (batch, length, heads, size) or (length, heads, size); got {x.shape}"
        )
    return x[None] if x.ndim == 3 else x


def _check_arrays(query: Array, key: Array, value: Array, implementation: str) -> None:
    shapes = f"got query {query.shape}, key {key.shape}, value {value.shape}"
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have one batch and one head size; {shapes}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must have the shape of key up to its size; {shapes}")
    check_arrays(query, key, value, implementation)
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"heads of keys must divide the heads of queries; {shapes}")


def _window(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        left, right = map(operator.index, size if isinstance(size, tuple | list) else (size, size))
    except (TypeError, ValueError):
        raise ValueError(f"local_window_size={size!r}: must be an int or a pair of them") from None
    if min(left, right) < 0:
        raise ValueError(f"local_window_size={size!r}: must not be negative")
    return left, right


def _broadcasting(x: Any, name: str, shape: tuple[int, ...]) -> Array | None:
    """`x` with four dims, each of 1 or that of the logits."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if (x.dtype == bool) != (name == "mask"):
        raise ValueError(
            f"{name} has dtype {x.dtype}: a mask is bool, True where a key may be seen, and what "
            "is added to the logits is a bias"
        )
    full = x.reshape((1,) * (4 - x.ndim) + x.shape)
    if full.ndim != 4 or any(a not in (1, b) for a, b in zip(full.shape, shape, strict=True)):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, queries, keys) = {shape}; got {x.shape}"
        )
    return full


def _lengths(x: Any, name: str, batch: int) -> Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != (batch,) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be ({batch},) of int; got {x.shape} of {x.dtype}")
    return x
