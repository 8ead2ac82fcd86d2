"""Products with weights, and activations: what XLA for CPUs has to be asked for in its own way.

All compute what their plain forms do. For accelerators they are the plain forms, but for `dense`.
"""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from laser.attention.products import platform_of_program

Array = jax.Array


def in_own_dtype(product: Callable[..., Array], x: Array, y: Array) -> Array:
    """product(x, y) of two arrays of one dtype, rounded to it once.

    CPUs are asked for a product of bfloat16 in float32, which is then rounded: accelerators do the
    same by themselves, and XLA for CPUs has no fast product with a result of bfloat16. (jax 0.10.2,
    one core with AMX, 4,096 x 256 by 256 x 1,024: 82 GFLOP/s, and 393 in this way.)

    Args:
      product: takes `preferred_element_type`, as `jax.lax.dot_general` and `jnp.matmul` do.
    """
    if _is_bfloat16_on_cpu(x):
        return product(x, y, preferred_element_type=jnp.float32).astype(x.dtype)
    return product(x, y)


def _is_bfloat16_on_cpu(x: Array) -> bool:
    return x.dtype == jnp.bfloat16 and platform_of_program() == "cpu"


@jax.custom_vjp
def dense(x: Array, weight: Array) -> Array:
    """x @ weight: (..., I) and (I, O) to (..., O), all of one dtype; not for forward mode.

    The weight's gradient is made from x and the output's, in this order. Left to jax it is made in
    the other and transposed, which XLA on CPUs does in up to three times the time. Precision of
    the backward pass is that in force where it is traced, see `models.stack.product_precision`.
    """
    return in_own_dtype(jnp.matmul, x, weight)


def _dense_fwd(x, weight):
    # Not `dense` itself, within which no policy of jax.checkpoint would find the product.
    return in_own_dtype(jnp.matmul, x, weight), (x, weight)


def _dense_bwd(kept, d_out):
    x, weight = kept
    leading = tuple(range(x.ndim - 1))
    over_leading = functools.partial(
        jax.lax.dot_general, dimension_numbers=((leading, leading), ((), ()))
    )
    return in_own_dtype(jnp.matmul, d_out, weight.T), in_own_dtype(over_leading, x, d_out)


dense.defvjp(_dense_fwd, _dense_bwd)


def heads_product(spec: str, x: Array, weight: Array) -> Array:
    """jnp.einsum of activations and a weight with dims of heads, both of one dtype, to that dtype.

    On CPUs its gradients are made as those of `dense`, and not for forward mode. Each letter of
    `spec` stands in two of its three terms.
    """
    if platform_of_program() == "cpu":
        return _heads_product(spec, x, weight)
    return jnp.einsum(spec, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _heads_product(spec, x, y):
    return in_own_dtype(functools.partial(jnp.einsum, spec), x, y)


def _heads_product_fwd(spec, x, y):
    return in_own_dtype(functools.partial(jnp.einsum, spec), x, y), (x, y)


def _heads_product_bwd(spec, kept, d_out):
    x, y = kept
    of_x, of_y, of_out = re.split(",|->", spec)
    d_x = _heads_product(f"{of_out},{of_y}->{of_x}", d_out, y)
    return d_x, _heads_product(f"{of_x},{of_out}->{of_y}", x, d_out)


_heads_product.defvjp(_heads_product_fwd, _heads_product_bwd)


def activation(function: Callable[[Array], Array], x: Array) -> Array:
    """function(x), an elementwise one, in the dtype of x.

    In bfloat16 on CPUs it is made in float32 and rounded once, and so is its gradient: left to XLA,
    all steps of both are rounded there, in a tenth of the time of a whole training step.
    """
    if _is_bfloat16_on_cpu(x):
        return _rounded_once(function, x)
    return function(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_once(function, x):
    return function(x.astype(jnp.float32)).astype(x.dtype)


def _rounded_once_fwd(function, x):
    return _rounded_once(function, x), x


def _rounded_once_bwd(function, x, d_out):
    _, backward = jax.vjp(function, x.astype(jnp.float32))
    (d_x,) = backward(d_out.astype(jnp.float32))
    return (d_x.astype(x.dtype),)


_rounded_once.defvjp(_rounded_once_fwd, _rounded_once_bwd)
