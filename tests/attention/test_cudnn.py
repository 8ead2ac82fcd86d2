"""Attention by cuDNN against the float64 oracle, with XLA's attention in the place of cuDNN's.

What cuDNN itself makes of it only a GPU can tell; here the program is lowered for one, and the
calls in it are counted.

Shapes: (batch, length, heads, size).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from laser.attention import attention, chunked, cudnn
from models.decoder import REMAT_POLICIES
from tests.attention.closeness import NAMES, assert_close, errors

B, T, H, D = 2, 192, 2, 8  # the anchor is that of the first 128
LATER = 140
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


def make_inputs(value_std=1.0, dtype=jnp.float32):
    """query, key, value and a cotangent, float64 without what the dtype would round off."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(B, T, H, D)) for _ in range(4)]
    arrays[2] *= value_std
    return [np.array(jnp.asarray(x, dtype), np.float64) for x in arrays]


def laser(query, key, value, causal=True):
    """Output and range."""
    options = {"logits_scale": D**-0.5, "causal": causal, "segment_ids": None}
    return cudnn.attention(
        query, key, value, kind="laser", logits_soft_cap=None, library="xla", **options
    )


def value_and_gradients(causal, query, key, value, d_out):
    function = functools.partial(laser, causal=causal)
    out, pullback, range_nats = jax.vjp(function, query, key, value, has_aux=True)
    return (out, *pullback(d_out)), range_nats


compiled = jax.jit(value_and_gradients, static_argnums=0)


def run(inputs, dtype=jnp.float32, causal=True, function=compiled):
    """Output and gradients as float64 arrays, and the range."""
    found, range_nats = function(causal, *(jnp.asarray(x, dtype) for x in inputs))
    return [np.asarray(x, np.float64) for x in found], float(range_nats)


@functools.partial(jax.jit, static_argnums=0)
def compiled_oracle(causal, query, key, value, d_out):
    options = {"kind": "laser", "causal": causal, "implementation": "reference"}
    out, pullback = jax.vjp(lambda *x: attention(*x, **options), query, key, value)
    return out, *pullback(d_out)


def oracle(inputs, causal=True):
    with jax.enable_x64(True):
        return [np.asarray(x) for x in compiled_oracle(causal, *map(jnp.asarray, inputs))]


@CAUSAL
@pytest.mark.parametrize("value_std", [0.05, 0.3, 1.0, 3.0, 10.0])
def test_equals_the_oracle(value_std, causal):
    inputs = make_inputs(value_std)
    assert_close(run(inputs, causal=causal)[0], oracle(inputs, causal), 1e-5)
    inputs = make_inputs(value_std, jnp.bfloat16)
    tolerance = 1.2e-2 if value_std == 0.3 else 8e-3  # small values, some of them without an anchor
    assert_close(run(inputs, jnp.bfloat16, causal)[0], oracle(inputs, causal), tolerance)


@pytest.mark.parametrize("length", [1, 5])
def test_short_sequences(length):
    inputs = [x[:, :length] for x in make_inputs(0.05)]
    for a, e in zip(run(inputs)[0], oracle(inputs), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5)


def test_small_values_are_ten_times_as_precise_as_the_wrapper():
    inputs = make_inputs(0.05, jnp.bfloat16)
    expected = oracle(inputs)
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in inputs[:3])
    m = value.max(axis=1, keepdims=True)
    y = jax.nn.dot_product_attention(query, key, jnp.exp(value - m), is_causal=True)
    papers = np.log(np.asarray(y, np.float64)) + np.asarray(m, np.float64)
    theirs = np.linalg.norm(papers - expected[0]) / np.linalg.norm(expected[0])
    assert 10 * errors(run(inputs, jnp.bfloat16)[0], expected)["out"] < theirs


def later_outlier(value):
    value[:, LATER] = 120.0


def outliers_of_both_signs(value):
    value[:, 12, :, ::2] = 300.0
    value[:, 25, :, 1::2] = -200.0
    value[:, LATER, 0] = 300.0


def outlier_at_the_first_token(value):
    value[:, 0] = 300.0


def wide_values(value):
    value *= 40.0


def huge_values(value):
    value[:, 30] = 3e4
    value[:, LATER] = -3e4


def all_large(value):
    value += 110.0 + 3 * np.sin(np.arange(T))[:, None, None]


