"""The fused kernels, in Pallas' interpret mode, against the float64 oracle: values and gradients.

Blocks are small here, so that a short sequence has several of them and each has several tiles.

Shapes: (batch, length, heads, size).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import attention, chunked, interface
from laser.attention.kernels import blocks, fused
from laser.attention.kernels.blocks import BlockSizes
from tests.attention.closeness import NAMES, assert_close, errors

B, T, H, D_QK, D_V = 2, 90, 2, 8, 16  # ragged: no block divides it
ONE_BLOCK, BLOCKS = BlockSizes(96, 48, 32), BlockSizes(32, 16, 16)
SEGMENTS = np.stack([np.repeat([0, 1, 2], [20, 33, 37]), np.repeat([5, 3, 4], [50, 7, 33])])
SIZES = pytest.mark.parametrize("sizes", [ONE_BLOCK, BLOCKS], ids=["one-block", "blocks"])
KINDS = pytest.mark.parametrize("kind", ["standard", "laser"])


def make_inputs(value_std=1.0, logits_scale=1.0, seed=0, length=T):
    """query, key, value and a cotangent, float64."""
    rng = np.random.default_rng(seed)
    query, key = (rng.normal(size=(B, length, H, D_QK)) * logits_scale for _ in range(2))
    value, d_out = (rng.normal(size=(B, length, H, D_V)) for _ in range(2))
    return query, key, value * value_std, d_out


def rounded(inputs):
    """What is left of the inputs in bfloat16, as float64."""
    return [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in inputs]


def kernels(query, key, value, *, kind, sizes, **options):
    """Output and range."""
    given = {"logits_scale": D_QK**-0.5, "causal": True, "segment_ids": None}
    given = {**given, "logits_soft_cap": None, **options}
    return fused.attention(query, key, value, kind=kind, sizes=sizes, interpret=True, **given)


@functools.cache
def compiled(gradients: bool, **options):
    """Output, gradients if asked for, and range; compiled once for all tests that share options."""

    def value_and_gradients(segment_ids, query, key, value, d_out):
        def out_and_range(*x):
            return kernels(*x, segment_ids=segment_ids, **options)

        if not gradients:
            out, range_nats = out_and_range(query, key, value)
            return (out,), range_nats
        out, vjp, range_nats = jax.vjp(out_and_range, query, key, value, has_aux=True)
        return (out, *vjp(d_out)), range_nats

    return jax.jit(value_and_gradients)


def run(inputs, dtype, gradients=True, segment_ids=None, **options):
    """Output and gradients as float64 arrays, and the range."""
    arrays = [jnp.asarray(x, dtype) for x in inputs]
    found, range_nats = compiled(gradients, **options)(segment_ids, *arrays)
    return [np.asarray(x, np.float64) for x in found], float(range_nats)


def output(inputs, dtype, **options):
    return run(inputs, dtype, gradients=False, **options)[0][0]


@functools.cache
def compiled_oracle(**options):
    def value_and_gradients(segment_ids, query, key, value, d_out):
        def out(*x):
            return attention(*x, implementation="reference", segment_ids=segment_ids, **options)

        out, vjp = jax.vjp(out, query, key, value)
        return out, *vjp(d_out)

    return jax.jit(value_and_gradients)


def oracle(inputs, segment_ids=None, **options):
    with jax.enable_x64(True):
        arrays = map(jnp.asarray, inputs)
        return [np.asarray(x) for x in compiled_oracle(**options)(segment_ids, *arrays)]


@SIZES
@KINDS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"segment_ids": SEGMENTS, "logits_soft_cap": 2.0},
        {"segment_ids": SEGMENTS, "causal": False, "logits_scale": 0.7},
    ],
    ids=["causal", "full", "packed-soft-cap", "packed-full"],
)
def test_equals_the_oracle(kind, options, sizes):
    inputs = make_inputs(logits_scale=2.0)
    expected = oracle(inputs, kind=kind, **options)
    assert_close(run(inputs, jnp.float32, kind=kind, sizes=sizes, **options)[0], expected, 2e-6)


@KINDS
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["", "packed"])
def test_bfloat16(kind, segment_ids):
    inputs = rounded(make_inputs())
    options = {"kind": kind, "segment_ids": segment_ids}
    expected = oracle(inputs, **options)
    assert_close(run(inputs, jnp.bfloat16, sizes=BLOCKS, **options)[0], expected, 8e-3)


@pytest.mark.parametrize("length", [1, 33])
def test_any_length(length):
    inputs = make_inputs(length=length)
    actual = run(inputs, jnp.float32, kind="laser", sizes=BLOCKS)[0]
    for a, e in zip(actual, oracle(inputs, kind="laser"), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5)


def outlier_in_the_same_tile(value):
    value[:, 12] = 120.0


def outlier_in_another_block(value):
    value[:, 70] = 120.0


def outliers_of_both_signs(value):
    value[:, 12, :, ::2] = 300.0
    value[:, 25, :, 1::2] = -200.0
    value[:, 88, 0] = 300.0


def wide_values(value):
    value *= 40.0


def outlier_at_the_first_token(value):
    value[:, 0] = 300.0


def huge_values(value):
    value[:, 30] = 3e4
    value[:, 50] = -3e4


OUTLIERS = [
    outlier_in_the_same_tile,
    outlier_in_another_block,
    outliers_of_both_signs,
    wide_values,
    outlier_at_the_first_token,
    huge_values,
]


@SIZES
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["", "packed"])
@pytest.mark.parametrize("spoil", OUTLIERS, ids=lambda f: f.__name__)
def test_outliers_are_exact(spoil, segment_ids, sizes):
    inputs = make_inputs()
    spoil(inputs[2])
    options = {"kind": "laser", "segment_ids": segment_ids}
    actual, range_nats = run(inputs, jnp.float32, sizes=sizes, **options)
    assert_close(actual, oracle(inputs, **options), 1e-5)
    first_row_only = spoil is outlier_at_the_first_token and segment_ids is None
    assert first_row_only or range_nats > chunked.RANGE_LIMIT_NATS  # the exact path was met


@pytest.mark.parametrize("shift", [-100.0, 50.0, 100.0])
def test_a_shift_of_all_values_shifts_the_output(shift):
    inputs = rounded(make_inputs())
    inputs[2] = inputs[2] + shift
    actual, range_nats = run(inputs, jnp.float32, kind="laser", sizes=BLOCKS)
    assert_close(actual, oracle(inputs, kind="laser"), 1e-5)
    assert range_nats < chunked.RANGE_LIMIT_NATS  # without the exact path


@pytest.mark.parametrize("large, others", [(55, -60), (110, 16)], ids=["narrow", "wide"])
def test_a_weight_that_float32_does_not_hold_counts_where_its_value_is_large(large, others):
    """The key that has e^-95 of the weight decides, or has a share, once values are exponentials.

    In each case the form of the kernel that the values ask for loses it.
    """
    query, key, value, d_out = make_inputs()
    query[:], key[:], value[:] = 0, 0, others + 0.1 * value
    query[..., 0], key[:, 10, :, 0], value[:, 10] = 1, -95, large
    inputs = (query, key, value, d_out)
    options = {"kind": "laser", "logits_scale": 1.0}
    actual = run(inputs, jnp.float32, sizes=BLOCKS, **options)[0]
    assert_close(actual, oracle(inputs, **options), 1e-5)


def test_wide_values_in_bfloat16():
    """Outputs too large to be a residual in bfloat16: the sums are computed again."""
    inputs = rounded(make_inputs(value_std=20.0))
    actual = run(inputs, jnp.bfloat16, kind="laser", sizes=BLOCKS)[0]
    assert_close(actual, oracle(inputs, kind="laser"), 8e-3)


def test_values_that_are_not_finite_stay_so():
    inputs = make_inputs()
    inputs[2][0, 40, 0] = np.nan
    found, _ = run(inputs, jnp.float32, kind="laser", sizes=BLOCKS)
    assert np.isfinite(found[0][0, :32]).all()
    assert np.isnan(found[0][0, 40:, 0]).all()


def wrapper(query, key, value):
    """The paper's wrapper around an attention function that rounds what it takes and returns."""
    m = value.astype(jnp.float32).max(axis=1, keepdims=True)
    exp_v = jnp.exp(value - m).astype(jnp.bfloat16)
    y, _ = kernels(query, key, exp_v, kind="standard", sizes=ONE_BLOCK)
    return np.log(np.asarray(y, np.float64)) + np.asarray(m, np.float64)


