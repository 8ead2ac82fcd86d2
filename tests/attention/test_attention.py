"""The default attention against the float64 oracle: values, gradients, outliers, causality by bits.

Shapes: (batch, length, heads, size).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import attention, chunked
from tests.attention.closeness import NAMES, assert_close, errors

B, T, H, D_QK, D_V = 2, 300, 2, 8, 16  # three chunks, the last one ragged


def make_inputs(value_std=1.0, logits_scale=1.0, seed=0, length=T):
    """query, key, value and a cotangent, float64."""
    rng = np.random.default_rng(seed)
    query, key = (rng.normal(size=(B, length, H, D_QK)) * logits_scale for _ in range(2))
    value, d_out = (rng.normal(size=(B, length, H, D_V)) for _ in range(2))
    return query, key, value * value_std, d_out


def make_segments(length=T):
    ids = np.repeat(np.arange(4), [37, 100, 90, length])[:length]
    return np.stack([ids, ids[::-1]]).astype(np.int32)


def run(inputs, dtype, **options):
    """Output and gradients as float64 arrays."""
    query, key, value, d_out = (jnp.asarray(x, dtype) for x in inputs)

    @jax.jit
    def value_and_gradients(query, key, value, d_out):
        out, vjp = jax.vjp(lambda *x: attention(*x, **options), query, key, value)
        return out, *vjp(d_out.astype(out.dtype))

    return [np.asarray(x, np.float64) for x in value_and_gradients(query, key, value, d_out)]


def oracle(inputs, **options):
    with jax.enable_x64(True):
        return run(inputs, jnp.float64, implementation="reference", **options)


@pytest.mark.parametrize("kind", ["standard", "laser"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"segment_ids": make_segments()},
        {"segment_ids": make_segments(), "shared_segment": 0},
        {"logits_soft_cap": 2.0},
        {"logits_scale": 0.7, "segment_ids": make_segments(), "logits_soft_cap": 5.0},
    ],
    ids=["causal", "full", "segments", "shared-segment", "soft-cap", "all"],
)
def test_equals_the_oracle(kind, options):
    inputs = make_inputs(logits_scale=2.0)
    assert_close(
        run(inputs, jnp.float32, kind=kind, **options), oracle(inputs, kind=kind, **options), 3e-6
    )


@pytest.mark.parametrize("length", [1, 5, 128, 129, 256])
def test_any_length(length):
    inputs = make_inputs(length=length)
    actual, expected = run(inputs, jnp.float32, kind="laser"), oracle(inputs, kind="laser")
    np.testing.assert_allclose(actual[0], expected[0], rtol=0, atol=1e-5)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=2e-5)


def outlier_in_the_same_chunk(value):
    value[:, 40] = 120.0


def outlier_in_another_chunk(value):
    value[:, 200] = 120.0


def outliers_of_both_signs(value):
    value[:, 40, :, ::2] = 300.0
    value[:, 70, :, 1::2] = -200.0
    value[:, 290, 0] = 300.0


def wide_values(value):
    value *= 40.0


def outlier_at_the_first_token(value):
    value[:, 0] = 300.0


def huge_values(value):
    value[:, 100] = 3e4
    value[:, 150] = -3e4


OUTLIERS = [
    outlier_in_the_same_chunk,
    outlier_in_another_chunk,
    outliers_of_both_signs,
    wide_values,
    outlier_at_the_first_token,
    huge_values,
]


@pytest.mark.parametrize("segments", [None, make_segments()], ids=["", "packed"])
@pytest.mark.parametrize("spoil", OUTLIERS, ids=lambda f: f.__name__)
def test_outliers_are_exact(spoil, segments):
    inputs = make_inputs()
    spoil(inputs[2])
    options = {"kind": "laser", "segment_ids": segments}
    assert_close(run(inputs, jnp.float32, **options), oracle(inputs, **options), 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_stay_so(bad):
    query, key, value, _ = (np.float32(x) for x in make_inputs())
    value[:, 150, 0, 0] = bad
    out = np.array(attention(query, key, value, kind="laser"))
    assert not np.isfinite(out[:, 150:, 0, 0]).any()
    out[:, 128:, 0, 0] = 0  # the chunks with it, of this feature
    assert np.isfinite(out).all()


def test_the_papers_wrapper_fails_where_the_default_does_not():
    """What `implementation="paper"` is: the paper's formula, its failure included."""
    inputs = make_inputs()
    wrapper = {"kind": "laser", "implementation": "paper"}
    assert_close(run(inputs, jnp.float32, **wrapper), oracle(inputs, kind="laser"), 1e-5)
    outlier_in_another_chunk(inputs[2])
    assert not np.isfinite(run(inputs, jnp.float32, **wrapper)[0]).all()