def all_far_below(value):
    value -= 110.0 + 3 * np.sin(np.arange(T))[:, None, None]


OUTLIERS = [
    later_outlier,
    outliers_of_both_signs,
    outlier_at_the_first_token,
    wide_values,
    huge_values,
    all_large,
    all_far_below,
]


@pytest.mark.parametrize("value_std", [0.05, 1.0])  # with the anchor and without
@pytest.mark.parametrize("spoil", OUTLIERS, ids=lambda f: f.__name__)
def test_outliers_are_exact(spoil, value_std):
    for dtype, tolerance in (jnp.float32, 1e-4), (jnp.bfloat16, 8e-3):
        inputs = make_inputs(value_std)
        spoil(inputs[2])
        inputs = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in inputs]
        assert_close(run(inputs, dtype)[0], oracle(inputs), tolerance)
    assert_close(run(inputs, jnp.bfloat16, causal=False)[0], oracle(inputs, False), 8e-3)


@pytest.mark.parametrize("shift", [-30.0, 30.0])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradients_of_any_size(shift, scale):
    """A gradient is divided by sums of up to e^31, or down to e^-31, on its way."""
    query, key, value, d_out = make_inputs(0.2)
    inputs = (query, key, np.clip(value + shift, -31, 31), d_out * scale)
    assert_close(run(inputs)[0], oracle(inputs), 2e-5)


