"""Every implementation against the float64 oracle: values, gradients, outliers, bits.

What one of them alone can do, or cannot, is in test_attention.py, test_kernels.py, test_cudnn.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import chunked
from laser.attention.kernels import fused
from tests.attention.closeness import NAMES, assert_close
from tests.attention.implementations import (
    CHUNKED,
    CUDNN,
    FAR_APART,
    IMPLEMENTATIONS,
    OUTLIERS,
    PALLAS,
    PALLAS_ONE_BLOCK,
    PALLAS_ONE_TILE,
    oracle,
    rounded,
    wide,
)

# The interpreter of the kernels takes seconds to compile for each new set of options.
QUICK = {"laser", "causal", "", "1.0"}
# Of the others what is like something that is quick: options alone, lengths within one block.
ALIKE = {"full", "shared-segment", "soft-cap", "1", "5", "128", "256"}
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


def each(*choices, tried=IMPLEMENTATIONS):
    """Parameters: every implementation of `tried` with what `choices` give for it, by name."""
    parameters = []
    for one in tried:
        for chosen in itertools.product(*(choice(one).items() for choice in choices)):
            names = [str(name) for name, _ in chosen]
            slow = one is PALLAS_ONE_BLOCK or not ALIKE.isdisjoint(names)
            slow |= one is PALLAS and not QUICK.issuperset(names)
            parameters.append(
                pytest.param(
                    one, *(value for _, value in chosen),
                    id="-".join([one.name, *names]), marks=[pytest.mark.slow] * slow,
                )
            )  # fmt: skip
    return parameters


def kinds(tried):
    return {kind: kind for kind in tried.kinds}


def options(tried):
    return tried.options


def packings(tried):
    return {"": None} | ({} if tried.segments is None else {"packed": tried.segments})


def value_stds(tried):
    return {std: std for std in tried.value_stds}


def lengths(tried):
    return {length: length for length in tried.lengths}


@pytest.mark.parametrize("tried, kind, given", each(kinds, options))
def test_equals_the_oracle(tried, kind, given):
    inputs = tried.inputs(logits_scale=2.0)
    expected = oracle(inputs, kind=kind, **given)
    assert_close(tried.run(inputs, kind=kind, **given)[0], expected, tried.tolerance)


@pytest.mark.parametrize("tried, length", each(lengths))
def test_any_length(tried, length):
    inputs = tried.inputs(length=length)
    actual, expected = tried.run(inputs, kind="laser")[0], oracle(inputs, kind="laser")
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tried, segment_ids, value_std", each(packings, value_stds))
@pytest.mark.parametrize("spoil", OUTLIERS, ids=lambda spoil: spoil.__name__)
def test_outliers_are_exact(spoil, tried, segment_ids, value_std):
    options = {"kind": "laser", "segment_ids": segment_ids}
    for dtype, tolerance in tried.outlier_tolerances.items():
        inputs = tried.inputs(value_std, dtype=dtype)
        spoil(inputs[2], tried)
        inputs = rounded(inputs, dtype)
        actual, range_nats = tried.run(inputs, dtype, **options)
        assert_close(actual, oracle(inputs, **options), tolerance)
        if spoil in FAR_APART:
            assert range_nats > chunked.RANGE_LIMIT_NATS
        if spoil in FAR_APART and tried in (PALLAS, PALLAS_ONE_BLOCK):
            assert range_nats == np.float32(fused.LARGEST_RANGE)  # the exact path ran


@pytest.mark.parametrize("tried", each())
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_stay_so(tried, bad):
    inputs = tried.inputs()
    inputs[2][0, tried.late, 0, 0] = bad
    out = tried.output(inputs, kind="laser")
    assert not np.isfinite(out[0, tried.late :, 0, 0]).any()
    block = chunked.chunk_length(tried.length) if tried is CUDNN else tried.block
    before = tried.late // block * block
    assert np.isfinite(out[0, :before]).all()
    if tried in (CHUNKED, CUDNN):  # no other feature or head is touched
        out[0, before:, 0, 0] = 0
        assert np.isfinite(out).all()


@pytest.mark.parametrize("tried, kind", each(kinds))
@DTYPES
def test_no_later_token_changes_earlier_blocks_by_a_bit(tried, kind, dtype):
    inputs = tried.inputs()
    before = tried.output(inputs, dtype, kind=kind)
    start = tried.late // tried.block * tried.block
    for at in (start, start + 2, tried.late):
        changed = [x.copy() for x in inputs]
        for x in changed[:3]:
            x[:, at:] *= -3
        changed[2][:, at:] += 300.0
        after = tried.output(changed, dtype, kind=kind)
        assert not np.array_equal(before[:, at:], after[:, at:])
        np.testing.assert_array_equal(before[:, :start], after[:, :start])
        if dtype == jnp.float32:
            np.testing.assert_allclose(before[:, :at], after[:, :at], atol=2e-6)


@pytest.mark.parametrize("tried", each(tried=(CHUNKED, PALLAS)))
def test_a_later_value_in_range_changes_nothing_by_a_bit(tried):
    """The reference moves by a power of two, which rounds nothing, within the block as well."""
    at = tried.middle + 1
    inputs = tried.inputs()
    changed = [x.copy() for x in inputs]
    changed[2][:, at:] += 20.0
    before, after = (tried.output(x, kind="laser") for x in (inputs, changed))
    np.testing.assert_array_equal(before[:, :at], after[:, :at])


@pytest.mark.parametrize("tried, kind", each(kinds, tried=(CHUNKED, PALLAS, CUDNN)))
@pytest.mark.slow
def test_no_gradient_reaches_later_tokens_or_other_segments(tried, kind):
    query, key, value, d_out = tried.inputs()
    wide(value, tried)
    row, at = 0, tried.late
    d_out[:] = 0
    d_out[row, at] = 1.0
    segments = tried.segments
    found, _ = tried.run((query, key, value, d_out), kind=kind, segment_ids=segments)
    reachable = np.zeros((2, tried.length), bool)
    reachable[row, : at + 1] = segments is None or segments[row, : at + 1] == segments[row, at]
    for name, gradient in zip(NAMES[1:], found[1:], strict=True):
        assert np.all(gradient[~reachable] == 0), name
    assert np.all(found[3][reachable].any(axis=(1, 2)))


@pytest.mark.parametrize("tried", each(tried=(CHUNKED, PALLAS_ONE_TILE, CUDNN)))
@pytest.mark.slow
def test_under_scan_remat_and_vmap(tried):
    length = 40 if tried is PALLAS_ONE_TILE else tried.length
    query, key, value, _ = (jnp.float32(x) for x in tried.inputs(length=length))

    def layer(query, key, value):
        return tried.call(query, key, value, kind="laser")[0]

    def loss(value, wrap):
        def body(carry, _):
            return layer(query, key, carry), None

        return jnp.square(jax.lax.scan(wrap(body), value, None, length=2)[0]).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(value, lambda f: f)
    np.testing.assert_allclose(gradient(value, jax.checkpoint), plain, rtol=1e-5, atol=1e-5)
    one = jax.jit(layer)
    one_at_a_time = jnp.stack([one(*(x[i : i + 1] for x in (query, key, value))) for i in (0, 1)])
    mapped = jax.jit(jax.vmap(layer))(query[:, None], key[:, None], value[:, None])
    rounding = 1e-5 if tried is CHUNKED else 0  # XLA batches its products
    np.testing.assert_allclose(mapped, one_at_a_time, rtol=rounding, atol=rounding)