@pytest.mark.parametrize("options", [{"causal": False}, {"segment_ids": SEGMENTS}])
def test_small_values_in_bfloat16(options):
    inputs = rounded(make_inputs(value_std=0.05))
    expected = oracle(inputs, kind="laser", **options)
    assert_close(
        run(inputs, jnp.bfloat16, kind="laser", sizes=BLOCKS, **options)[0], expected, 6e-3
    )


@SIZES
@pytest.mark.parametrize("until", [T, 30])
def test_values_far_below_zero_in_bfloat16(sizes, until):
    """exp(V) - 1 would be rounded to -1 there."""
    inputs = make_inputs()
    inputs[2][:, :until] -= 5
    inputs = rounded(inputs)
    actual = run(inputs, jnp.bfloat16, kind="laser", sizes=sizes)[0]
    expected = oracle(inputs, kind="laser")
    assert errors(actual, expected)["out"] < 4e-3
    assert_close(actual, expected, 3e-2)  # outputs near -5 are residuals of 9 bits


@SIZES
def test_anchors_that_fall_within_a_block_in_bfloat16(sizes):
    """The first tile of keys is anchored, those after it are not."""
    inputs = make_inputs(value_std=0.2)
    inputs[2][:, sizes.tile :] -= 5
    inputs = rounded(inputs)
    actual = run(inputs, jnp.bfloat16, kind="laser", sizes=sizes)[0]
    assert errors(actual, oracle(inputs, kind="laser"))["out"] < 4e-3


