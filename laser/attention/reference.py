"""Every attention function of the paper as its formula: slow, memory-hungry, easy to check by eye.

This is the oracle that the fast implementations are held to. It computes in the dtype of its inputs
(at least float32), so that float64 inputs give float64 values and float64 gradients by autodiff.

Shapes: B batch, T query positions, S key positions, H heads, D size of a query or a value.
"""

import jax
import jax.numpy as jnp

from laser.attention.chunked import NO_EXTRAS, Extras

Array = jax.Array


def visible(
    length: int,
    causal: bool,
    segment_ids: Array | None,
    shared_segment: int | None = None,
    *,
    keys: int | None = None,
    window: tuple[int, int] | None = None,
    extras: Extras = NO_EXTRAS,
) -> Array:
    """Which key each query may see.

    Args:
      length: T.
      causal: a query sees no later key.
      segment_ids: (B, T) int, or None; a query sees keys of its own segment only.
      shared_segment: and those of this one.
      keys: S, where it is not T.
      window: how many keys before its own position a query sees, and how many after it.
      extras: mask and lengths, see `Extras`.

    Returns:
      (1 or B, 1 or H, T, S) bool.
    """
    query, key = jnp.arange(length)[:, None], jnp.arange(length if keys is None else keys)
    seen = (query >= key) if causal else jnp.ones((length, key.size), bool)
    if window is not None:
        seen &= (key >= query - window[0]) & (key <= query + window[1])
    seen = seen[None, None]
    if segment_ids is not None:
        together = segment_ids[:, :, None] == segment_ids[:, None, :]
        if shared_segment is not None:
            together |= segment_ids[:, None, :] == shared_segment
        seen &= together[:, None]
    if extras.mask is not None:
        seen = seen & extras.mask
    if extras.query_lengths is not None:
        seen = seen & (query < extras.query_lengths[:, None, None, None])
    if extras.key_lengths is not None:
        seen = seen & (key < extras.key_lengths[:, None, None, None])
    return seen


def log_probabilities(
    query: Array,
    key: Array,
    *,
    logits_scale: float,
    causal: bool,
    segment_ids: Array | None,
    logits_soft_cap: float | None,
    shared_segment: int | None = None,
    window: tuple[int, int] | None = None,
    extras: Extras = NO_EXTRAS,
) -> Array:
    """log softmax(M + bias + scale · Q Kᵀ), -inf where a key is not visible. Returns (B, H, T, S).

    Of a query that sees no key, all are -inf; no gradient goes through them.
    """
    logits = jnp.einsum("bthd,bshd->bhts", query, key, precision="highest") * logits_scale
    if logits_soft_cap:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if extras.bias is not None:
        logits += extras.bias
    seen = visible(
        query.shape[1], causal, segment_ids, shared_segment,
        keys=key.shape[1], window=window, extras=extras,
    )  # fmt: skip
    logits = jnp.where(seen, logits, -jnp.inf)
    blind = (logits == -jnp.inf).all(-1, keepdims=True)
    return jnp.where(blind, -jnp.inf, jax.nn.log_softmax(jnp.where(blind, 0, logits), axis=-1))


def standard(log_probs: Array, value: Array) -> Array:
    """softmax(·) V (paper, eq. 2). (B, H, T, S), (B, S, H, D) -> (B, T, H, D)."""
    return jnp.einsum("bhts,bshd->bthd", jnp.exp(log_probs), value, precision="highest")


def laser(log_probs: Array, value: Array) -> Array:
    """log(softmax(·) exp(V)) (paper, section 3.2), as m_td + logsumexp_s(log A_ts + V_sd - m_td).

    m_td is the largest value that query t sees, beside which a log A_ts could be lost. Nothing is
    exponentiated that could overflow or underflow, at the price of a (B, H, T, S, D) tensor.
    (B, H, T, S), (B, S, H, D) -> (B, T, H, D).
    """
    value_BH1SD = value.transpose(0, 2, 1, 3)[:, :, None]
    seen = log_probs[..., None] > -jnp.inf
    m = jnp.where(seen, value_BH1SD, -jnp.inf).max(axis=3, keepdims=True)
    m = jax.lax.stop_gradient(m)
    terms_BHTSD = log_probs[..., None] + jnp.where(seen, value_BH1SD - m, 0)
    out_BHTD = jax.nn.logsumexp(terms_BHTSD, axis=3) + m[:, :, :, 0]
    return out_BHTD.transpose(0, 2, 1, 3)


def laser_paper(log_probs: Array, value: Array) -> Array:
    """log(softmax(·) exp(V - m)) + m with m_d = max_s V_sd (paper, the log-weighted-sum-exp trick).

    Kept for fidelity studies. The maximum runs over the whole row, later tokens and other documents
    included: in float32 the output is -inf, and every gradient NaN, where the visible values lie
    more than 87 below it. (B, H, T, S), (B, S, H, D) -> (B, T, H, D).
    """
    m = jax.lax.stop_gradient(value.max(axis=1, keepdims=True))
    return jnp.log(standard(log_probs, jnp.exp(value - m).astype(value.dtype))) + m


def attention(
    query: Array, key: Array, value: Array, *, kind: str, paper: bool, **options
) -> Array:
    """The interface's contract by the formulas above; see `laser.attention.attention`."""
    readout = {"standard": standard, "laser": laser_paper if paper else laser}[kind]
    group = query.shape[2] // key.shape[2]
    if group > 1:
        key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    if not paper:  # the oracle computes in at least float32, the paper's wrapper as it is given
        query, key, value = (
            x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (query, key, value)
        )
    log_probs = log_probabilities(
        query.astype(jnp.promote_types(query.dtype, jnp.float32)),
        key.astype(jnp.promote_types(key.dtype, jnp.float32)),
        **options,
    )
    # A query that sees no key is given all of them, and then 0: no gradient is infinite.
    blind_BHT = (log_probs == -jnp.inf).all(-1)
    out = readout(jnp.where(blind_BHT[..., None], 0, log_probs), value)
    return jnp.where(blind_BHT.transpose(0, 2, 1)[..., None], 0, out)
