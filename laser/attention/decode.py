"""Attention of new tokens over a cache of keys and values, one block of slots at a time.

The loop has as many turns as there are blocks in use, whatever the cache could hold, and a block in
which a row sees nothing changes no bit of that row's result. So a row's output depends neither on
the capacity of the cache nor on how far the other rows of its batch have come.

LASER is a difference of two logsumexps over the keys a query may see,

    log(softmax(s) exp(V)) = logsumexp_j(s_j + V_j) - logsumexp_j(s_j),

which is exact at any range of V and what a single query is given. Several queries at once (a piece
of a prompt) use products with exp(V - c), c the largest value in each block, and take the form
above for elements whose sum is too small to be trusted.

Shapes: B batch, H heads, T new queries, S slots of a block, or of the cache where said, D size.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from laser.attention.chunked import SMALLEST_CERTIFIED_EXPONENT
from laser.attention.products import of_exponentials

Array = jax.Array

# Factor of probabilities: a sum of so many of them times a value is no larger than the value.
HEADROOM = 2.0**-24
LOWEST = float(jnp.finfo(jnp.float32).min)  # where a running maximum starts

BLOCK = 64  # slots; the capacity of a cache is a multiple of it


class _Sums(NamedTuple):
    """Sums over the slots so far, float32. Logits count relative to `top`, values to `reference`.

    `reference` is a (B, H, 1, D) array for LASER. Standard attention has none: (B, H, 0, D).
    """

    top_BHT1: Array
    normaliser_BHT1: Array
    readout_BHTD: Array
    reference: Array


def cached_attention(
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    stop: Array | int,
    *,
    kind: Literal["standard", "laser"],
    logits_scale: float | None = None,
    logits_soft_cap: float | None = None,
) -> Array:
    """What `attention` returns for the newest T tokens, from cached keys and values.

    Exact to rounding for every finite V (standard attention: up to half of the largest), whatever
    the slots hold that no query sees. A visible +inf or NaN gives an output that is not finite; in
    standard attention the other queries of the call may have such outputs too. No derivative is
    defined.

    Args:
      query: (B, T, H, D_qk), float32 or bfloat16.
      key: (B, K, S, D_qk), S slots, those of the new tokens included; a multiple of `BLOCK`. Each
        head of keys and values serves H / K neighbouring heads of queries.
      value: (B, K, S, D_v).
      visible: (B, T, S) bool; every query sees one slot at least.
      stop: () int, at most S; nobody sees this slot or a later one, and they cost nothing. One that
        is larger, but known to the compiled program alone, counts as S.
      kind, logits_scale, logits_soft_cap: as in `attention`.

    Returns:
      (B, T, H, D_v) in the dtype of `value`.

    Raises:
      ValueError: shapes that do not fit, an unknown `kind`, or a `stop` beyond the slots.
    """
    _check(query, key, value, visible, stop, kind)
    if isinstance(stop, jax.core.Tracer):  # a block beyond the slots would be the last one again
        stop = jnp.minimum(stop, key.shape[2])
    scale = 1 / math.sqrt(query.shape[-1]) if logits_scale is None else logits_scale
    q_BHTD = query.transpose(0, 2, 1, 3)
    group = query.shape[2] // key.shape[1]

    def block(start: Array, q_BHTD: Array, visible_BTS: Array) -> tuple[Array, Array, Array]:
        """Logits (B, H, T, S), values (B, H, S, D) and what is visible (B, 1, T, S)."""
        k_BHSD, v_BHSD = (
            jax.lax.dynamic_slice_in_dim(x, start, BLOCK, axis=2) for x in (key, value)
        )
        if group > 1:  # a block at a time, never the cache
            k_BHSD, v_BHSD = (jnp.repeat(x, group, axis=1) for x in (k_BHSD, v_BHSD))
        seen = jax.lax.dynamic_slice_in_dim(visible_BTS, start, BLOCK, axis=2)[:, None]
        logits = jnp.einsum("bhtd,bhsd->bhts", q_BHTD, k_BHSD, preferred_element_type=jnp.float32)
        logits *= scale
        if logits_soft_cap:
            logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
        # A slot that no query sees may hold anything, which 0 times it would not hide.
        v_BHSD = jnp.where(seen.any(axis=2)[..., None], v_BHSD, 0).astype(jnp.float32)
        return jnp.where(seen, logits, -jnp.inf), v_BHSD, seen

    def run(add, q_BHTD, visible_BTS, reference_rows: int) -> _Sums:
        """The sums after all blocks in use; `add` puts a block to them."""
        size = value.shape[-1]
        batch, heads, queries, _ = q_BHTD.shape
        empty = jnp.full((batch, heads, queries, 1), LOWEST, jnp.float32)
        start = _Sums(
            empty,
            jnp.zeros_like(empty),
            jnp.zeros((batch, heads, queries, size), jnp.float32),
            jnp.full((batch, heads, reference_rows, size), LOWEST, jnp.float32),
        )
        return jax.lax.fori_loop(
            0,
            (stop + BLOCK - 1) // BLOCK,
            lambda i, sums: add(sums, *block(i * BLOCK, q_BHTD, visible_BTS)),
            start,
        )

    def exact(q_BHTD, visible_BTS):
        return _laser_output(run(_add_log_space, q_BHTD, visible_BTS, 1))

    if kind == "standard":
        sums = run(_add_standard, q_BHTD, visible, 0)
        out_BHTD = sums.readout_BHTD / sums.normaliser_BHT1 / HEADROOM
    elif query.shape[1] == 1:
        out_BHTD = exact(q_BHTD, visible)
    else:
        sums = run(_add_products, q_BHTD, visible, 1)
        out_BHTD = _certified_or(functools.partial(_one_by_one, exact, q_BHTD, visible), sums)
    return out_BHTD.transpose(0, 2, 1, 3).astype(value.dtype)


def _add_standard(sums: _Sums, logits: Array, v_BHSD: Array, seen: Array) -> _Sums:
    """HEADROOM · softmax(s) V, the sums of an online softmax (arXiv 1805.02867)."""
    top, normaliser, probs, shrink = _add_logits(sums, logits, seen)
    added = jnp.einsum("bhts,bhsd->bhtd", HEADROOM * probs, v_BHSD)
    return _Sums(top, normaliser, sums.readout_BHTD * shrink + added, sums.reference)


def _add_products(sums: _Sums, logits: Array, v_BHSD: Array, seen: Array) -> _Sums:
    """Σ_s exp(s) exp(V - reference) with one reference for all queries."""
    top, normaliser, probs, shrink = _add_logits(sums, logits, seen)
    in_use = seen.any(axis=2)[..., None]
    largest = jnp.where(in_use, v_BHSD, LOWEST).max(axis=2, keepdims=True)
    exp_v = jnp.where(in_use, jnp.exp(v_BHSD - largest), 0.0)
    reference = jnp.maximum(sums.reference, largest)
    readout = sums.readout_BHTD * shrink * jnp.exp(sums.reference - reference)
    products = jnp.einsum("bhts,bhsd->bhtd", probs, exp_v, precision=of_exponentials())
    added = products * jnp.exp(largest - reference)
    return _Sums(top, normaliser, readout + added, reference)


def _add_log_space(sums: _Sums, logits: Array, v_BHSD: Array, seen: Array) -> _Sums:
    """Σ_s exp(s + V - reference) with the largest s + V as the reference, of one query."""
    top, normaliser, _, _ = _add_logits(sums, logits, seen)
    terms_BHSD = jnp.where(seen, logits - top, -jnp.inf)[:, :, 0, :, None] + v_BHSD
    before = sums.reference + (sums.top_BHT1 - top)
    reference = jnp.maximum(before, terms_BHSD.max(axis=2, keepdims=True))
    added = jnp.exp(terms_BHSD - reference).sum(axis=2, keepdims=True)
    return _Sums(
        top, normaliser, sums.readout_BHTD * jnp.exp(before - reference) + added, reference
    )


def _add_logits(sums: _Sums, logits: Array, seen: Array) -> tuple[Array, Array, Array, Array]:
    """The new top and normaliser, exp(logits - top), and what older sums are multiplied with."""
    top = jnp.maximum(sums.top_BHT1, logits.max(axis=-1, keepdims=True))
    probs = jnp.where(seen, jnp.exp(logits - top), 0.0)
    shrink = jnp.exp(sums.top_BHT1 - top)
    return top, sums.normaliser_BHT1 * shrink + probs.sum(-1, keepdims=True), probs, shrink


def _laser_output(sums: _Sums) -> Array:
    return jnp.log(sums.readout_BHTD) + sums.reference - jnp.log(sums.normaliser_BHT1)


def _certified_or(exact, sums: _Sums) -> Array:
    """The output of the sums, and that of `exact()` where a sum lies close to underflow.

    What underflowed on the way is below 2^-126, hence below 2^-36 of a certified sum.
    """
    certified = sums.readout_BHTD >= 2.0**SMALLEST_CERTIFIED_EXPONENT
    out = _laser_output(sums._replace(readout_BHTD=jnp.where(certified, sums.readout_BHTD, 1.0)))
    return jax.lax.cond(certified.all(), lambda: out, lambda: jnp.where(certified, out, exact()))


def _one_by_one(exact, q_BHTD: Array, visible_BTS: Array) -> Array:
    """`exact` of each query in turn. Returns (B, H, T, D)."""
    queries_TBHD, visible_TBS = q_BHTD.transpose(2, 0, 1, 3), visible_BTS.transpose(1, 0, 2)
    out_TBHD = jax.lax.map(
        lambda x: exact(x[0][:, :, None], x[1][:, None])[:, :, 0], (queries_TBHD, visible_TBS)
    )
    return out_TBHD.transpose(1, 2, 0, 3)


def _check(query, key, value, visible, stop, kind) -> None:
    if kind not in ("standard", "laser"):
        raise ValueError(f"kind={kind!r}: must be 'standard' or 'laser'")
    batch, queries, heads, size = query.shape
    kv_heads, slots = key.shape[1:3]
    fit = key.shape == (batch, kv_heads, slots, size) and value.shape[:3] == key.shape[:3]
    if not fit or not kv_heads or heads % kv_heads:
        raise ValueError(
            "key and value must be (batch, heads, slots, size) with the batch and size of the "
            "query (batch, queries, heads, size), and heads that divide its; got "
            f"{query.shape}, {key.shape}, {value.shape}"
        )
    if slots % BLOCK or visible.shape != (batch, queries, slots):
        raise ValueError(
            f"a cache of {slots} slots, visible {visible.shape}: slots must be a multiple of "
            f"{BLOCK}, and visible (batch, queries, slots)"
        )
    if not isinstance(stop, jax.core.Tracer) and stop > slots:
        raise ValueError(f"stop={stop}: the cache has {slots} slots")
