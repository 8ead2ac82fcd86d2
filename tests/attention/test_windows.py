"""Sliding windows in the fused kernels: what they compute, and what they leave out.

Shapes: (batch, length, heads, size).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import dot_product_attention
from laser.attention.kernels.blocks import BlockSizes, block_sizes, in_window
from laser.attention.kernels.common import Options
from tests.attention.closeness import assert_close
from tests.attention.implementations import (
    CUDNN,
    OUTLIERS,
    PALLAS,
    PALLAS_ONE_BLOCK,
    PALLAS_ONE_TILE,
    rounded,
)

# Blocks of 32 in tiles of 16, of 90 positions: within a tile, over one or two blocks, and of which
# some blocks are seen whole.
WINDOWS = {
    "short": {"causal": True, "window": (7, 0)},
    "long": {"causal": True, "window": (70, 3)},
    "both-sides": {"causal": False, "window": (40, 10)},
    "after": {"causal": False, "window": (0, 70)},
}
CASES = [
    pytest.param(tried, kind, heads, WINDOWS[name], id=f"{tried.name}-{kind}-{name}", marks=marks)
    for tried, kind, heads, name, marks in [
        (PALLAS, "laser", 2, "short", [pytest.mark.slow]),
        (PALLAS_ONE_TILE, "laser", 1, "long", [pytest.mark.slow]),
        (PALLAS, "laser", 2, "both-sides", [pytest.mark.slow]),
        (PALLAS, "standard", 1, "both-sides", [pytest.mark.slow]),
        (PALLAS_ONE_TILE, "standard", 2, "after", []),
        (PALLAS_ONE_BLOCK, "standard", 1, "short", [pytest.mark.slow]),
        (CUDNN, "laser", 1, "short", [pytest.mark.slow]),
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
    if tried is PALLAS_ONE_TILE:  # the quickest to compile
        inputs = rounded(inputs)
        found = tried.run(inputs, jnp.bfloat16, kind=kind, **options)[0]
        assert_close(found, oracle(inputs, kind, **options), 2e-2)


LASER = [case for case in CASES if case.values[1] == "laser"]


@pytest.mark.parametrize("tried, kind, kv_heads, options", LASER)
@pytest.mark.parametrize("spoil", OUTLIERS, ids=lambda spoil: spoil.__name__)
@pytest.mark.slow
def test_outliers_are_exact(tried, kind, kv_heads, options, spoil):
    inputs = grouped(tried, kv_heads)
    spoil(inputs[2], tried)
    inputs = rounded(inputs, jnp.float32)
    actual = tried.run(inputs, kind=kind, **options)[0]
    tolerance = tried.outlier_tolerances[jnp.float32]
    assert_close(actual, oracle(inputs, kind, **options), tolerance)


@pytest.mark.slow
def test_the_gradient_knows_the_values_of_all_blocks():
    """Values fall along the sequence, so that the last block does not show how large some are."""
    tried, options = PALLAS_ONE_TILE, WINDOWS["short"]
    inputs = grouped(tried, 1)
    inputs[2] += np.maximum(0, 40 - 1.2 * np.arange(tried.length))[:, None, None]
    inputs = rounded(inputs)
    found = tried.run(inputs, jnp.bfloat16, kind="laser", **options)[0]
    assert_close(found, oracle(inputs, "laser", **options), 2e-2)


@pytest.mark.slow
def test_no_earlier_token_out_of_reach_changes_a_bit():
    """Nor a later one. What it is matters to no block of queries that does not meet its block."""
    inputs = grouped(PALLAS, 2)
    options = {"kind": "laser", **WINDOWS["short"]}
    before, _ = PALLAS.run(inputs, **options)
    changed = [x.copy() for x in inputs]
    changed[1][:, 0] *= -5
    changed[2][:, 0] = 300.0
    after, _ = PALLAS.run(changed, **options)
    np.testing.assert_array_equal(before[0][:, 64:], after[0][:, 64:])
    np.testing.assert_allclose(before[0][:, 8:], after[0][:, 8:], atol=2e-6)
    for a, b in zip(before[1:], after[1:], strict=True):
        np.testing.assert_allclose(a[:, 16:], b[:, 16:], atol=1e-5)
    assert not np.array_equal(before[0][:, :8], after[0][:, :8])


def options_of(sizes, causal, window):
    return Options(
        laser=True, causal=causal, scale=1.0, soft_cap=0.0, block=sizes.block, tile=sizes.tile,
        backward_tile=sizes.backward_tile, window=window,
    )  # fmt: skip


def tiles_met(options, blocks):
    """(query block, key block, query tile, key tile, edges) of all pieces of the kernels."""
    for query in range(blocks):
        for low, high in options.pieces(blocks):
            for key in range(blocks):
                if low <= query - key <= high:
                    for tile in range(options.tiles):
                        for other in options.pairs(tile, False, low):
                            assert tile in options.pairs(other, False, low, queries_of_key=True)
                            yield query, key, tile, other, options.edges(tile, other, low)


@pytest.mark.parametrize("causal, window", [(True, (7, 0)), (True, (40, 9)), (False, (0, 33)),
                                            (False, (70, 20)), (False, (500, 31)), (True, (0, 0)),
                                            (True, (17, 0)), (False, (1, 17)),
                                            (False, (32, 32))])  # fmt: skip
@pytest.mark.parametrize("sizes", [BlockSizes(32, 16, 16), BlockSizes(32, 32, 32)])
def test_tiles_and_edges_are_the_window(causal, window, sizes):
    """Each visible pair of positions is met once, and no other."""
    options, blocks = options_of(sizes, causal, window), 5
    length, rows = blocks * sizes.block, np.arange(sizes.tile)
    met = np.zeros((length, length), int)
    for query, key, tile, other, (most, least) in tiles_met(options, blocks):
        seen = np.ones((sizes.tile, sizes.tile), int)
        distance = rows[:, None] - rows
        seen[distance > (length if most is None else most)] = 0
        seen[distance < (-length if least is None else least)] = 0
        q, k = query * sizes.block + tile * sizes.tile, key * sizes.block + other * sizes.tile
        met[q : q + sizes.tile, k : k + sizes.tile] += seen
    distance = np.arange(length)[:, None] - np.arange(length)
    visible = (distance <= window[0]) & (distance >= (0 if causal else -window[1]))
    np.testing.assert_array_equal(met, visible)


def test_tiles_out_of_the_window_are_not_computed():
    """A causal window of 256 at length 4096: 7 of a block's 16 tiles, and 1 of the block before."""
    sizes = in_window(block_sizes(4096, 128, 128, 2), (256, 0))
    assert (sizes.block, sizes.tile) == (1024, 256)
    options = options_of(sizes, True, (256, 0))
    assert options.pieces(4) == [(0, 0), (1, 1)]
    assert len(list(tiles_met(options, 4))) == 4 * 7 + 3
