"""Cross-entropy from hidden states, without ever holding the logits of all tokens.

The logits are the largest tensor of a training step. Here they are made for a few positions at a
time and their gradient is formed at once, in the forward pass, so that they are computed once and
never stored. The result is a sum and not a mean: whoever accumulates divides once, by the number of
tokens.

Shapes: B batch, T positions, C positions of a chunk, M model dim, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from models.decoder import output_logits
from models.products import in_own_dtype

Array = jax.Array

TOKENS_PER_CHUNK = (
    512  # of one row's positions times the batch; 512 x 32,000 float32 logits are 66 MB
)


def chunk_length(batch: int, length: int) -> int:
    """Positions per chunk: a divisor of `length` that keeps a chunk near TOKENS_PER_CHUNK."""
    wanted = max(1, min(length, TOKENS_PER_CHUNK // batch))
    return next(size for size in range(wanted, 0, -1) if length % size == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
    hidden_BTM: Array,
    embedding_VM: Array,
    targets_BT: Array,
    weights_BT: Array,
    soft_cap: float,
    z_loss: float,
    chunk: int,
    count_errors: bool = False,
) -> tuple[Array, ...]:
    """Weighted sums of -log softmax(logits)[target], with and without the z-loss.

    The z-loss adds z_loss · (log Σ exp logits)² per token (PaLM, arXiv 2204.02311, section 5).

    Args:
      hidden_BTM: in the compute dtype; logits accumulate in float32.
      embedding_VM: in any dtype; its gradient has the same, and is summed in float32.
      targets_BT: int32.
      weights_BT: float32, 0 for padding.
      soft_cap: c of c · tanh(logits / c), 0 for none.
      z_loss: weight.
      chunk: positions whose logits exist at a time; divides T.
      count_errors: also give the weighted number of targets without the largest logit.

    Returns:
      (loss, nll[, errors]), float32 scalars; gradients flow from the first only.
    """

    def add(sums, xs):
        hidden_BCM, targets_BC, weights_BC = xs
        logits_BCV = output_logits(hidden_BCM, embedding_VM, soft_cap)
        added, _ = _chunk_loss(logits_BCV, targets_BC, weights_BC, z_loss, count_errors)
        return tuple(map(jnp.add, sums, added)), None

    zero = (jnp.float32(0),) * (2 + count_errors)
    return jax.lax.scan(add, zero, _chunks(chunk, hidden_BTM, targets_BT, weights_BT))[0]


def _chunk_loss(logits_BCV, targets_BC, weights_BC, z_loss, count_errors):
    """Weighted sums, see `cross_entropy`, and per token the log of the softmax's normaliser."""
    normaliser_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    nll = jnp.sum(weights_BC * (normaliser_BC - target_BC))
    loss = nll + z_loss * jnp.sum(weights_BC * jnp.square(normaliser_BC))
    if not count_errors:
        return (loss, nll), normaliser_BC
    wrong_BC = jnp.argmax(logits_BCV, axis=-1) != targets_BC
    return (loss, nll, jnp.sum(weights_BC * wrong_BC)), normaliser_BC


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """(B, T, ...) -> (T / chunk, B, chunk, ...) for each array."""

    def split(x):
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    return tuple(map(split, arrays))


def _cross_entropy_fwd(
    hidden_BTM, embedding_VM, targets_BT, weights_BT, soft_cap, z_loss, chunk, count_errors
):
    def gradients(carry, xs):
        *sums, d_embedding_MV = carry
        hidden_BCM, targets_BC, weights_BC = xs
        logits_BCV = output_logits(hidden_BCM, embedding_VM, soft_cap)
        added, normaliser_BC = _chunk_loss(logits_BCV, targets_BC, weights_BC, z_loss, count_errors)
        probs_BCV = jnp.exp(logits_BCV - normaliser_BC[..., None])
        onehot_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
        slope_BC1 = (1 + 2 * z_loss * normaliser_BC)[..., None]
        d_logits_BCV = (probs_BCV * slope_BC1 - onehot_BCV) * weights_BC[..., None]
        if soft_cap:
            d_logits_BCV *= 1 - jnp.square(logits_BCV / soft_cap)
        d_logits_BCV = d_logits_BCV.astype(hidden_BTM.dtype)
        d_hidden_BCM = in_own_dtype(jnp.matmul, d_logits_BCV, embedding_VM.astype(hidden_BTM.dtype))
        d_embedding_MV += jnp.einsum(
            "bcm,bcv->mv", hidden_BCM, d_logits_BCV, preferred_element_type=jnp.float32
        )
        return (*map(jnp.add, sums, added), d_embedding_MV), d_hidden_BCM

    zero = (jnp.float32(0),) * (2 + count_errors)
    # Transposed, as XLA on CPUs makes its sums faster in that order (`models.products.dense`).
    zero += (jnp.zeros(embedding_VM.shape[::-1], jnp.float32),)
    (*sums, d_embedding_MV), d_hidden = jax.lax.scan(
        gradients, zero, _chunks(chunk, hidden_BTM, targets_BT, weights_BT)
    )
    d_hidden_BTM = d_hidden.swapaxes(0, 1).reshape(hidden_BTM.shape)
    return tuple(sums), (d_hidden_BTM, d_embedding_MV.T.astype(embedding_VM.dtype))


def _cross_entropy_bwd(soft_cap, z_loss, chunk, count_errors, gradients, cotangents):
    d_hidden_BTM, d_embedding_VM = gradients
    d_loss, *_ = cotangents
    d_embedding_VM = (d_embedding_VM * d_loss).astype(d_embedding_VM.dtype)
    return (d_hidden_BTM * d_loss).astype(d_hidden_BTM.dtype), d_embedding_VM, None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
