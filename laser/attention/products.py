"""How exact the products of exponentials have to be, and how those of bfloat16 are asked for.

With bfloat16 inputs the functions here weigh values in float32, of which a TPU's matrix unit rounds
both factors to bfloat16 by default, and a GPU's to TF32. A value bears that: what is rounded away
is a share of it. exp(V) does not: for values near 0 it is near 1, and its rounding is larger than
what tells one key from another (V of standard deviation 0.05: 4 % of the output on a TPU). So its
products are asked for in full float32, unless whoever calls has chosen a precision
(`jax.default_matmul_precision`). CPUs know no other float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def platform_of_program() -> str:
    """Of the mesh in context, whose devices may only be described, else of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def of_exponentials() -> jax.lax.Precision | None:
    """For `precision` of a product with exp(V), or with a gradient over it."""
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if chosen is not None or platform_of_program() == "cpu":
        return None
    return jax.lax.Precision.HIGHEST


def in_own_dtype(product: Callable[..., jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """product(x, y) of two arrays of one dtype, rounded to it once.

    CPUs are asked for a product of bfloat16 in float32, which is then rounded: accelerators do the
    same by themselves, and XLA for CPUs has no fast product with a result of bfloat16. (jax 0.10.2,
    one core with AMX, 4,096 x 256 by 256 x 1,024: 82 GFLOP/s, and 393 in this way.)

    Args:
      product: takes `preferred_element_type`, as `jax.lax.dot_general` and `jnp.matmul` do.
    """
    if x.dtype == jnp.bfloat16 and platform_of_program() == "cpu":
        return product(x, y, preferred_element_type=jnp.float32).astype(x.dtype)
    return product(x, y)
