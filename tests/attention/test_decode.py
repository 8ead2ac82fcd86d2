"""Attention over a cache against the oracle, where values and probabilities are at their worst."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import attention, cached_attention
from laser.attention.decode import BLOCK

B, H, D = 2, 2, 8
LENGTH = BLOCK + 40
OUTLIERS = {  # position, and what is added to the values there
    "none": {},
    "late": {LENGTH - 2: 120.0},
    "many": {5: -200.0, 30: 300.0, BLOCK: 100.0, BLOCK + 3: -400.0, LENGTH - 1: 900.0},
}


def arrays(outliers, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(B, LENGTH, H, D)).astype(np.float32) for _ in range(3))
    for position, amount in outliers.items():
        value[:, position] += amount
    return (jnp.asarray(x, dtype) for x in (4 * query, key, value))


def cached(x_BTHD, capacity):
    padding = ((0, 0), (0, 0), (0, capacity - x_BTHD.shape[1]), (0, 0))
    return jnp.pad(x_BTHD.transpose(0, 2, 1, 3), padding)


def decode(query, key, value, start, stop, **options):
    """Queries from `start` to `stop`, after the keys and values before."""
    capacity = 4 * BLOCK
    visible = jnp.arange(capacity) <= jnp.arange(start, stop)[:, None]
    visible = jnp.broadcast_to(visible, (B, *visible.shape))
    key, value = cached(key, capacity), cached(value, capacity)
    # What lies beyond must not matter, whatever it is.
    key, value = (x.at[:, :, stop:].set(1e6) for x in (key, value))
    return cached_attention(query[:, start:stop], key, value, visible, stop, **options)


@pytest.mark.parametrize(
    "kind, soft_cap, outliers",
    [
        ("standard", 0.0, "none"),
        ("standard", 3.0, "many"),
        ("laser", 0.0, "none"),
        ("laser", 0.0, "late"),
        ("laser", 3.0, "many"),
    ],
)
def test_new_tokens_get_what_the_whole_row_gets(kind, soft_cap, outliers):
    query, key, value = arrays(OUTLIERS[outliers])
    options = {"kind": kind, "logits_soft_cap": soft_cap, "logits_scale": 0.7}
    expected = attention(query, key, value, implementation="reference", **options)
    pieces = [(0, BLOCK), (BLOCK, LENGTH - 2), (LENGTH - 2, LENGTH - 1), (LENGTH - 1, LENGTH)]
    outputs = [decode(query, key, value, *piece, **options) for piece in pieces]
    actual = jnp.concatenate(outputs, axis=1)
    # Sums of values of 900 that cancel are rounded in the sixth place of what remains.
    tolerance = 2e-5 if outliers == "many" else 5e-6
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_bfloat16_in_and_out():
    query, key, value = arrays({3: 50.0}, jnp.bfloat16)
    expected = attention(query, key, value, implementation="reference", kind="laser")
    actual = decode(query, key, value, BLOCK - 4, LENGTH, kind="laser")
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        actual.astype(jnp.float32), expected[:, BLOCK - 4 :].astype(jnp.float32), rtol=0.02
    )


@pytest.mark.parametrize("kind", ["standard", "laser"])
@pytest.mark.parametrize("queries", [1, 4])
def test_blocks_without_a_visible_key_change_no_bit(kind, queries):
    """Row 0 sees 30 slots; row 1, or a block that both skip, makes the loop go on."""
    query, key, value = arrays({7: 100.0})
    query, slots = query[:, :queries], jnp.arange(4 * BLOCK)
    visible = jnp.broadcast_to(slots < 30, (B, queries, 4 * BLOCK))
    caches = cached(key, 4 * BLOCK), cached(value, 4 * BLOCK)
    run = jax.jit(lambda visible, stop: cached_attention(query, *caches, visible, stop, kind=kind))
    alone = run(visible, 30)
    beside_longer = run(visible.at[1].set(slots < LENGTH), LENGTH)
    np.testing.assert_array_equal(alone[0], beside_longer[0])
    assert np.any(alone[1] != beside_longer[1])
    np.testing.assert_array_equal(alone, run(visible, 3 * BLOCK))


@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_a_stop_beyond_the_slots_counts_no_block_twice(kind):
    query, key, value = arrays({})
    caches = cached(key, 2 * BLOCK), cached(value, 2 * BLOCK)
    visible = jnp.broadcast_to(jnp.arange(2 * BLOCK) < LENGTH, (B, 1, 2 * BLOCK))
    call = functools.partial(cached_attention, query[:, -1:], *caches, visible, kind=kind)
    run = jax.jit(call)
    np.testing.assert_array_equal(run(2 * BLOCK + 1), run(2 * BLOCK))
    for stop in (2 * BLOCK + 1, jnp.int32(3 * BLOCK)):
        with pytest.raises(ValueError, match=f"stop={stop}: the cache has {2 * BLOCK} slots"):
            call(stop)


def test_shapes_that_do_not_fit_are_refused():
    query, key, value = arrays({})
    visible = jnp.ones((B, LENGTH, LENGTH), bool)
    with pytest.raises(ValueError, match="batch, heads, slots, size"):
        cached_attention(query, key, value, visible, 1, kind="laser")
    key, value = cached(key, LENGTH), cached(value, LENGTH)
    with pytest.raises(ValueError, match=f"a cache of {LENGTH} slots"):
        cached_attention(query, key, value, visible, 1, kind="laser")
    with pytest.raises(ValueError, match="kind='max'"):
        cached_attention(query, key, value, visible, 1, kind="max")
