"""The exact path of the fused kernels, for the blocks of queries that hold an uncertified output.

A while loop visits those blocks alone, and none in the usual case: it then costs one test of the
flags, and, unlike a conditional, no copy of the arrays that it may change. The formula is
logsumexp_s(log softmax(logits)_ts + v_sd) over the visible keys, which exponentiates nothing that
could overflow.

Shapes: B batch, H heads, N padded length, D size, M rows of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from laser.attention.chunked import log_space_mean
from laser.attention.kernels.common import SMALLEST_CERTIFIED, Options, head_of_keys

Array = jax.Array


def _rows(q_MD, k_ND, v_ND, block: Array, segments_1N: Array | None, options: Options) -> Array:
    """The exact output of one block of queries, (M, D_v) float32."""
    precision = lax.Precision.HIGHEST if q_MD.dtype == jnp.float32 else None
    logits = jnp.einsum(
        "md,nd->mn", q_MD, k_ND, precision=precision, preferred_element_type=jnp.float32
    )
    logits *= options.scale
    if options.soft_cap:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    position = jnp.arange(k_ND.shape[0])
    query = block * options.block + jnp.arange(options.block)
    if options.causal:
        logits = jnp.where(query[:, None] >= position, logits, -jnp.inf)
    if options.window is not None:
        before, after = options.reach
        distance = query[:, None] - position
        logits = jnp.where((distance <= before) & (distance >= -after), logits, -jnp.inf)
    if segments_1N is not None:
        ids = lax.dynamic_slice_in_dim(segments_1N[0], block * options.block, options.block)
        logits = jnp.where(ids[:, None] == segments_1N, logits, -jnp.inf)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    v_ND = v_ND.astype(jnp.float32)

    @jax.checkpoint
    def one_query(log_probs_N):
        return log_space_mean(log_probs_N[:, None], v_ND)

    return lax.map(one_query, log_probs)


def next_flag(flags: Array) -> tuple[tuple[Array, ...], Array]:
    """Where a flag is set, such as (batch, head, block), and the flags without it."""
    at = jnp.unravel_index(jnp.argmax(flags), flags.shape)
    return at, flags.at[at].set(False)


def _block(x_BHND: Array, at, options: Options) -> Array:
    b, h, i = at
    start = (b, h, i * options.block, 0)
    return lax.dynamic_slice(x_BHND, start, (1, 1, options.block, x_BHND.shape[-1]))[0, 0]


def _put(x_BHND: Array, rows: Array, at, options: Options) -> Array:
    b, h, i = at
    rows = rows[None, None].astype(x_BHND.dtype)
    return lax.dynamic_update_slice(x_BHND, rows, (b, h, i * options.block, 0))


def _keys(x_BKND: Array, at, q: Array) -> Array:
    """(N, D) keys or values of the head of queries at (batch, head, block)."""
    return x_BKND[at[0], head_of_keys(q, x_BKND)(at[1])]


def _head_segments(segment_ids: Array | None, at) -> Array | None:
    return None if segment_ids is None else segment_ids[at[0]]


def repair(out, q, k, v, segment_ids, failed, options: Options) -> Array:
    """The output with every -inf replaced by the exact value; certified elements keep their bits.

    Args:
      out: (B, H, N, D_v), of the forward kernel.
      q, k, v, segment_ids: its operands.
      failed: (B, H, blocks) bool, where a block of `out` holds -inf.
    """

    def body(state):
        out, flags = state
        at, flags = next_flag(flags)
        exact = _rows(
            _block(q, at, options), _keys(k, at, q), _keys(v, at, q), at[2],
            _head_segments(segment_ids, at), options,
        )  # fmt: skip
        rows = _block(out, at, options)
        rows = jnp.where(rows == -jnp.inf, exact.astype(out.dtype), rows)
        return _put(out, rows, at, options), flags

    return lax.while_loop(lambda state: state[1].any(), body, (out, failed))[0]


def add_gradients(gradients, y, d_out, q, k, v, segment_ids, options: Options):
    """Adds what the backward kernel left out: the gradients through outputs without a certificate.

    Those of keys and values, to which many blocks add, are summed in float32 and rounded once, one
    head after the other, for the sake of memory.

    Args:
      gradients: of q, k and v, in their dtypes.
      y: (B, H, N, D_v) float32, the kernel's residual; an output was left out where it is small.
      d_out: (B, H, N, D_v).
      q, k, v, segment_ids: operands of the forward kernel.
    """
    batch, heads, length, size = y.shape
    kv_heads, blocks = k.shape[1], length // options.block
    group = heads // kv_heads
    small = ~(y >= SMALLEST_CERTIFIED)
    failed = small.reshape(batch, kv_heads, group, blocks, options.block * size).any(-1)

    def add_head(state):  # of keys, and all blocks of the queries that meet it
        (dq, dk, dv), flags = state
        head, flags = next_flag(flags)
        k_ND, v_ND = k[head].astype(jnp.float32), v[head].astype(jnp.float32)

        def rows(q_MD, k_ND, v_ND, block):
            return _rows(q_MD, k_ND, v_ND, block, _head_segments(segment_ids, head), options)

        def add_block(state):
            dq, dk_ND, dv_ND, flags = state
            (member, block), flags = next_flag(flags)
            at = (head[0], head[1] * group + member, block)
            uncertified = ~(_block(y, at, options) >= SMALLEST_CERTIFIED)
            d_rows = jnp.where(uncertified, _block(d_out, at, options).astype(jnp.float32), 0.0)
            q_MD = _block(q, at, options).astype(jnp.float32)
            pullback = jax.vjp(functools.partial(rows, block=block), q_MD, k_ND, v_ND)[1]
            dq_MD, more_k_ND, more_v_ND = pullback(d_rows)
            dq = _put(dq, _block(dq, at, options) + dq_MD, at, options)
            return dq, dk_ND + more_k_ND, dv_ND + more_v_ND, flags

        start = (dq, dk[head].astype(jnp.float32), dv[head].astype(jnp.float32), failed[head])
        dq, dk_ND, dv_ND, _ = lax.while_loop(lambda state: state[-1].any(), add_block, start)
        dk, dv = dk.at[head].set(dk_ND.astype(dk.dtype)), dv.at[head].set(dv_ND.astype(dv.dtype))
        return (dq, dk, dv), flags

    start = (tuple(gradients), failed.any((2, 3)))
    return lax.while_loop(lambda state: state[1].any(), add_head, start)[0]
