"""Standard and LASER attention, with the modifiers that the paper (arXiv 2411.03493) compares.

This package imports jax and nothing else of this repository, so that it can be copied or imported
on its own: `from laser.attention import attention`, or `dot_product_attention`, which takes what
jax.nn's function of that name takes. A copy is imported as `laser.attention`, too; under another
name its own imports have to be changed (docs/drop-ins.md#install).
"""

from laser.attention.decode import cached_attention
from laser.attention.dot_product import dot_product_attention
from laser.attention.interface import attention
from laser.attention.variants import (
    differential,
    head_norm,
    lambda_init,
    lambda_official,
    per_dim_temperature,
    qk_norm,
    rotary,
)

__all__ = [
    "attention",
    "cached_attention",
    "differential",
    "dot_product_attention",
    "head_norm",
    "lambda_init",
    "lambda_official",
    "per_dim_temperature",
    "qk_norm",
    "rotary",
]
