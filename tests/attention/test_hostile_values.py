"""Values up to the largest finite float32 and bfloat16, and beyond, by every implementation.

A key that a query may not see has no part in its output, nor in any gradient through it, whatever
finite value it has; LASER's outputs are right for every finite value that is seen, and standard
attention's up to half of the largest. A value that is not finite is seen in the outputs of the
queries that see it; an output that is finite is right all the same.

Each row of the batch and each feature has a value of its own, 200 in all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import attention, cached_attention, cudnn
from laser.attention.decode import BLOCK
from laser.attention.kernels import fused
from laser.attention.kernels.blocks import BlockSizes

pytestmark = pytest.mark.slow  # every form of the kernels, in two dtypes, is compiled

B, T, H, D = 25, 44, 1, 8
FIRST, FROM = 8, 26  # within a chunk, a block and a tile
SEGMENTS = np.tile(np.repeat([0, 1, 2], [FIRST, 20, T - FIRST - 20]), (B, 1)).astype(np.int32)
SIZES = {"one-block": BlockSizes(48, 24, 24), "blocks": BlockSizes(16, 16, 16)}
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
KINDS = pytest.mark.parametrize("kind", ["standard", "laser"])
PACKINGS = {
    "": {},
    "packed": {"segment_ids": SEGMENTS},
    "shared": {"segment_ids": SEGMENTS, "shared_segment": 0},
}
CASES = pytest.mark.parametrize(
    ("implementation", "packing"),
    [
        *(("chunked", packing) for packing in PACKINGS),
        *((sizes, packing) for sizes in SIZES for packing in ("", "packed")),
        ("cudnn", ""),
    ],
)


def call(implementation, query, key, value, *, kind, segment_ids=None, **options):
    if implementation in ("chunked", "reference"):
        options = {"kind": kind, "segment_ids": segment_ids, **options}
        return attention(query, key, value, implementation=implementation, **options)
    given = {"kind": kind, "logits_scale": D**-0.5, "causal": True, "segment_ids": segment_ids}
    given["logits_soft_cap"] = None
    if implementation == "cudnn":
        return cudnn.attention(query, key, value, library="xla", **given)[0]
    sizes = SIZES[implementation]
    return fused.attention(query, key, value, sizes=sizes, interpret=True, **given)[0]


@functools.cache
def compiled(implementation, packing, kind):
    def run(query, key, value, d_out):
        function = functools.partial(call, implementation, kind=kind, **PACKINGS[packing])
        out, vjp = jax.vjp(function, query, key, value)
        return out, *vjp(d_out.astype(out.dtype))

    return jax.jit(run)


def run(implementation, packing, kind, inputs, dtype):
    found = compiled(implementation, packing, kind)(*(jnp.asarray(x, dtype) for x in inputs))
    return [np.asarray(x, np.float64) for x in found]


def oracle(packing, kind, inputs):
    with jax.enable_x64(True):
        return run("reference", packing, kind, inputs, jnp.float64)


def make_inputs(dtype, seed=0):
    """query, key, value and a cotangent, of float64, without what the dtype would round off."""
    rng = np.random.default_rng(seed)
    shapes = 4 * [(B, T, H, D)]
    arrays = [rng.normal(size=shape) for shape in shapes]
    return [np.array(jnp.asarray(x, dtype), np.float64) for x in arrays]


def hostile(dtype, seed=1):
    """200 values of either sign, (B, D): the largest, and others of all magnitudes from 1 on."""
    rng = np.random.default_rng(seed)
    largest = float(jnp.finfo(dtype).max)
    values = np.exp(rng.uniform(0, np.log(largest), size=(B, D))) * rng.choice([-1, 1], (B, D))
    values[:2] = [[largest], [-largest]]
    return np.array(jnp.asarray(values, dtype), np.float64)


def spoilt(value, amounts, dtype, seed=2):
    """`value` with the amounts, each made a little smaller, at most positions from FROM on."""
    rng = np.random.default_rng(seed)
    where = rng.random((B, T, 1, 1)) < 0.7
    where[:, :FROM] = False
    smaller = amounts[:, None, None] * rng.uniform(0.8, 1, size=value.shape)
    return np.where(where, np.array(jnp.asarray(smaller, dtype), np.float64), value)


def assert_near(found, expected, tolerance):
    """Each (batch, feature) of its own size: what is huge must not hide the rest."""
    scale = np.maximum(np.abs(expected), 1)
    assert np.isfinite(found).all()
    np.testing.assert_array_less(np.abs(found - expected) / scale, tolerance)


def assert_rows_near(found, expected, tolerance):
    """Relative in the norm of each row of the batch; nothing but 0 where nothing is expected."""
    assert np.isfinite(found).all()
    error, size = (np.sqrt(np.square(x).sum((1, 2, 3))) for x in (found - expected, expected))
    np.testing.assert_array_less(error, tolerance * size + 1e-30)


@DTYPES
@KINDS
@CASES
def test_what_a_query_does_not_see_changes_nothing(implementation, packing, kind, dtype):
    """Outputs of queries before FROM, in all but the first segment of a packed row."""
    query, key, value, d_out = make_inputs(dtype)
    value = spoilt(value, hostile(dtype) / 2, dtype)
    d_out[:, FROM:] = 0
    if packing == "packed":  # an earlier document
        value[:, :FIRST] = hostile(dtype, seed=3)[:, None, None] / 2
        d_out[:, :FIRST] = 0
    judged = np.s_[:, FIRST:FROM] if packing == "packed" else np.s_[:, :FROM]
    inputs = (query, key, value, d_out)
    found = run(implementation, packing, kind, inputs, dtype)
    expected = oracle(packing, kind, inputs)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert_near(found[0][judged], expected[0][judged], tolerance)
    for actual, exact in zip(found[1:], expected[1:], strict=True):
        assert_rows_near(actual, exact, tolerance)
        assert not actual[:, FROM:].any()


@DTYPES
@CASES
def test_laser_is_right_for_every_finite_value(implementation, packing, dtype):
    query, key, value, d_out = make_inputs(dtype)
    inputs = (query, key, spoilt(value, hostile(dtype), dtype), d_out)
    found = run(implementation, packing, "laser", inputs, dtype)
    expected = oracle(packing, "laser", inputs)
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    assert_near(found[0], expected[0], tolerance)
    for actual, exact in zip(found[1:], expected[1:], strict=True):
        assert_rows_near(actual, exact, 5 * tolerance)


@DTYPES
@CASES
def test_laser_of_one_value_is_that_value(implementation, packing, dtype):
    """Up to the largest; gradients are those of probabilities, whatever the value."""
    query, key, value, d_out = make_inputs(dtype)
    value[:] = hostile(dtype)[:, None, None]
    inputs = (query, key, value, d_out)
    found = run(implementation, packing, "laser", inputs, dtype)
    np.testing.assert_allclose(found[0], value, rtol=1e-5 if dtype == jnp.float32 else 1e-2)
    expected = oracle(packing, "standard", inputs)[3]
    assert_rows_near(found[3], expected, 1e-3 if dtype == jnp.float32 else 2e-2)


def decoded(inputs, dtype, kind, queries):
    """The last tokens' outputs of a cache whose other slots hold what must not matter."""
    capacity = 2 * BLOCK
    query, key, value = (jnp.asarray(x, dtype) for x in inputs)
    unused = jnp.asarray([np.inf, jnp.finfo(dtype).max, np.nan, -jnp.inf], dtype)
    room = jnp.tile(unused, capacity // 4)[None, None, :, None]
    caches = [
        jnp.broadcast_to(fill, (B, H, capacity, D)).at[:, :, :T].set(x.transpose(0, 2, 1, 3))
        for x, fill in ((key, jnp.zeros_like(room)), (value, room))
    ]
    visible = jnp.arange(capacity) <= jnp.arange(T - queries, T)[:, None]
    visible = jnp.broadcast_to(visible, (B, queries, capacity))
    run = jax.jit(functools.partial(cached_attention, kind=kind))
    return np.asarray(run(query[:, T - queries :], *caches, visible, T), np.float64)


@DTYPES
@KINDS
@pytest.mark.parametrize("queries", [1, 18])  # with a token that some of them do not see
def test_decoding_is_right_for_every_finite_value(queries, kind, dtype):
    query, key, value, d_out = make_inputs(dtype)
    amounts = hostile(dtype) / (2 if kind == "standard" else 1)
    value = spoilt(value, amounts, dtype)
    expected = oracle("", kind, (query, key, value, d_out))[0][:, T - queries :]
    found = decoded((query, key, value), dtype, kind, queries)
    # Of standard attention some outputs are small differences of huge values.
    size = oracle("", "standard", (query, key, np.abs(value), d_out))[0][:, T - queries :]
    scale = size if kind == "standard" else np.maximum(np.abs(expected), 1)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_array_less(np.abs(found - expected), tolerance * scale)


@KINDS
@pytest.mark.parametrize("bad", [np.inf, np.nan, -np.inf])
@pytest.mark.parametrize("implementation", ["chunked", *SIZES, "cudnn"])
def test_a_value_that_is_not_finite_shows_and_does_not_mislead(implementation, bad, kind):
    inputs = make_inputs(jnp.float32)
    inputs[2][:, FROM, :, ::2] = bad
    found = run(implementation, "", kind, inputs, jnp.float32)[0]
    if kind == "standard" or bad != -np.inf:  # of which LASER's exponential is 0
        assert not np.isfinite(found[:, FROM:, :, ::2]).any()
    inputs[2][:, FROM, :, ::2] = -1e9 if kind == "laser" else 0  # as good as -inf, or not there
    expected = oracle("", kind, inputs)[0]
    judged = np.isfinite(found)
    np.testing.assert_allclose(found[judged], expected[judged], rtol=1e-4, atol=1e-4)
    if implementation == "blocks":
        assert judged[:, : FROM // 16 * 16].all()
    if implementation == "chunked" and kind == "laser":
        assert judged[:, :FROM].all()


@KINDS
def test_decoding_shows_a_visible_value_that_is_not_finite(kind):
    query, key, value, _ = make_inputs(jnp.float32)
    for bad in (np.inf, np.nan):
        value[:, FROM, :, 0] = bad
        out = decoded((query, key, value), jnp.float32, kind, 1)
        assert not np.isfinite(out[..., 0]).any()
        assert np.isfinite(out[..., 1:]).all()
