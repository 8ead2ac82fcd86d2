"""Attention by cuDNN, with XLA's in its place: what test_implementations.py does not ask of it.

What cuDNN itself makes of it only a GPU can tell; here the program is lowered for one, and the
calls in it are counted.

Shapes: (batch, length, heads, size).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from laser.attention import attention, chunked, cudnn, interface
from models.stack import REMAT_POLICIES
from tests.attention.closeness import assert_close, errors
from tests.attention.implementations import CUDNN, OUTLIERS, B, H, compiled, oracle, rounded
from tests.attention.test_kernels import described_mesh

pytestmark = pytest.mark.usefixtures("own_programs")
LATER = CUDNN.late
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


def run(inputs, dtype=jnp.float32, causal=True, tried=CUDNN):
    """Output and gradients as float64 arrays, and the range, of LASER."""
    return tried.run(inputs, dtype, kind="laser", causal=causal)


@CAUSAL
@pytest.mark.parametrize("value_std", [0.05, 0.3, 1.0, 3.0, 10.0])
@pytest.mark.slow
def test_equals_the_oracle(value_std, causal):
    inputs = CUDNN.inputs(value_std)
    options = {"kind": "laser", "causal": causal}
    assert_close(CUDNN.run(inputs, **options)[0], oracle(inputs, **options), 1e-5)
    inputs = CUDNN.inputs(value_std, dtype=jnp.bfloat16)
    tolerance = 1.2e-2 if value_std == 0.3 else 8e-3  # small values, some of them without an anchor
    assert_close(
        run(inputs, jnp.bfloat16, causal)[0], oracle(inputs, kind="laser", causal=causal), tolerance
    )


@pytest.mark.slow
def test_small_values_are_ten_times_as_precise_as_the_wrapper():
    inputs = CUDNN.inputs(0.05, dtype=jnp.bfloat16)
    expected = oracle(inputs, kind="laser")
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in inputs[:3])
    m = value.max(axis=1, keepdims=True)
    y = jax.nn.dot_product_attention(query, key, jnp.exp(value - m), is_causal=True)
    papers = np.log(np.asarray(y, np.float64)) + np.asarray(m, np.float64)
    theirs = np.linalg.norm(papers - expected[0]) / np.linalg.norm(expected[0])
    assert 10 * errors(run(inputs, jnp.bfloat16)[0], expected)["out"] < theirs


@pytest.mark.parametrize("value_std", CUDNN.value_stds)
@pytest.mark.parametrize("spoil", OUTLIERS, ids=lambda spoil: spoil.__name__)
def test_outliers_are_exact_without_a_causal_mask(spoil, value_std):
    inputs = CUDNN.inputs(value_std, dtype=jnp.bfloat16)
    spoil(inputs[2], CUDNN)
    inputs = rounded(inputs)
    expected = oracle(inputs, kind="laser", causal=False)
    assert_close(run(inputs, jnp.bfloat16, causal=False)[0], expected, 8e-3)


@pytest.mark.parametrize("shift", [-30.0, 30.0])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradients_of_any_size(shift, scale):
    """A gradient is divided by sums of up to e^31, or down to e^-31, on its way."""
    query, key, value, d_out = CUDNN.inputs(0.2)
    inputs = (query, key, np.clip(value + shift, -31, 31), d_out * scale)
    assert_close(run(inputs)[0], oracle(inputs, kind="laser"), 2e-5)


def test_outputs_far_below_the_anchor_are_precise():
    """exp(V) - 1 would be rounded to -1 there; the rest of the row keeps its bits."""
    inputs = CUDNN.inputs(0.05, dtype=jnp.bfloat16)
    usual = run(inputs, jnp.bfloat16)[0][0]
    inputs[2][:, 150:, 0, 0] = -8.0
    inputs[1][:, 150:, 0] = inputs[0][:, 150:, 0] * 8  # seen by themselves alone
    found, expected = run(inputs, jnp.bfloat16)[0], oracle(inputs, kind="laser")
    assert (expected[0][:, 150:, 0, 0] < -3).any()
    np.testing.assert_allclose(found[0], expected[0], rtol=0.02, atol=2e-3)
    assert_close(found, expected, 2e-2)
    np.testing.assert_array_equal(found[0][:, :, 1], usual[:, :, 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("change", [-8.0, 8.0, 35.0, 300.0])
@pytest.mark.parametrize("value_std", [0.05, 1.0])
def test_no_later_token_changes_an_output_by_a_bit(value_std, change, dtype):
    inputs = CUDNN.inputs(value_std)
    changed = [x.copy() for x in inputs]
    for x in changed[:3]:
        x[:, LATER:] *= -3
    changed[2][:, LATER:] += change
    before, after = (run(x, dtype)[0][0] for x in (inputs, changed))
    assert not np.array_equal(before[:, LATER:], after[:, LATER:])
    np.testing.assert_array_equal(before[:, :LATER], after[:, :LATER])


@pytest.mark.slow
def test_nothing_is_computed_twice_in_the_usual_case(monkeypatch):
    """Values and gradients do not come from the branches that repair, which are spoilt here."""
    usual = [CUDNN.inputs(value_std, dtype=jnp.bfloat16) for value_std in (0.05, 1.0, 3.0)]
    expected = [run(inputs, jnp.bfloat16) for inputs in usual]
    repair = cudnn._unanchored
    monkeypatch.setattr(cudnn, "_unanchored", lambda *x, **options: np.nan * repair(*x, **options))
    spoilt = dataclasses.replace(CUDNN, call=functools.partial(CUDNN.call))  # compiled anew
    found = [run(inputs, jnp.bfloat16, tried=spoilt) for inputs in usual]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    usual[0][2][0, 0] = 40.0
    assert all(np.isnan(x).any() for x in run(usual[0], jnp.bfloat16, tried=spoilt)[0])


def test_the_range_says_how_far_outputs_are_below():
    inputs = CUDNN.inputs()
    (out, *_), range_nats = run(inputs)
    below = np.maximum(inputs[2].max(axis=1), 0) - out.min(axis=1)
    np.testing.assert_allclose(range_nats, below.max(), rtol=1e-6)
    inputs[2] -= 10
    (out, *_), range_nats = run(inputs)
    np.testing.assert_allclose(range_nats, -out.min(), rtol=1e-6)
    inputs[2][:, LATER] = 120.0
    assert run(inputs)[1] > chunked.RANGE_LIMIT_NATS


@pytest.mark.slow
def test_heads_and_rows_over_a_mesh():
    inputs = [jnp.float32(x) for x in CUDNN.inputs()]
    program = compiled(CUDNN.call, True, kind="laser", causal=True)
    alone, _ = program(None, *inputs)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    spread, _ = program(None, *jax.device_put(inputs, sharding))
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
        attention(x, x, x, implementation="cudnn", **{"kind": "standard", **options})


@pytest.mark.parametrize(
    ("capability", "largest"),
    [("8.0", 128), ("9.0", 256), ("10.3", 256), ("7.5", 0), ("gfx90a", 0)],  # the last is AMD's
)
def test_the_largest_head_size_is_that_of_the_device(capability, largest, monkeypatch):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert cudnn.largest_size() == largest
    x = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    options = {"segment_ids": None, "logits_soft_cap": None}
    with jax.sharding.use_abstract_mesh(described_mesh("gpu")):
        chosen, why = interface._choose(x, x, x, "laser", options)
    assert chosen == ("cudnn" if largest else "chunked")
    assert largest or "an NVIDIA GPU of compute capability 8.0 or later" in why
