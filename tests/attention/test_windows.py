"""Sliding windows in the fused kernels: what they compute, and what they leave out.

Shapes: (batch, length, heads, size).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import dot_product_attention
from tests.attention.closeness import assert_close
from tests.attention.implementations import CUDNN, OUTLIERS, PALLAS, PALLAS_ONE_BLOCK, rounded

# Blocks of 32 in tiles of 16, of 90 positions: within a tile, over one or two blocks, and of which
# some blocks are seen whole.
WINDOWS = {
    "short": {"causal": True, "window": (7, 0)},
    "long": {"causal": True, "window": (70, 3)},
    "both-sides": {"causal": False, "window": (40, 20)},
    "after": {"causal": False, "window": (0, 70)},
}
CASES = [
    pytest.param(tried, kind, heads, WINDOWS[name], id=f"{tried.name}-{kind}-{name}", marks=marks)
    for tried, kind, heads, name, marks in [
        (PALLAS, "laser", 2, "short", []),
        (PALLAS, "laser", 1, "long", [pytest.mark.slow]),
        (PALLAS, "laser", 2, "both-sides", [pytest.mark.slow]),
        (PALLAS, "standard", 1, "both-sides", []),
        (PALLAS, "standard", 2, "after", [pytest.mark.slow]),
        (PALLAS_ONE_BLOCK, "laser", 1, "short", [pytest.mark.slow]),
        (CUDNN, "laser", 1, "short", []),
    ]
]


def grouped(tried, kv_heads, dtype=jnp.float32):
    query, key, value, d_out = tried.inputs(dtype=dtype)
    return [query, key[:, :, :kv_heads], value[:, :, :kv_heads], d_out]


@functools.cache
def formulas(kind, causal, window):
    def run(query, key, value, d_out):
        call = functools.partial(
            dot_product_attention, kind=kind, is_causal=causal, local_window_size=window,
            implementation="reference",
        )  # fmt: skip
        out, vjp = jax.vjp(call, query, key, value)
        return out, *vjp(d_out)

    return jax.jit(run)


def oracle(inputs, kind, causal, window):
    with jax.enable_x64(True):
        return [np.asarray(x) for x in formulas(kind, causal, window)(*map(jnp.asarray, inputs))]


@pytest.mark.parametrize("tried, kind, kv_heads, options", CASES)
def test_equals_the_oracle(tried, kind, kv_heads, options):
    inputs = grouped(tried, kv_heads)
    expected = oracle(inputs, kind, **options)
    assert_close(tried.run(inputs, kind=kind, **options)[0], expected, 3 * tried.tolerance)
    inputs = rounded(inputs)
    found = tried.run(inputs, jnp.bfloat16, kind=kind, **options)[0]
    assert_close(found, oracle(inputs, kind, **options), 2e-2)


@pytest.mark.parametrize("tried, kind, kv_heads, options", CASES)
@pytest.mark.parametrize("spoil", OUTLIERS, ids=lambda spoil: spoil.__name__)
@pytest.mark.slow
def test_outliers_are_exact(tried, kind, kv_heads, options, spoil):
    if kind == "standard":
        pytest.skip("LASER's")
    inputs = grouped(tried, kv_heads)
    spoil(inputs[2], tried)
    inputs = rounded(inputs, jnp.float32)
    actual = tried.run(inputs, kind=kind, **options)[0]
    tolerance = tried.outlier_tolerances[jnp.float32]
    assert_close(actual, oracle(inputs, kind, **options), tolerance)
