"""The fused kernels, in Pallas' interpret mode: what test_implementations.py does not ask of them.

Blocks are small here, so that a short sequence has several of them and each has several tiles.

Shapes: (batch, length, heads, size).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import attention, chunked, interface
from laser.attention.kernels import blocks, fused
from tests.attention.closeness import assert_close, errors
from tests.attention.implementations import PALLAS, PALLAS_ONE_BLOCK, oracle, rounded

SEGMENTS = PALLAS.segments
SIZES = pytest.mark.parametrize(
    "tried", [PALLAS_ONE_BLOCK, PALLAS], ids=lambda tried: tried.name.removeprefix("pallas-")
)
KINDS = pytest.mark.parametrize("kind", ["standard", "laser"])


@KINDS
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["", "packed"])
@pytest.mark.slow
def test_bfloat16(kind, segment_ids):
    inputs = rounded(PALLAS.inputs())
    options = {"kind": kind, "segment_ids": segment_ids}
    expected = oracle(inputs, **options)
    assert_close(PALLAS.run(inputs, jnp.bfloat16, **options)[0], expected, 8e-3)


@pytest.mark.parametrize("shift", [-100.0, 50.0, 100.0])
def test_a_shift_of_all_values_shifts_the_output(shift):
    inputs = rounded(PALLAS.inputs())
    inputs[2] = inputs[2] + shift
    actual, range_nats = PALLAS.run(inputs, jnp.float32, kind="laser")
    assert_close(actual, oracle(inputs, kind="laser"), 1e-5)
    assert range_nats < chunked.RANGE_LIMIT_NATS  # without the exact path


@pytest.mark.parametrize("large, others", [(55, -60), (110, 16)], ids=["narrow", "wide"])
@pytest.mark.slow
def test_a_weight_that_float32_does_not_hold_counts_where_its_value_is_large(large, others):
    """The key that has e^-95 of the weight decides, or has a share, once values are exponentials.

    In each case the form of the kernel that the values ask for loses it.
    """
    query, key, value, d_out = PALLAS.inputs()
    query[:], key[:], value[:] = 0, 0, others + 0.1 * value
    query[..., 0], key[:, 10, :, 0], value[:, 10] = 1, -95, large
    inputs = (query, key, value, d_out)
    options = {"kind": "laser", "logits_scale": 1.0}
    actual = PALLAS.run(inputs, jnp.float32, **options)[0]
    # 110 log2 e in float32 is off by up to 8e-6, a factor of its exponential.
    assert_close(actual, oracle(inputs, **options), 3e-5)


@pytest.mark.slow
def test_wide_values_in_bfloat16():
    """Outputs too large to be a residual in bfloat16: the sums are computed again."""
    inputs = rounded(PALLAS.inputs(value_std=20.0))
    actual = PALLAS.run(inputs, jnp.bfloat16, kind="laser")[0]
    assert_close(actual, oracle(inputs, kind="laser"), 8e-3)


def wrapper(query, key, value):
    """The paper's wrapper around an attention function that rounds what it takes and returns."""
    m = value.astype(jnp.float32).max(axis=1, keepdims=True)
    exp_v = jnp.exp(value - m).astype(jnp.bfloat16)
    y, _ = PALLAS_ONE_BLOCK.call(query, key, exp_v, kind="standard")
    return np.log(np.asarray(y, np.float64)) + np.asarray(m, np.float64)


@pytest.mark.parametrize("options", [{"causal": False}, {"segment_ids": SEGMENTS}])
@pytest.mark.slow
def test_small_values_in_bfloat16(options):
    inputs = rounded(PALLAS.inputs(value_std=0.05))
    expected = oracle(inputs, kind="laser", **options)
    assert_close(PALLAS.run(inputs, jnp.bfloat16, kind="laser", **options)[0], expected, 6e-3)


@SIZES
@pytest.mark.parametrize("until", [PALLAS.length, 30])
@pytest.mark.slow
def test_values_far_below_zero_in_bfloat16(tried, until):
    """exp(V) - 1 would be rounded to -1 there."""
    inputs = PALLAS.inputs()
    inputs[2][:, :until] -= 5
    inputs = rounded(inputs)
    actual = tried.run(inputs, jnp.bfloat16, kind="laser")[0]
    expected = oracle(inputs, kind="laser")
    assert errors(actual, expected)["out"] < 4e-3
    assert_close(actual, expected, 3e-2)  # outputs near -5 are residuals of 9 bits


