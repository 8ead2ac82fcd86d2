"""How exact the products of exponentials have to be.

With bfloat16 inputs the functions here weigh values in float32, of which a TPU's matrix unit rounds
both factors to bfloat16 by default, and a GPU's to TF32. A value bears that: what is rounded away
is a share of it. exp(V) does not: for values near 0 it is near 1, and its rounding is larger than
what tells one key from another (V of standard deviation 0.05: 4 % of the output on a TPU). So its
products are asked for in full float32, unless whoever calls has chosen a precision
(`jax.default_matmul_precision`). CPUs know no other float32.
"""

from typing import Any

import jax


def device_of_program() -> Any:
    """One of those that the program is for: a jax.Device, or jax.sharding.AbstractDevice.

    Of the mesh in context, whose devices may only be described, else `jax.default_device`, else of
    this process. All have a `platform` and a `device_kind`.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device


def platform_of_program() -> str:
    """Such as "cpu", "gpu" or "tpu": of `device_of_program`."""
    return device_of_program().platform


def of_exponentials() -> jax.lax.Precision | None:
    """For `precision` of a product with exp(V), or with a gradient over it."""
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if chosen is not None or platform_of_program() == "cpu":
        return None
    return jax.lax.Precision.HIGHEST