def test_range_is_reported_and_decides():
    query, key, value, _ = make_inputs()
    small = {"kind": "laser", "return_range": True}
    out, range_nats = attention(*(jnp.float32(x) for x in (query, key, value)), **small)
    # The reference is a power of two at or below the largest visible value, so at most that far
    # above.
    assert 0 < range_nats < value.max() - np.asarray(out).min() + 1e-3
    value[:, 40] = 120.0
    _, range_nats = attention(*(jnp.float32(x) for x in (query, key, value)), **small)
    assert range_nats > chunked.RANGE_LIMIT_NATS


@pytest.mark.parametrize("kind", ["standard", "laser"])
@pytest.mark.parametrize("first_changed", [130, 200, 256])
def test_no_later_token_changes_earlier_blocks_by_a_bit(kind, first_changed):
    inputs = make_inputs()
    changed = [x.copy() for x in inputs]
    for x in changed[:3]:
        x[:, first_changed:] = -3 * x[:, first_changed:]
    changed[2][:, first_changed:] += 300.0
    before, after = (run(x, jnp.float32, kind=kind)[0] for x in (inputs, changed))
    assert not np.array_equal(before[:, first_changed:], after[:, first_changed:])
    block = first_changed // chunked.chunk_length(T) * chunked.chunk_length(T)
    np.testing.assert_array_equal(before[:, :block], after[:, :block])
    np.testing.assert_allclose(before[:, :first_changed], after[:, :first_changed], atol=2e-6)


def test_a_later_value_in_range_changes_nothing_by_a_bit():
    """The reference moves by a power of two, which rounds nothing, within the block as well."""
    inputs = make_inputs()
    changed = [x.copy() for x in inputs]
    changed[2][:, 100:] += 20.0
    before, after = (run(x, jnp.float32, kind="laser")[0] for x in (inputs, changed))
    np.testing.assert_array_equal(before[:, :100], after[:, :100])


@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_no_gradient_reaches_later_tokens_or_other_segments(kind):
    query, key, value, d_out = make_inputs()
    wide_values(value)
    segments = make_segments()
    row, at = 0, 150
    d_out[:] = 0
    d_out[row, at] = 1.0
    gradients = run((query, key, value, d_out), jnp.float32, kind=kind, segment_ids=segments)[1:]
    positions = np.arange(T)
    reachable = (segments == segments[row, at]) & (positions <= at)
    reachable[1 - row] = False
    for name, gradient in zip(NAMES[1:], gradients, strict=True):
        assert np.all(gradient[~reachable] == 0), name
    assert np.all(gradients[2][row, 137 : at + 1].any(axis=(1, 2)))


@pytest.mark.parametrize("value_std", [0.05, 0.3, 1.0, 3.0, 10.0])
def test_bfloat16_is_no_worse_than_the_papers_wrapper(value_std):
    inputs = make_inputs(value_std)
    expected = oracle(
        [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in inputs], kind="laser"
    )
    ours = errors(run(inputs, jnp.bfloat16, kind="laser"), expected)
    papers = errors(run(inputs, jnp.bfloat16, kind="laser", implementation="paper"), expected)
    for name in NAMES:
        assert ours[name] < 1.05 * papers[name], (name, ours, papers)


@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_oracle_gradients_by_finite_differences(kind):
    """The oracle's autodiff against central differences of its own values, in float64."""
    inputs = make_inputs(length=7)
    expected = oracle(inputs, kind=kind)[1:]
    direction = make_inputs(seed=1, length=7)
    step = 1e-6
    with jax.enable_x64(True):
        for i, name in enumerate(NAMES[1:]):
            ends = []
            for sign in (1, -1):
                moved = list(inputs)
                moved[i] = inputs[i] + sign * step * direction[i]
                out = attention(*map(jnp.asarray, moved[:3]), kind=kind, implementation="reference")
                ends.append(float((out * inputs[3]).sum()))
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(
                slope, (expected[i] * direction[i]).sum(), rtol=1e-7, err_msg=name
            )


def test_under_scan_and_remat():
    query, key, value, _ = (jnp.float32(x) for x in make_inputs())

    def loss(value, wrap):
        def body(carry, _):
            return attention(query, key, carry, kind="laser"), None

        return jnp.square(jax.lax.scan(wrap(body), value, None, length=3)[0]).sum()

    plain = jax.grad(loss)(value, lambda f: f)
    remat = jax.grad(loss)(value, jax.checkpoint)
    np.testing.assert_allclose(plain, remat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lazer"}, "kind='lazer'"),
        ({"implementation": "flash"}, "implementation='flash'"),
        ({"kind": "standard", "implementation": "paper"}, "use kind='laser'"),
        ({"segment_ids": jnp.zeros((1, 3))}, "segment_ids must be"),
    ],
)
def test_mistakes_are_named(change, message):
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, **{"kind": "laser", **change})


def test_shapes_that_do_not_fit_are_named():
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match=r"\(1, 4, 1, 8\), \(1, 4, 2, 8\)"):
        attention(x, jnp.zeros((1, 4, 2, 8)), x)