@SIZES
@pytest.mark.slow
def test_anchors_that_fall_within_a_block_in_bfloat16(tried):
    """The first tile of keys is anchored, those after it are not."""
    inputs = PALLAS.inputs(value_std=0.2)
    inputs[2][:, tried.block :] -= 5
    inputs = rounded(inputs)
    actual = tried.run(inputs, jnp.bfloat16, kind="laser")[0]
    assert errors(actual, oracle(inputs, kind="laser"))["out"] < 4e-3


@SIZES
@pytest.mark.slow
def test_an_anchor_beside_a_large_value_in_bfloat16(tried):
    """What was anchored counts for nothing where a key of little weight has a very large value."""
    query, key, value, d_out = PALLAS.inputs(value_std=0.2)
    query[:], key[:] = 0, 0
    query[..., 0], key[:, 60, :, 0], value[:, 60] = 1, -46, 70
    inputs = rounded((query, key, value, d_out))
    options = {"kind": "laser", "logits_scale": 1.0}
    actual = tried.run(inputs, jnp.bfloat16, **options)[0]
    assert_close(actual, oracle(inputs, **options), 8e-3)


@SIZES
@pytest.mark.slow
def test_small_values_are_ten_times_as_precise_as_the_wrapper(tried):
    inputs = rounded(PALLAS.inputs(value_std=0.05))
    expected = oracle(inputs, kind="laser")
    actual = tried.run(inputs, jnp.bfloat16, kind="laser")[0]
    assert_close(actual, expected, 6e-3)
    papers = wrapper(*(jnp.asarray(x, jnp.bfloat16) for x in inputs[:3]))
    theirs = np.linalg.norm(papers - expected[0]) / np.linalg.norm(expected[0])
    assert 10 * errors(actual, expected)["out"] < theirs


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_later_value_in_range_changes_nothing_by_a_bit(dtype):
    """Not even in the tile that it lies in, as long as all values are exponentiated alike."""
    inputs = PALLAS.inputs(value_std=0.5)
    changed = [x.copy() for x in inputs]
    changed[2][:, 41:] = 10.0 + changed[2][:, 41:]
    options = {"kind": "laser"}
    before, after = (PALLAS.output(x, dtype, **options) for x in (inputs, changed))
    np.testing.assert_array_equal(before[:, :41], after[:, :41])
    changed[2][:, 41:] *= -1  # beyond what is anchored: another rounding, in that tile alone
    after = PALLAS.output(changed, dtype, **options)
    np.testing.assert_array_equal(before[:, :32], after[:, :32])
    np.testing.assert_allclose(before[:, 32:41], after[:, 32:41], rtol=0.01, atol=3e-3)


@pytest.mark.parametrize(("dtype", "factor"), [(jnp.float32, -2.0), (jnp.bfloat16, -1.0)])
@pytest.mark.slow
def test_no_other_segment_changes_an_output_by_a_bit(dtype, factor):
    inputs = PALLAS.inputs(value_std=0.5)  # in bfloat16 all values stay anchored
    changed = [x.copy() for x in inputs]
    changed[2][0, :20] *= factor
    options = {"kind": "laser", "segment_ids": SEGMENTS}
    before, after = (PALLAS.output(x, dtype, **options) for x in (inputs, changed))
    np.testing.assert_array_equal(before[0, 20:], after[0, 20:])


def test_a_policy_can_keep_the_output(capsys):
    query, key, value, _ = (jnp.float32(x) for x in PALLAS.inputs(length=40))

    def loss(value):
        return PALLAS.call(query, key, value, kind="laser")[0].sum()

    policy = jax.checkpoint_policies.save_only_these_names(fused.OUTPUT_NAME)
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(loss, policy=policy), value)
    saved = [line for line in capsys.readouterr().out.splitlines() if fused.OUTPUT_NAME in line]
    assert len(saved) == 4, saved  # output, log of the sum of exponentials, two of bool