@SIZES
def test_an_anchor_beside_a_large_value_in_bfloat16(sizes):
    """What was anchored counts for nothing where a key of little weight has a very large value."""
    query, key, value, d_out = make_inputs(value_std=0.2)
    query[:], key[:] = 0, 0
    query[..., 0], key[:, 60, :, 0], value[:, 60] = 1, -46, 70
    inputs = rounded((query, key, value, d_out))
    options = {"kind": "laser", "logits_scale": 1.0}
    actual = run(inputs, jnp.bfloat16, sizes=sizes, **options)[0]
    assert_close(actual, oracle(inputs, **options), 8e-3)


@SIZES
def test_small_values_are_ten_times_as_precise_as_the_wrapper(sizes):
    inputs = rounded(make_inputs(value_std=0.05))
    expected = oracle(inputs, kind="laser")
    actual = run(inputs, jnp.bfloat16, kind="laser", sizes=sizes)[0]
    assert_close(actual, expected, 6e-3)
    papers = wrapper(*(jnp.asarray(x, jnp.bfloat16) for x in inputs[:3]))
    theirs = np.linalg.norm(papers - expected[0]) / np.linalg.norm(expected[0])
    assert 10 * errors(actual, expected)["out"] < theirs


@KINDS
@SIZES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_later_token_changes_earlier_tiles_by_a_bit(kind, dtype, sizes):
    inputs = make_inputs()
    changed = [x.copy() for x in inputs]
    for x in changed[:3]:
        x[:, 70:] = -3 * x[:, 70:]
    changed[2][:, 70:] += 300.0
    options = {"kind": kind, "sizes": sizes}
    before, after = (output(x, dtype, **options) for x in (inputs, changed))
    assert not np.array_equal(before[:, 70:], after[:, 70:])
    tile = 70 // sizes.tile * sizes.tile
    np.testing.assert_array_equal(before[:, :tile], after[:, :tile])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_later_value_in_range_changes_nothing_by_a_bit(dtype):
    """Not even in the tile that it lies in, as long as all values are exponentiated alike."""
    inputs = make_inputs(value_std=0.5)
    changed = [x.copy() for x in inputs]
    changed[2][:, 41:] = 10.0 + changed[2][:, 41:]
    options = {"kind": "laser", "sizes": BLOCKS}
    before, after = (output(x, dtype, **options) for x in (inputs, changed))
    np.testing.assert_array_equal(before[:, :41], after[:, :41])
    changed[2][:, 41:] *= -1  # beyond what is anchored: another rounding, in that tile alone
    after = output(changed, dtype, **options)
    np.testing.assert_array_equal(before[:, :32], after[:, :32])
    np.testing.assert_allclose(before[:, 32:41], after[:, 32:41], rtol=0.01, atol=3e-3)