def test_outputs_far_below_the_anchor_are_precise():
    """exp(V) - 1 would be rounded to -1 there; the rest of the row keeps its bits."""
    inputs = make_inputs(0.05, jnp.bfloat16)
    usual = run(inputs, jnp.bfloat16)[0][0]
    inputs[2][:, 150:, 0, 0] = -8.0
    inputs[1][:, 150:, 0] = inputs[0][:, 150:, 0] * 8  # seen by themselves alone
    found, expected = run(inputs, jnp.bfloat16)[0], oracle(inputs)
    assert (expected[0][:, 150:, 0, 0] < -3).any()
    np.testing.assert_allclose(found[0], expected[0], rtol=0.02, atol=2e-3)
    assert_close(found, expected, 2e-2)
    np.testing.assert_array_equal(found[0][:, :, 1], usual[:, :, 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("change", [-8.0, 8.0, 35.0, 300.0])
@pytest.mark.parametrize("value_std", [0.05, 1.0])
def test_no_later_token_changes_an_output_by_a_bit(value_std, change, dtype):
    inputs = make_inputs(value_std)
    changed = [x.copy() for x in inputs]
    for x in changed[:3]:
        x[:, LATER:] *= -3
    changed[2][:, LATER:] += change
    before, after = (run(x, dtype)[0][0] for x in (inputs, changed))
    assert not np.array_equal(before[:, LATER:], after[:, LATER:])
    np.testing.assert_array_equal(before[:, :LATER], after[:, :LATER])


def test_no_gradient_reaches_later_tokens():
    query, key, value, d_out = make_inputs()
    wide_values(value)
    d_out[:, :LATER] = 0
    d_out[:, LATER + 1 :] = 0
    for name, gradient in zip(NAMES[1:], run((query, key, value, d_out))[0][1:], strict=True):
        assert np.all(gradient[:, LATER + 1 :] == 0), name
        assert np.all(gradient[:, LATER].any(axis=(1, 2))), name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_stay_so(bad):
    inputs = make_inputs()
    inputs[2][0, LATER, 0, 0] = bad
    out = run(inputs)[0][0]
    assert not np.isfinite(out[0, LATER:, 0, 0]).any()
    out[0, chunked.chunk_length(T) :, 0, 0] = 0  # the chunk with it, of this feature
    assert np.isfinite(out).all()


def test_nothing_is_computed_twice_in_the_usual_case(monkeypatch):
    """Values and gradients do not come from the branches that repair, which are spoilt here."""
    usual = [make_inputs(value_std, jnp.bfloat16) for value_std in (0.05, 1.0, 3.0)]
    expected = [run(inputs, jnp.bfloat16) for inputs in usual]
    repair = cudnn._unanchored
    monkeypatch.setattr(cudnn, "_unanchored", lambda *x, **options: np.nan * repair(*x, **options))
    spoilt = jax.jit(lambda *x: value_and_gradients(*x), static_argnums=0)
    found = [run(inputs, jnp.bfloat16, function=spoilt) for inputs in usual]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    usual[0][2][0, 0] = 40.0
    assert all(np.isnan(x).any() for x in run(usual[0], jnp.bfloat16, function=spoilt)[0])


def test_the_range_says_how_far_outputs_are_below():
    inputs = make_inputs()
    (out, *_), range_nats = run(inputs)
    below = np.maximum(inputs[2].max(axis=1), 0) - out.min(axis=1)
    np.testing.assert_allclose(range_nats, below.max(), rtol=1e-6)
    inputs[2] -= 10
    (out, *_), range_nats = run(inputs)
    np.testing.assert_allclose(range_nats, -out.min(), rtol=1e-6)
    inputs[2][:, LATER] = 120.0
    assert run(inputs)[1] > chunked.RANGE_LIMIT_NATS


def test_under_scan_and_remat():
    query, key, value, _ = (jnp.float32(x) for x in make_inputs())

    def loss(value, wrap):
        def body(carry, _):
            return laser(query, key, carry)[0], None

        return jnp.square(jax.lax.scan(wrap(body), value, None, length=2)[0]).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(value, lambda f: f)
    np.testing.assert_allclose(gradient(value, jax.checkpoint), plain, rtol=1e-5, atol=1e-5)


def test_heads_and_rows_over_a_mesh():
    inputs = [jnp.float32(x) for x in make_inputs()]
    alone, _ = compiled(True, *inputs)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    spread, _ = compiled(True, *jax.device_put(inputs, sharding))
    assert len(spread[0].sharding.device_set) == 4
    for a, b in zip(alone, spread, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def calls(region, usual):
    """Names of the custom calls, of the branch that is usually taken alone if so asked."""
    for block in region:
        for op in block:
            if op.operation.name == "stablehlo.custom_call":
                yield op.operation.attributes["call_target_name"].value
            take = slice(1, 2) if usual and op.operation.name == "stablehlo.case" else slice(None)
            for inner in list(op.operation.regions)[take]:
                yield from calls(inner, usual)


@pytest.mark.parametrize("policy", [None, "dots"])
@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_lowers_to_one_call_each_way(kind, policy, monkeypatch):
    """Under remat too, where its policy keeps what attention made."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    x = jax.ShapeDtypeStruct((B, 256, H, 128), jnp.bfloat16)

    def loss(*inputs):
        return attention(*inputs, kind=kind, implementation="cudnn").astype(jnp.float32).sum()

    if policy is not None:
        loss = jax.checkpoint(loss, policy=REMAT_POLICIES[policy])
    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(x, x, x)
    module = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    usual = [name for name in calls(module.operation.regions[0], True) if "cudnn" in name]
    assert usual == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    # Without the anchor once more, forward, and in the branch of the backward pass both ways; that
    # branch has a call for what is certified too.
    every = [name for name in calls(module.operation.regions[0], False) if "cudnn" in name]
    assert len(every) - len(usual) == (4 if kind == "laser" else 0)


@pytest.mark.parametrize(
    ("dtype", "size", "options", "limit"),
    [
        (jnp.float32, 64, {}, "standard attention in bfloat16 or float16; got float32"),
        (jnp.float16, 64, {"kind": "laser"}, "laser attention in bfloat16; got float16"),
        (jnp.bfloat16, 256, {"kind": "laser"}, "at most 128, a multiple of 8; got"),
        (jnp.bfloat16, 64, {"segment_ids": np.zeros((1, 8), np.int32)}, "no segment_ids"),
        (jnp.bfloat16, 64, {"logits_soft_cap": 50.0}, "no logits_soft_cap"),
    ],
)
def test_what_cudnn_cannot_serve_names_its_limit(dtype, size, options, limit):
    x = jnp.zeros((1, 8, 1, size), dtype)
    with pytest.raises(ValueError, match=limit):
        attention(x, x, x, implementation="cudnn", **options)


@pytest.mark.parametrize(
    ("capability", "largest"), [("8.0", 128), ("9.0", 256), ("10.3", 256), ("gfx90a", 128)]
)
def test_the_largest_head_size_is_that_of_the_device(capability, largest, monkeypatch):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert cudnn.largest_size() == largest