@KINDS
@pytest.mark.slow
def test_heads_and_rows_over_a_mesh(kind):
    inputs = [jnp.asarray(np.concatenate([x, x]), jnp.float32) for x in PALLAS.inputs(length=40)]
    query, key, value, d_out = inputs

    def value_and_gradients(query, key, value):
        out, vjp = jax.vjp(lambda *x: PALLAS.call(*x, kind=kind)[0], query, key, value)
        return out, *vjp(d_out)

    alone = jax.jit(value_and_gradients)(query, key, value)
    axes = (jax.sharding.AxisType.Auto,) * 3
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=axes)):
        spread = jax.jit(value_and_gradients)(query, key, value)
        assert len(spread[0].sharding.device_set) == 8
    for a, b in zip(alone, spread, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 128, 1, 1024), jnp.bfloat16, "head sizes up to 768; got 1024"),
        ((1, 128, 1, 64), jnp.float16, "takes float32 or bfloat16.*got float16"),
        ((1, 2**17, 1, 768), jnp.bfloat16, r"needs \d+ MiB .* the limit is 64"),
    ],
)
def test_the_impossible_names_its_limit(shape, dtype, message):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: attention(x, x, x, implementation="pallas"), x)


def test_a_mesh_that_does_not_divide_the_heads_is_named():
    x = jax.ShapeDtypeStruct((8, 128, 3, 64), jnp.float32)
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=axes)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"'tensor'.* split 3 heads over 2"):
        jax.eval_shape(lambda x: attention(x, x, x, implementation="pallas"), x)


def described_mesh(platform):
    device = jax.sharding.AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    types = (jax.sharding.AxisType.Auto,)
    return jax.sharding.AbstractMesh((1,), ("data",), types, abstract_device=device)


@pytest.mark.parametrize(
    ("platform", "kind", "size", "dtype", "chosen"),
    [
        ("tpu", "laser", 128, jnp.bfloat16, "pallas"),
        ("tpu", "standard", 720, jnp.bfloat16, "pallas"),
        ("tpu", "standard", 720, jnp.float32, "pallas"),
        ("tpu", "laser", 1024, jnp.bfloat16, "chunked"),
        ("gpu", "standard", 128, jnp.bfloat16, "cudnn"),
        ("gpu", "standard", 512, jnp.bfloat16, "chunked"),
        ("gpu", "laser", 128, jnp.bfloat16, "cudnn"),
        ("gpu", "laser", 128, jnp.float16, "chunked"),
        ("cpu", "laser", 64, jnp.bfloat16, "chunked"),
    ],
)
def test_auto_takes_what_serves_the_devices_of_the_mesh(platform, kind, size, dtype, chosen):
    x = jax.ShapeDtypeStruct((1, 128, 2, size), dtype)
    with jax.sharding.use_abstract_mesh(described_mesh(platform)):
        options = {"segment_ids": None, "logits_soft_cap": None}
        assert interface._choose(x, x, x, kind, options)[0] == chosen
        assert interface._choose(x, x, x, kind, options | {"shared_segment": 0})[0] == "chunked"
        wider = jax.ShapeDtypeStruct(x.shape, jnp.float64)
        assert interface._choose(x, wider, x, kind, options)[0] == "chunked"


@pytest.mark.parametrize("length", [1, 128, 129, 1000, 1024, 1025, 1536, 8192])
@pytest.mark.parametrize("size", [64, 256, 720])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_fit_and_hold_whole_tiles_and_little_padding(length, size, itemsize):
    sizes = blocks.block_sizes(length, size, size, itemsize)
    assert sizes.block % sizes.tile == sizes.block % sizes.backward_tile == 0
    needed = blocks.vmem_estimate(length, size, size, sizes, itemsize)
    assert needed <= blocks.SMALLEST_VMEM_BYTES
    padded = blocks.padded_length(length, sizes)
    assert 0 <= padded - length < (sizes.tile if length <= 1024 else 512)


def test_a_short_sequence_is_one_block_where_it_fits():
    assert blocks.block_sizes(600, 128, 128, 2).block == 768
    assert blocks.block_sizes(600, 720, 720, 4).block == 512
