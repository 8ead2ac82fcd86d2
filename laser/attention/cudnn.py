"""Standard and LASER attention on GPUs through cuDNN's fused attention, with exact gradients.

LASER is log(μ + softmax(·)(exp(V) - μ)), one call of the library between two elementwise passes.
The anchor μ, 1 where values are small and 0 elsewhere, keeps apart in bfloat16 what would all round
to 1; it is one number per row of the batch, head and feature, taken from the first positions alone.

Each sum under the logarithm is certified by its size and by the values it is made of. Elements that
fail are computed again without the anchor, through the library too, and those for which float32 has
no room by `chunked`. All of this is in the branch of a conditional that is not taken as long as no
element of the batch fails, and the elements that did not fail keep their bits there.

No later token changes a bit of an output, with two exceptions that concern rounding alone: the
first `ANCHOR_LENGTH` positions choose the anchor together, and what `chunked` computes is bound to
its chunks. That rests on cuDNN giving later keys a weight of 0. It has not run on a GPU yet; tests
put XLA's attention in its place.

Shapes: B batch, T length, H heads of queries, K heads of keys and values, D size.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from laser.attention import chunked
from laser.attention.kernels.fused import OUTPUT_NAME

Array = jax.Array
Library = Literal["cudnn", "xla"]

SMALLEST_CAPABILITY = 8  # the major number; what fused attention in bfloat16 takes
LARGEST_SIZE = 128
LARGEST_SIZE_HOPPER = 256  # from compute capability 9.0 on

ANCHOR_LENGTH = 128  # positions whose values choose the anchor: later ones have no part in it
LOWEST_ANCHORED = -1.0
# Rounding exp(V) - 1 and its mean moves an anchored output by at most 2^-8 / y, here by 2 %.
SMALLEST_ANCHORED_SUM = math.exp(-2.5)
# Any exponential is at most 2^90 times any sum: what underflows in a sum is below 2^-36 of it, and
# the backward pass, which divides by sums, has room in float32 for small and for large gradients.
LARGEST_VALUE = 31.0
SMALLEST_SUM = math.exp(-LARGEST_VALUE)
LARGEST_STANDARD_VALUE = 2.0**60  # leaves as much room for dO


def largest_size() -> int:
    """Head size up to which cuDNN serves this process's GPUs, 0 if it does not.

    Without a GPU, that up to which it serves every GPU that it serves at all.
    """
    if jax.default_backend() != "gpu":
        return LARGEST_SIZE
    major = str(jax.devices()[0].compute_capability).partition(".")[0]
    if not major.isdecimal() or int(major) < SMALLEST_CAPABILITY:  # AMD's are such as gfx90a
        return 0
    return LARGEST_SIZE_HOPPER if int(major) >= 9 else LARGEST_SIZE


def check(
    query: Array,
    key: Array,
    value: Array,
    kind: str,
    segment_ids: Array | None,
    logits_soft_cap: float | None,
) -> None:
    """Raises ValueError, naming the limit, where cuDNN cannot serve."""
    sizes, largest = (query.shape[-1], value.shape[-1]), largest_size()
    # exp(V) in float16 overflows at V = 11.
    dtypes = {"standard": ("bfloat16", "float16"), "laser": ("bfloat16",)}[kind]
    found = sorted({str(x.dtype) for x in (query, key, value)})
    limits = {
        f"an NVIDIA GPU of compute capability {SMALLEST_CAPABILITY}.0 or later": not largest,
        f"{kind} attention in {' or '.join(dtypes)}; got {' and '.join(found)}": (
            len(found) > 1 or found[0] not in dtypes
        ),
        f"one head size, at most {largest}, a multiple of 8; got {sizes}": (
            sizes[0] != sizes[1] or sizes[0] > largest or sizes[0] % 8 != 0
        ),
        "no segment_ids": segment_ids is not None,
        "no logits_soft_cap": bool(logits_soft_cap),
    }
    for limit, exceeded in limits.items():
        if exceeded:
            raise ValueError(f"implementation='cudnn' serves {limit}; use 'chunked'")


class Options(NamedTuple):
    """What a call is specialised on: see `attention`."""

    scale: float
    causal: bool
    library: Library
    window: tuple[int, int] | None = None


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    kind: str,
    logits_scale: float,
    causal: bool,
    segment_ids: Array | None,
    logits_soft_cap: float | None,
    window: tuple[int, int] | None = None,
    library: Library = "cudnn",
) -> tuple[Array, Array]:
    """The interface's contract; see `laser.attention.attention`.

    Args:
      window: causal; `interface` sends no other here.
      library: what weighs the values, an `implementation` of jax.nn.dot_product_attention; "xla" is
        for tests without a GPU, at any head size and dtype.

    Returns:
      (B, T, H, D) in the dtype of `value`, and the float32 scalar range: the largest distance in
      nats of an output below the largest value of its feature, or below 0 if that is larger (0 for
      standard attention).

    Raises:
      ValueError: see `check`.
    """
    if library == "cudnn":
        check(query, key, value, kind, segment_ids, logits_soft_cap)
    options = Options(float(logits_scale), causal, library, window)
    if kind == "standard":
        return _standard(query, key, value, options), jnp.float32(0)
    return _laser(query, key, value, options)


def _call(query: Array, key: Array, operand: Array, options: Options) -> Array:
    return jax.nn.dot_product_attention(
        query, key, operand, scale=options.scale, is_causal=options.causal,
        local_window_size=options.window, implementation=options.library,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _weighted_mean(query: Array, key: Array, operand: Array, options: Options) -> Array:
    """softmax(scale · Q Kᵀ) operand, in the dtype of the operand, by the library.

    What the library keeps for the backward pass has the name `OUTPUT_NAME`, so that a policy of
    jax.checkpoint can keep it too.
    """
    return _call(query, key, operand, options)


def _weighted_mean_fwd(query, key, operand, options: Options):
    found = jax.vjp(functools.partial(_call, options=options), query, key, operand)
    given = {id(x) for x in (query, key, operand)}
    made = {id(x): x for x in jax.tree.leaves(found) if id(x) not in given}
    # Named once each, as the output is also one of the things kept.
    named = {number: checkpoint_name(x, OUTPUT_NAME) for number, x in made.items()}
    return jax.tree.map(lambda x: named.get(id(x), x), found)


def _weighted_mean_bwd(options: Options, pullback, d_mean):
    return pullback(d_mean)


_weighted_mean.defvjp(_weighted_mean_fwd, _weighted_mean_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _standard(query: Array, key: Array, value: Array, options: Options) -> Array:
    """softmax(·) V, whose gradients come from `chunked` where a product of dO and V could overflow.

    An infinite product meets a weight of 0 where the value is not seen, and gives NaN.
    """
    return _weighted_mean(query, key, value, options)


def _standard_fwd(query, key, value, options: Options):
    weighted_mean = functools.partial(_weighted_mean, options=options)
    out, pullback = jax.vjp(weighted_mean, query, key, value)
    return out, (query, key, value, pullback)


def _standard_bwd(options: Options, residuals, d_out):
    query, key, value, pullback = residuals
    usual = (jnp.abs(value) <= LARGEST_STANDARD_VALUE).all()

    def by_chunks(d_out):
        return jax.vjp(lambda *x: _chunked(*x, "standard", options), query, key, value)[1](d_out)

    return lax.cond(usual, pullback, by_chunks, d_out)


_standard.defvjp(_standard_fwd, _standard_bwd)


def _chunked(query: Array, key: Array, value: Array, kind: str, options: Options) -> Array:
    return chunked.attention(
        query, key, value, kind=kind, logits_scale=options.scale, causal=options.causal,
        segment_ids=None, logits_soft_cap=None, window=options.window,
    )[0]  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _laser(query: Array, key: Array, value: Array, options: Options) -> tuple[Array, Array]:
    """log(softmax(·) exp(V)), (B, T, H, D), and its range."""
    return _laser_fwd(query, key, value, options)[0]


def _laser_fwd(query, key, value, options: Options):
    mu = _anchor(value)
    weighted_mean = functools.partial(_weighted_mean, options=options)
    mean, pullback = jax.vjp(weighted_mean, query, key, _operand(value, mu))
    largest = value.max(axis=1, keepdims=True).astype(jnp.float32)
    # Of all sums, not of the smallest: XLA for CPUs may overlook a NaN in a minimum.
    usual = _certified(_anchored(mean, mu), largest, mu).all()

    # What is float32 and large is formed within the branches, so that none of it goes into them.
    def direct(query, key, value, mean):
        smallest = mean.min(axis=1, keepdims=True)
        out = jnp.log(_anchored(mean, mu))
        return out.astype(value.dtype), jnp.log(_anchored(smallest, mu))

    def repaired(query, key, value, mean):
        y = _anchored(mean, mu)
        certified = _certified(y, _largest_seen(value, options), mu)
        again = _unanchored(query, key, value, options)
        out = jnp.where(certified, jnp.log(y), again)
        return out.astype(value.dtype), out.min(axis=1, keepdims=True)

    out, smallest_out = lax.cond(usual, direct, repaired, query, key, value, mean)
    largest = _of_queries(largest, query.shape[2])
    range_nats = jnp.maximum(jnp.maximum(largest, 0) - smallest_out, 0).max()
    range_nats = jnp.minimum(range_nats, jnp.finfo(jnp.float32).max)
    return (out, range_nats), (query, key, value, mu, mean, pullback, usual)


def _laser_bwd(options: Options, residuals, cotangents):
    query, key, value, mu, mean, pullback, usual = residuals
    d_out, _ = cotangents  # the range is a report; nothing is trained on it
    query, key, value = chunked.once_differentiable((query, key, value))

    def of_mean(d_mean):
        d_query, d_key, d_operand = pullback(d_mean.astype(mean.dtype))
        d_value = d_operand.astype(jnp.float32) * _exponential(value)
        return d_query, d_key, d_value.astype(value.dtype)

    # All of the backward pass is within the branches: no gradients are added to zeros.
    def direct(d_out):
        return of_mean(d_out.astype(jnp.float32) / _anchored(mean, mu))

    def repaired(d_out):
        y, d_out = _anchored(mean, mu), d_out.astype(jnp.float32)
        certified = _certified(y, _largest_seen(value, options), mu)
        first = of_mean(jnp.where(certified, d_out / jnp.where(certified, y, 1), 0))
        unanchored = functools.partial(_unanchored, options=options)
        again = jax.vjp(unanchored, query, key, value)[1](jnp.where(certified, 0, d_out))
        return jax.tree.map(jnp.add, first, again)

    return lax.cond(usual, direct, repaired, d_out)


_laser.defvjp(_laser_fwd, _laser_bwd)


def _anchor(value: Array) -> Array:
    """μ, (B, 1, K, D) float32: 1 where the first values are all close to 0 or larger, else 0."""
    smallest = value[:, :ANCHOR_LENGTH].min(axis=1, keepdims=True)
    return jnp.where(smallest >= LOWEST_ANCHORED, 1.0, 0.0)


def _exponential(value: Array) -> Array:
    """exp(V), float32; bounded, so that a weight of 0 times it is 0."""
    return jnp.exp(jnp.minimum(value.astype(jnp.float32), LARGEST_VALUE))


def _operand(value: Array, mu: Array | float) -> Array:
    return (_exponential(value) - mu).astype(value.dtype)


def _anchored(mean: Array, mu: Array) -> Array:
    """The sum Σ P·exp(V) that the weighted mean of exp(V) - μ stands for, float32."""
    return mean.astype(jnp.float32) + _of_queries(mu, mean.shape[2])


def _of_queries(x: Any, heads: int) -> Any:
    """What is known of each head of values, (B, ·, K, D), for the heads of queries it serves."""
    if isinstance(x, float) or x.shape[2] == heads:
        return x
    return jnp.repeat(x, heads // x.shape[2], axis=2)


def _largest_seen(value: Array, options: Options) -> Array:
    """At least the largest value that each query sees, (B, T or 1, K, D) float32."""
    value = value.astype(jnp.float32)
    return lax.cummax(value, axis=1) if options.causal else value.max(axis=1, keepdims=True)


def _certified(y: Array, largest: Array, mu: Array | float) -> Array:
    """Whether sums y of exponentials with anchor μ are right; `largest` of the values in them."""
    heads = y.shape[2]
    smallest = jnp.where(_of_queries(mu, heads) == 1, SMALLEST_ANCHORED_SUM, SMALLEST_SUM)
    return (_of_queries(largest, heads) <= LARGEST_VALUE) & (y >= smallest)


def _unanchored(query: Array, key: Array, value: Array, options: Options) -> Array:
    """log(softmax(·) exp(V)), float32, without an anchor, where need be by `chunked`."""
    y = _weighted_mean(query, key, _operand(value, 0.0), options).astype(jnp.float32)
    certified = _certified(y, lax.stop_gradient(_largest_seen(value, options)), 0.0)

    def exact(query, key, value):
        return _chunked(query, key, value, "laser", options).astype(jnp.float32)

    rest = lax.cond(
        certified.all(), lambda query, key, value: jnp.zeros_like(y), exact, query, key, value
    )
    return jnp.where(certified, jnp.log(jnp.where(certified, y, 1)), rest)
