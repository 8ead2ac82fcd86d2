"""Grouped-query attention: every implementation against the oracle, and the keys that kernels read.

Shapes: (batch, length, heads, size).
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import attention, cached_attention
from laser.attention.decode import BLOCK
from laser.attention.kernels import fused
from tests.attention.closeness import assert_close
from tests.attention.implementations import (
    CHUNKED,
    CUDNN,
    PALLAS,
    PALLAS_ONE_BLOCK,
    D,
    compiled,
    in_another_block,
    in_the_same_block,
    oracle,
    rounded,
)

HEADS, KV_HEADS = 4, 2


def inputs_of(tried, dtype=jnp.float32, kv_heads=KV_HEADS, seed=0, size=D):
    """query, key, value and a cotangent, float64 without what the dtype would round off."""
    rng = np.random.default_rng(seed)

    def normal(heads, size):
        return rng.normal(size=(2, tried.length, heads, size))

    d_v = tried.value_size
    shapes = [(HEADS, size), (kv_heads, size), (kv_heads, d_v), (HEADS, d_v)]
    return rounded([normal(*shape) for shape in shapes], dtype)


def repeated(inputs):
    """The same attention with a head of keys and values for every head of queries."""
    query, key, value, d_out = inputs
    group = query.shape[2] // key.shape[2]
    return [query, np.repeat(key, group, axis=2), np.repeat(value, group, axis=2), d_out]


def summed(found):
    """Gradients of repeated keys and values as those of the ones they were made of."""
    out, d_query, d_key, d_value = found

    def total(x):
        return x.reshape(*x.shape[:2], KV_HEADS, -1, x.shape[-1]).sum(3)

    return [out, d_query, total(d_key), total(d_value)]


CASES = [
    pytest.param(tried, kind, options, id=f"{tried.name}-{kind}-{name}", marks=marks)
    for tried, kind, name, options, marks in [
        (CHUNKED, "standard", "packed", {"segment_ids": CHUNKED.segments}, []),
        (CHUNKED, "laser", "packed", {"segment_ids": CHUNKED.segments, "logits_soft_cap": 5.0}, []),
        (CUDNN, "laser", "causal", {}, [pytest.mark.slow]),
        (PALLAS, "laser", "causal", {}, [pytest.mark.slow]),
        (PALLAS, "standard", "packed", {"segment_ids": PALLAS.segments}, [pytest.mark.slow]),
        (PALLAS_ONE_BLOCK, "laser", "causal", {}, [pytest.mark.slow]),
    ]
]


@pytest.mark.parametrize("tried, kind, options", CASES)
def test_equals_the_oracle_of_repeated_keys(tried, kind, options):
    inputs = inputs_of(tried)
    expected = summed(oracle(repeated(inputs), kind=kind, **options))
    if tried is CUDNN:  # one of them is enough to show that the oracle groups heads, too
        assert_close(oracle(inputs, kind=kind, **options), expected, 1e-12)
    assert_close(tried.run(inputs, kind=kind, **options)[0], expected, tried.tolerance)


def test_large_heads_equal_the_oracle():
    """Above a size of 128 the backward kernel adds in another order."""
    inputs, options = inputs_of(PALLAS_ONE_BLOCK, size=136), {"logits_scale": 136**-0.5}
    expected = summed(oracle(repeated(inputs), kind="standard", **options))
    found = PALLAS_ONE_BLOCK.run(inputs, kind="standard", **options)[0]
    assert_close(found, expected, PALLAS_ONE_BLOCK.tolerance)


@pytest.mark.parametrize(
    "tried",
    [CUDNN, *(pytest.param(tried, marks=pytest.mark.slow) for tried in (CHUNKED, PALLAS))],
    ids=lambda tried: tried.name,
)
@pytest.mark.parametrize("spoil", [in_the_same_block, in_another_block])
def test_outliers_are_exact(tried, spoil):
    inputs = inputs_of(tried)
    spoil(inputs[2][:, :, :1], tried)  # of one group
    actual, _ = tried.run(inputs, kind="laser")
    tolerance = tried.outlier_tolerances[jnp.float32]
    assert_close(actual, oracle(inputs, kind="laser"), tolerance)


@pytest.mark.slow
def test_a_groups_gradients_are_summed_before_they_are_rounded():
    """Of 4 heads whose dK and dV all but cancel, in bfloat16: the sum of rounded ones is lost."""
    tried = PALLAS
    query, key, value, d_out = inputs_of(tried, jnp.bfloat16, kv_heads=1)
    query = np.repeat(query[:, :, :1], HEADS, axis=2)
    d_out = np.repeat(d_out[:, :, :1], HEADS, axis=2) * np.array([1.0, -1.0, 1.0, -1.0])[:, None]
    d_out[:, :, 0] *= 1 + 2**-6
    inputs = rounded([query, key, value, d_out])
    exact = oracle(inputs, kind="standard")[3]
    grouped = tried.run(inputs, jnp.bfloat16, kind="standard")[0][3]
    apart = tried.run(repeated(inputs), jnp.bfloat16, kind="standard")[0][3]
    apart = apart.sum(axis=2, keepdims=True)
    error, error_apart = (np.linalg.norm(x - exact) for x in (grouped, apart))
    assert error < 0.5 * error_apart


def test_keys_and_values_are_never_repeated():
    """No array of the program has the keys of all heads of queries, forward or backward."""
    length, kv_heads, size = 64, 2, 128
    query = jax.ShapeDtypeStruct((1, length, 6, size), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, length, kv_heads, size), jnp.bfloat16)

    def run(query, key, value, d_out):
        call = functools.partial(
            fused.attention, kind="laser", logits_scale=0.1, causal=True, segment_ids=None,
            logits_soft_cap=None,
        )  # fmt: skip
        out, vjp, _ = jax.vjp(call, query, key, value, has_aux=True)
        return out, *vjp(d_out)

    lowered = jax.jit(run).trace(query, key, key, query).lower(lowering_platforms=("tpu",))
    calls = re.findall(r"@tpu_custom_call\(.*?\) \{.*kernel_name = \"(\w+)\".*: \((.*?)\) ->",
                       lowered.as_text())  # fmt: skip
    found = {name: operands.count("1x2x128x128xbf16") for name, operands in calls}
    assert found["laser_forward"] == 2
    assert found["laser_backward"] == 2


@pytest.mark.parametrize("kind", ["standard", "laser"])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_cache_of_grouped_heads_gives_the_whole(kind, queries):
    rng = np.random.default_rng(0)
    length = BLOCK + 9
    query = rng.normal(size=(2, length, HEADS, D))
    key, value = (rng.normal(size=(2, length, KV_HEADS, D)) for _ in range(2))
    value[0, 5] = 200.0
    expected = compiled(
        functools.partial(attention, return_range=True, implementation="reference"),
        False,
        kind=kind,
    )(None, *(jnp.float32(x) for x in (query, key, value, query)))[0][0]
    slots = 2 * BLOCK
    cached = [
        jnp.pad(jnp.float32(x), ((0, 0), (0, slots - length), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
        for x in (key, value)
    ]
    new = np.arange(length - queries, length)
    visible = np.broadcast_to(np.arange(slots) <= new[:, None], (2, queries, slots))
    out = cached_attention(
        jnp.float32(query[:, new]), *cached, jnp.asarray(visible), length, kind=kind
    )
    np.testing.assert_allclose(out, expected[:, new], rtol=2e-5, atol=2e-5)


def test_heads_that_do_not_divide_are_one_line():
    query, key = jnp.zeros((1, 4, 6, 8)), jnp.zeros((1, 4, 4, 8))
    with pytest.raises(ValueError, match="4 heads of keys must divide the 6 heads of queries"):
        attention(query, key, key, kind="laser")
    cache = jnp.zeros((1, 4, BLOCK, 8))
    with pytest.raises(ValueError, match="heads that divide its"):
        cached_attention(query, cache, cache, jnp.ones((1, 4, BLOCK), bool), 4, kind="laser")