@KINDS
def test_no_gradient_reaches_later_tokens_or_other_segments(kind):
    query, key, value, d_out = make_inputs()
    wide_values(value)
    row, at = 0, 45
    d_out[:] = 0
    d_out[row, at] = 1.0
    inputs = (query, key, value, d_out)
    found, _ = run(inputs, jnp.float32, kind=kind, segment_ids=SEGMENTS, sizes=BLOCKS)
    reachable = (SEGMENTS[row, at] == SEGMENTS) & (np.arange(T) <= at)
    reachable[1 - row] = False
    for name, gradient in zip(NAMES[1:], found[1:], strict=True):
        assert np.all(gradient[~reachable] == 0), name
    assert np.all(found[3][row, 20 : at + 1].any(axis=(1, 2)))


@pytest.mark.parametrize(("dtype", "factor"), [(jnp.float32, -2.0), (jnp.bfloat16, -1.0)])
def test_no_other_segment_changes_an_output_by_a_bit(dtype, factor):
    inputs = make_inputs(value_std=0.5)  # in bfloat16 all values stay anchored
    changed = [x.copy() for x in inputs]
    changed[2][0, :20] *= factor
    options = {"kind": "laser", "sizes": BLOCKS, "segment_ids": SEGMENTS}
    before, after = (output(x, dtype, **options) for x in (inputs, changed))
    np.testing.assert_array_equal(before[0, 20:], after[0, 20:])


def test_under_scan_remat_and_vmap():
    query, key, value, _ = (jnp.float32(x) for x in make_inputs(length=40))

    def layer(query, key, value):
        return kernels(query, key, value, kind="laser", sizes=BLOCKS)[0]

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
    np.testing.assert_array_equal(mapped, one_at_a_time)


def test_a_policy_can_keep_the_output(capsys):
    query, key, value, _ = (jnp.float32(x) for x in make_inputs(length=40))

    def loss(value):
        return kernels(query, key, value, kind="laser", sizes=BLOCKS)[0].sum()

    policy = jax.checkpoint_policies.save_only_these_names(fused.OUTPUT_NAME)
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(loss, policy=policy), value)
    saved = [line for line in capsys.readouterr().out.splitlines() if fused.OUTPUT_NAME in line]
    assert len(saved) == 4, saved  # output, log of the sum of exponentials, two of bool


@KINDS
def test_heads_and_rows_over_a_mesh(kind):
    inputs = [jnp.asarray(np.concatenate([x, x]), jnp.float32) for x in make_inputs(length=40)]
    query, key, value, d_out = inputs

    def value_and_gradients(query, key, value):
        out, vjp = jax.vjp(lambda *x: kernels(*x, kind=kind, sizes=BLOCKS)[0], query, key, value)
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
        assert interface._choose(x, x, kind, None, None, None)[0] == chosen
        assert interface._choose(x, x, kind, None, 0, None)[0] == "chunked"


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
