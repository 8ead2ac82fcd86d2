"""Attention for XLA, exact and causal to rounding, one chunk of queries at a time.

A chunk of queries meets only the keys up to its own end, so that half of the causal square is never
computed, and is recomputed in the backward pass, so that no (T, S) matrix is kept. On a CPU this is
about twice as fast as the whole square.

LASER needs a reference c to form exp(V - c) without overflow. Here c is, per chunk and per feature,
a power of two: the largest floor(V · log2 e) among the keys that some query of the chunk can see.
Moving a power of two in or out of a product rounds nothing, so the result does not depend on which
c was taken, as long as it is in range. Where an output lies far below the reference (a later token
of the chunk, or another document in it, has an outlier) the sum underflows; the size of the sum
itself is the certificate. Elements without it are computed again in log space, each relative to the
largest value that its own query sees.

A key that a query may not see is left out: its logit is -inf, and so is its term in log space,
whatever its value. A value is never added to a mask.

Where several heads of queries share a head of keys, their queries are so many more rows of it.

Of a window, the keys of a chunk are those that its queries can see, and no others are looked at.

Shapes: B batch, H heads of keys, C queries of a chunk, T queries, S keys of a chunk, D size, R rows
of a head of keys: its queries, of all heads that share it.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from laser.attention.products import of_exponentials

Array = jax.Array

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# A sum y = Σ P·E of at least 2^-90 is right: what underflowed in it is below 2^-126, hence below
# 2^-36 of it, and 1/y and its products stay finite in the backward pass.
SMALLEST_CERTIFIED_EXPONENT = -90
RANGE_LIMIT_NATS = -SMALLEST_CERTIFIED_EXPONENT * LN_2
# In nats. Rounding V · log2 e is a factor of exp(V), off by up to 6e-5 here; outputs that are
# larger, of either sign, are computed in log space. What is exponentiated is bounded a little
# beyond that, as an output may lie that far below the largest of its values.
LARGEST_CERTIFIED_OUTPUT = 1024.0
LARGEST_EXPONENTIATED = LARGEST_CERTIFIED_OUTPUT + 128

NOT_IN_USE = -(2**30)  # exponent of a key's values that no query of the chunk sees


class Extras(NamedTuple):
    """What else says which keys a query sees, and how well, of `dot_product_attention`.

    Attributes:
      bias: added to the logits, of a shape that broadcasts to (B, heads of queries, T, S).
      mask: bool, likewise; a query sees keys where it is True.
      query_lengths: (B,) int; later queries see nothing.
      key_lengths: (B,) int; later keys are not seen.
    """

    bias: Array | None = None
    mask: Array | None = None
    query_lengths: Array | None = None
    key_lengths: Array | None = None

    def given(self) -> bool:
        return any(x is not None for x in self)


NO_EXTRAS = Extras()


@jax.custom_jvp
def once_differentiable(arrays: Any) -> Any:
    """The arrays that a gradient is made of, which refuse to be differentiated once more: exp(V) is
    a constant of the backward pass, and what came of it would be wrong.
    """
    return arrays


@once_differentiable.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "this attention has first derivatives alone (jax.grad, jax.vjp); for second ones use "
        "implementation='reference'"
    )


def chunk_length(length: int) -> int:
    """Queries of a chunk: short chunks skip more of the causal square, long ones run faster."""
    return 128 if length <= 2048 else 256


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
    shared_segment: int | None = None,
    window: tuple[int, int] | None = None,
    extras: Extras = NO_EXTRAS,
) -> tuple[Array, Array]:
    """The interface's contract; see `laser.attention.dot_product_attention`.

    Returns:
      (B, T, H, D) in the dtype of `value`, and the float32 scalar range: the largest distance in
      nats between a chunk's reference and one of its outputs (0 for standard attention). Beyond
      `RANGE_LIMIT_NATS` the exact log-space path was taken for the elements concerned.
    """
    chunk = functools.partial(
        _chunk,
        kind=kind,
        logits_scale=logits_scale,
        logits_soft_cap=logits_soft_cap,
        shared_segment=shared_segment,
        group=query.shape[2] // key.shape[2],
        causal=causal,
        window=window,
    )

    @jax.checkpoint  # keeps query, key, value and bias, and nothing that was made of them here
    def run(query, key, value, bias):
        q_BHTD, k_BHSD, v_BHSD = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        # Wide before it is cut, so that the chunks' gradients are added up in float32.
        k_BHSD, v_BHSD = k_BHSD.astype(jnp.float32), v_BHSD.astype(jnp.float32)
        exponent = _split_exponent(jax.lax.stop_gradient(v_BHSD)) if kind == "laser" else None
        length = query.shape[1]
        extras_of_chunks = _cut(extras._replace(bias=bias), length)
        outputs, ranges = [], []
        for start in range(0, length, chunk_length(length)):
            stop = min(start + chunk_length(length), length)
            keys = _keys_in_reach(start, stop, key.shape[1], causal, window)
            extra = _of_keys(next(extras_of_chunks), keys)
            if keys.start >= keys.stop:
                shape = (*query.shape[:1], query.shape[2], stop - start, value.shape[3])
                outputs.append(jnp.zeros(shape, jnp.float32))
                continue
            out, range_nats = jax.checkpoint(
                functools.partial(chunk, start=start, first_key=keys.start)
            )(
                _rows_of_keys(q_BHTD[:, :, start:stop], k_BHSD.shape[1]),
                k_BHSD[:, :, keys],
                v_BHSD[:, :, keys],
                jax.tree.map(lambda x, keys=keys: x[:, :, keys], exponent),
                None if segment_ids is None else segment_ids[:, start:stop],
                None if segment_ids is None else segment_ids[:, keys],
                extra,
            )
            outputs.append(_rows_of_keys(out, query.shape[2]))
            ranges.append(range_nats)
        out_BTHD = jnp.concatenate(outputs, axis=2).transpose(0, 2, 1, 3)
        range_nats = jnp.stack(ranges).max() if ranges else jnp.float32(0)
        return out_BTHD.astype(value.dtype), range_nats

    return run(query, key, value, extras.bias)


def _keys_in_reach(
    start: int, stop: int, keys: int, causal: bool, window: tuple[int, int] | None
) -> slice:
    """Those that queries from `start` to `stop` may see; of no length where there are none."""
    before, after = (keys + stop, keys) if window is None else window
    last = min(keys, stop if causal else keys, stop + after)
    return slice(max(0, start - before), last)


def _cut(extras: Extras, length: int) -> Iterator[Extras]:
    """What there is for each chunk of queries. Lengths are given to every one of them."""
    step = chunk_length(length)
    sizes = [min(step, length - start) for start in range(0, length, step)]

    def chunks(x):
        if x is None:
            return itertools.repeat(x)
        if x.shape[2] == 1:  # wide, as of a bias the chunks' gradients are added up
            return itertools.repeat(x if x.dtype == bool else x.astype(jnp.float32))
        return jax.lax.split(x, sizes, axis=2)  # whose gradient is one array, not a sum of so many

    for bias, mask in zip(chunks(extras.bias), chunks(extras.mask)):
        yield extras._replace(bias=bias, mask=mask)


def _of_keys(extras: Extras, keys: slice) -> Extras:
    def cut(x):
        return x if x is None or x.shape[3] == 1 else x[..., keys]

    return extras._replace(bias=cut(extras.bias), mask=cut(extras.mask))


def _chunk(
    q_BHCD, k_BHSD, v_BHSD, exponent, q_segments, k_segments, extras,
    *, kind, logits_scale, logits_soft_cap, shared_segment, group, causal, window, start, first_key,
):  # fmt: skip
    """One chunk of queries, which begins at position `start`, against its keys.

    q_BHCD has the queries of all heads of a group, one head after the other; the segments and the
    extras are those of one.
    """
    k_BHSD = k_BHSD.astype(q_BHCD.dtype)
    logits = jnp.einsum("bhcd,bhsd->bhcs", q_BHCD, k_BHSD, preferred_element_type=jnp.float32)
    logits *= logits_scale
    if logits_soft_cap:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    queries, keys = logits.shape[2] // group, logits.shape[3]
    if causal:
        later = start - first_key + jnp.arange(queries)[:, None] < jnp.arange(keys)
        logits = jnp.where(_of_heads(later, group), -jnp.inf, logits)
    in_use = None
    if k_segments is not None:
        seen = q_segments[:, :, None] == k_segments[:, None, :]
        in_use = (k_segments >= q_segments.min(1, keepdims=True)) & (
            k_segments <= q_segments.max(1, keepdims=True)
        )
        if shared_segment is not None:
            shared = k_segments == shared_segment
            seen |= shared[:, None, :]
            in_use |= shared
        logits = jnp.where(_of_heads(seen, group)[:, None], logits, -jnp.inf)
    blind = None
    if window is not None or extras.given():
        logits = _restricted(logits, extras, group, window, start, first_key)
        blind = (logits == -jnp.inf).all(-1, keepdims=True)
    # A query that sees nothing is given all keys, so that nothing is infinite, and then 0.
    softmax_logits = logits if blind is None else jnp.where(blind, 0, logits)
    if kind == "standard":
        # Without this the gradient of a masked probability, huge where the value is, would meet 0.
        probs = jnp.where(logits > -jnp.inf, jax.nn.softmax(softmax_logits, axis=-1), 0)
        return jnp.einsum("bhcs,bhsd->bhcd", probs, v_BHSD), jnp.float32(0)
    mantissa, power = exponent
    if blind is not None:
        in_use_BHS1 = (logits > -jnp.inf).any(axis=2)[..., None]
        power = jnp.where(in_use_BHS1, power, NOT_IN_USE)
        power = jnp.where(in_use_BHS1.any(axis=2, keepdims=True), power, 0)
        exp_v, reference = _exp_relative(mantissa, power, None)
        out, range_nats = _laser_readout(softmax_logits, v_BHSD, exp_v, reference)
        return jnp.where(blind, 0, out), range_nats
    exp_v, reference = _exp_relative(mantissa, power, in_use)
    return _laser_readout(logits, v_BHSD, exp_v, reference)


def _restricted(
    logits: Array, extras: Extras, group: int, window: tuple[int, int] | None,
    start: int, first_key: int,
) -> Array:  # fmt: skip
    """(B, H, R, S) logits with the bias, and -inf at keys that are not to be seen."""
    queries, keys = logits.shape[2] // group, logits.shape[3]
    of_rows = functools.partial(_of_rows, heads=logits.shape[1], group=group, queries=queries)
    query, key = start + jnp.arange(queries)[:, None], first_key + jnp.arange(keys)
    if extras.bias is not None:
        logits += of_rows(extras.bias.astype(jnp.float32))
    seen = []
    if extras.mask is not None:
        seen.append(extras.mask)
    if window is not None:
        before, after = window
        seen.append(((query - key <= before) & (key - query <= after))[None, None])
    for position, lengths in ((query, extras.query_lengths), (key[None], extras.key_lengths)):
        if lengths is not None:
            seen.append((position < lengths[:, None, None])[:, None])
    for one in seen:
        logits = jnp.where(of_rows(one), logits, -jnp.inf)
    return logits


def _of_rows(x: Array, heads: int, group: int, queries: int) -> Array:
    """(·, 1 or all heads of queries, 1 or C, ·) as what broadcasts to (B, H, R, S)."""
    if group == 1 or x.shape[1:3] == (1, 1):
        return x
    x = jnp.broadcast_to(x, (*x.shape[:2], queries, x.shape[3]))
    return _of_heads(x, group) if x.shape[1] == 1 else _rows_of_keys(x, heads)


def _rows_of_keys(x_BHCD: Array, heads: int) -> Array:
    """The same rows under fewer or more heads: (B, H, C, D) -> (B, heads, C · H / heads, D)."""
    return x_BHCD.reshape(x_BHCD.shape[0], heads, -1, x_BHCD.shape[-1])


def _of_heads(mask: Array, group: int) -> Array:
    """A mask of one head, (..., C, S), for the rows of so many."""
    return mask if group == 1 else jnp.concatenate([mask] * group, axis=-2)


def _split_exponent(v: Array) -> tuple[Array, Array]:
    """exp(v), of bounded v, as mantissa · 2^power: in [1, 2] float32, and int32."""
    log2 = jnp.clip(v, -LARGEST_EXPONENTIATED, LARGEST_EXPONENTIATED) * LOG2_E
    power = jnp.floor(log2)
    return jnp.exp2(log2 - power), power.astype(jnp.int32)


def _power_of_two(n: Array) -> Array:
    """2^n in float32 for int32 n <= 127, exactly; 0 below the normal numbers."""
    bits = jnp.left_shift(jnp.maximum(n, -127) + 127, 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _exp_relative(mantissa: Array, power: Array, in_use: Array | None) -> tuple[Array, Array]:
    """exp(V) / 2^reference, at most 2, and the reference (B, H, 1, D) int32.

    Keys outside of `in_use` (B, S), whose documents no query of the chunk belongs to, are left out
    of the reference and count as 0.
    """
    if in_use is not None:
        power = jnp.where(in_use[:, None, :, None], power, NOT_IN_USE)
    reference = power.max(axis=2, keepdims=True)
    return mantissa * _power_of_two(power - reference), reference


@jax.custom_vjp
def _laser_readout(logits: Array, v: Array, exp_v: Array, reference: Array):
    """log(softmax(logits) exp(V)) and its range, see `attention`.

    Args:
      logits: (B, H, C, S) float32, -inf where a key is not visible.
      v: (B, H, S, D) float32.
      exp_v: (B, H, S, D) float32, exp(v) / 2^reference of bounded v; its gradient goes to `v`.
      reference: (B, H, 1, D) int32.
    """
    return _laser_readout_fwd(logits, v, exp_v, reference)[0]


def _laser_readout_fwd(logits, v, exp_v, reference):
    probs = jax.nn.softmax(logits, axis=-1)
    y = jnp.einsum("bhcs,bhsd->bhcd", probs, exp_v, precision=of_exponentials())
    # The bits of an infinite sum are not those of a power of two and a mantissa.
    certified = (y >= 2.0**SMALLEST_CERTIFIED_EXPONENT) & (y < jnp.inf)
    fast = _log_scaled(jnp.where(certified, y, 1.0), reference)
    certified &= jnp.abs(fast) <= LARGEST_CERTIFIED_OUTPUT
    all_certified = certified.all()
    exact = jax.lax.cond(
        all_certified, lambda logits, v: jnp.zeros_like(y), _log_space_readout, logits, v
    )
    out = jnp.where(certified, fast, exact)
    below = reference * LN_2 - out
    range_nats = jnp.maximum(jnp.where(certified, below, jnp.abs(below)).max(), 0)
    return (out, range_nats), (logits, v, exp_v, probs, y, certified, all_certified)


def _laser_readout_bwd(residuals, cotangents):
    # With w = P · E / y: dV = Σ_c do · w and dlogits = Σ_d do · (w - P). No reference appears.
    logits, v, exp_v, probs, y, certified, all_certified = residuals
    d_out, _ = cotangents  # the range is a report; nothing is trained on it
    logits, v = once_differentiable((logits, v))
    # Gradients are linear in dO: divided by small sums, one of about 1 stays within float32.
    to_one, back = normaliser(d_out, axis=(2, 3))
    d_out *= to_one
    d_fast = jnp.where(certified, d_out, 0.0)
    d_y = d_fast / jnp.where(certified, y, 1.0)
    precision = of_exponentials()
    d_probs = jnp.einsum("bhcd,bhsd->bhcs", d_y, exp_v, precision=precision)
    d_logits = probs * (d_probs - d_fast.sum(-1, keepdims=True))
    d_v = jnp.einsum("bhcs,bhcd->bhsd", probs, d_y, precision=precision) * exp_v

    def log_space_gradient(logits, v, d_exact):
        return jax.vjp(_log_space_readout, logits, v)[1](d_exact)

    d_logits_exact, d_v_exact = jax.lax.cond(
        all_certified,
        lambda logits, v, d_exact: (jnp.zeros_like(logits), jnp.zeros_like(v)),
        log_space_gradient,
        logits, v, jnp.where(certified, 0.0, d_out),
    )  # fmt: skip
    return back * (d_logits + d_logits_exact), back * (d_v + d_v_exact), None, None


_laser_readout.defvjp(_laser_readout_fwd, _laser_readout_bwd)


def normaliser(x: Array, axis: tuple[int, ...]) -> tuple[Array, Array]:
    """Powers of two, float32, that bring the largest |x| over the axes to about 1, and back."""
    largest = jnp.abs(x).max(axis=axis, keepdims=True).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    power = jnp.clip(jnp.right_shift(bits, 23) - 127, -126, 126)
    return _power_of_two(-power), _power_of_two(power)


def _log_scaled(y: Array, power: Array) -> Array:
    """log(y · 2^power) for normal positive y, the same bits for every split of the product."""
    bits = jax.lax.bitcast_convert_type(y, jnp.int32)
    exponent = jnp.right_shift(bits, 23) - 127
    mantissa = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
    return jnp.log(mantissa) + (exponent + power).astype(jnp.float32) * LN_2


def _log_space_readout(logits: Array, v: Array) -> Array:
    """log(softmax(logits) exp(v)), one query at a time: exact for every finite v, slow.

    Args:
      logits: (B, H, C, S) float32, -inf where a key is not visible.
      v: (B, H, S, D) float32.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)

    @jax.checkpoint
    def one_query(log_probs_BHS):
        return log_space_mean(log_probs_BHS[..., None], v)

    return jax.lax.map(one_query, log_probs.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3)


def log_space_mean(log_probs: Array, v: Array) -> Array:
    """logsumexp_s(log_probs + v) of one query, of its visible keys alone: (..., S, D) -> (..., D).

    Relative to the largest visible v, so that a probability is not lost beside a large value, and
    no sum overflows.

    Args:
      log_probs: (..., S, 1), -inf where a key is not visible.
      v: (..., S, D); where it is not visible it may be anything.
    """
    seen = log_probs > -jnp.inf
    largest = jax.lax.stop_gradient(jnp.where(seen, v, -jnp.inf).max(axis=-2, keepdims=True))
    below = jnp.where(seen, v - largest, 0)
    terms = jnp.where(seen, log_probs + below, -jnp.inf)
    return jax.nn.logsumexp(terms, axis=-2) + largest[..., 0, :]
