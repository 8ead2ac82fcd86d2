"""The modifiers that the paper applies to standard and LASER attention alike: functions of arrays.

Each works on queries and keys before the attention function, or on its outputs after it, so every
combination of them is a composition. The parameters belong to the caller (models/layers.py).

Shapes: B batch, T positions, H heads, D size of a query, or of a value where said.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def per_dim_temperature(query: Array, log_temperature_D: Array) -> Array:
    """Q diag(softplus(p)) / softplus(0): a trained temperature for every query dimension.

    The paper's logits are Q D Kᵀ/√d with D = diag(softplus(p)). Dividing by softplus(0) = ln 2, as
    praxis' PerDimScale does, makes p = 0 start at exactly 1/√d. (B, T, H, D), (D,) -> (B, T, H, D).
    """
    at_zero = jax.nn.softplus(jnp.zeros_like(log_temperature_D))
    return (query * (jax.nn.softplus(log_temperature_D) / at_zero)).astype(query.dtype)


def qk_norm(x: Array, scale_D: Array, bias_D: Array, epsilon: float = 1e-6) -> Array:
    """LayerNorm over the size of each head, in float32 (paper: LayerNorm(Q) LayerNorm(K)ᵀ/√d).

    (B, T, H, D), (D,), (D,) -> (B, T, H, D) in the dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    x32 -= x32.mean(-1, keepdims=True)
    x32 *= jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + epsilon)
    return (x32 * scale_D + bias_D).astype(x.dtype)


def rotary(x: Array, positions_BT: Array, max_wavelength: float = 10_000.0) -> Array:
    """Rotary position embedding (arXiv 2104.09864), halves rotated against each other, in float32.

    (B, T, H, D) with even D, (B, T) int -> (B, T, H, D) in the dtype of `x`.
    """
    half = x.shape[-1] // 2
    frequency = max_wavelength ** (-jnp.arange(half) / half)
    angle_BT1F = positions_BT[:, :, None, None] * frequency
    sin, cos = jnp.sin(angle_BT1F), jnp.cos(angle_BT1F)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def lambda_init(layer: Array | int) -> Array:
    """0.8 - 0.6 exp(-0.3 · layer), layers counted from 0 (arXiv 2410.05258, section 2.1)."""
    return 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(layer, jnp.float32))


def lambda_official(vectors_4D: Array, initial: Array) -> Array:
    """exp(q₁·k₁) - exp(q₂·k₂) + λ_init (arXiv 2410.05258, eq. 2), of (q₁, k₁, q₂, k₂). A scalar."""
    q1, k1, q2, k2 = vectors_4D
    return jnp.exp(jnp.vdot(q1, k1)) - jnp.exp(jnp.vdot(q2, k2)) + initial


def differential(first: Array, second: Array, lambda_: Array) -> Array:
    """first - λ · second, the difference of two attention outputs over the same values.

    For LASER the outputs are logarithms (paper, section 4.4): log(A₁ exp V) - λ log(A₂ exp V).
    Two (B, T, H, D) with D the size of a value, and a scalar -> (B, T, H, D).
    """
    difference = first.astype(jnp.float32) - lambda_ * second.astype(jnp.float32)
    return difference.astype(first.dtype)


def head_norm(x: Array, scale_D: Array, initial: Array, epsilon: float = 1e-5) -> Array:
    """(1 - λ_init) · RMSNorm(x) over the size of each head, in float32 (arXiv 2410.05258, eq. 3).

    (B, T, H, D), (D,), scalar -> (B, T, H, D) in the dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + epsilon) * scale_D
    return (x32 * (1 - initial)).astype(x.dtype)
