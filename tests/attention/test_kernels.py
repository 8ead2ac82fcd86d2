"""The fused kernels, in Pallas' interpret mode: what test_implementations.py does not ask of them.

Blocks are small here, so that a short sequence has several of them and each has several tiles.

Shapes: (batch, length, heads, size).
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from laser.attention import attention, chunked, interface
from laser.attention.kernels import backward, blocks, common, exact, forward, fused
from tests.attention.closeness import assert_close, errors
from tests.attention.implementations import (
    PALLAS,
    PALLAS_ONE_BLOCK,
    PALLAS_ONE_TILE,
    D,
    meets_exact_path,
    oracle,
    rounded,
)

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
    assert range_nats < chunked.RANGE_LIMIT_NATS
    assert not meets_exact_path(PALLAS, inputs, kind="laser")


@pytest.mark.parametrize("large, others", [(55, -60), (110, 16)], ids=["narrow", "wide"])
@pytest.mark.slow
def test_a_weight_that_float32_does_not_hold_counts_where_its_value_is_large(large, others):
    """The key that has e^-95 of the weight decides, or has a share, once values are exponentials.

    In each case the form of the kernel that the values ask for loses it.
    """
    query, key, value, d_out = PALLAS.inputs()
    query[:], key[:], value[:] = 0, 0, others + 0.1 * value
    query[..., 0], key[:, 10, :, 0], value[:, 10] = 1, -268.75, large  # times D^-1/2: -95
    inputs = (query, key, value, d_out)
    actual = PALLAS.run(inputs, jnp.float32, kind="laser")[0]
    # 110 log2 e in float32 is off by up to 8e-6, a factor of its exponential.
    assert_close(actual, oracle(inputs, kind="laser"), 3e-5)


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_wide_form_moves_earlier_tiles_by_no_more_than_it_says(dtype):
    """A later value above 60 nats brings it; bits stay where values are up to 22 until then.

    Features in turn: all values near 28; one of 30 with a weight of e^-60; and all near 0.
    """
    query, key, value, _ = PALLAS.inputs(value_std=0.3)
    query[..., 0], key[..., 0], key[:, 5, :, 0] = 1, 0, -60 * D**0.5
    value[..., ::4] += 28
    value[:, 5, :, 1::4] = 30
    changed, start = value.copy(), PALLAS.late // PALLAS.block * PALLAS.block
    changed[:, start:] = 70
    before, after = (
        PALLAS.output((query, key, x, value), dtype, kind="laser")[:, :start]
        for x in (value, changed)
    )
    np.testing.assert_array_equal(before[..., 2::4], after[..., 2::4])
    np.testing.assert_array_equal(before[..., 3::4], after[..., 3::4])
    moved = 1e-5 if dtype == jnp.float32 else 2**-8
    rounding = float(jnp.finfo(dtype).eps)
    for features in (np.s_[..., ::4], np.s_[..., 1::4]):
        assert dtype == jnp.bfloat16 or (before[features] != after[features]).any()
        np.testing.assert_allclose(before[features], after[features], rtol=rounding, atol=moved)


@pytest.mark.parametrize("far", [39.0, 41.0])
def test_the_exact_path_begins_40_nats_below_the_reference(far):
    """Of 2^64 here: the first query sees one key alone, and all others a value of 61, too."""
    inputs = PALLAS.inputs(value_std=0.01)
    inputs[2][:, 0] = 64 * np.log(2) - far
    inputs[2][:, 1] = 61
    _, range_nats = PALLAS.run(inputs, gradients=False, kind="laser")
    met = far > 40
    np.testing.assert_allclose(range_nats, fused.LARGEST_RANGE if met else far, rtol=1e-5)
    assert meets_exact_path(PALLAS, inputs, kind="laser") == met


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
    query[..., 0], key[:, 60, :, 0], value[:, 60] = 1, -130, 70  # times D^-1/2: -46
    inputs = rounded((query, key, value, d_out))
    actual = tried.run(inputs, jnp.bfloat16, kind="laser")[0]
    assert_close(actual, oracle(inputs, kind="laser"), 8e-3)


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
    inputs = [np.concatenate([x, x]) for x in PALLAS_ONE_TILE.inputs(length=40)]
    query, key, value, d_out = map(jnp.float32, inputs)

    def value_and_gradients(query, key, value):
        out, vjp = jax.vjp(lambda *x: PALLAS_ONE_TILE.call(*x, kind=kind)[0], query, key, value)
        return out, *vjp(d_out)

    alone = jax.jit(value_and_gradients)(query, key, value)
    axes = (jax.sharding.AxisType.Auto,) * 3
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=axes)):
        spread = jax.jit(value_and_gradients)(query, key, value)
        assert len(spread[0].sharding.device_set) == 8
    for a, b in zip(alone, spread, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_of_keys_left_to_the_exact_path_are_rounded_once():
    """Every query of 16 blocks is uncertified, and adds to the same keys and values."""
    options = common.Options(
        laser=True, causal=True, scale=0.3, soft_cap=0.0, block=16, tile=16, backward_tile=16
    )
    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(1, heads, 256, D)), jnp.bfloat16) for heads in (2, 1, 1, 2)
    )
    run = jax.jit(functools.partial(exact.add_gradients, segment_ids=None, options=options))

    def found(dtype):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        y = jnp.zeros(d_out.shape, jnp.float32)
        gradients = run([jnp.zeros_like(x) for x in arrays], y, d_out, *arrays)
        return [x.astype(jnp.bfloat16) for x in gradients]

    for rounded_at_the_end, given in zip(found(jnp.float32), found(jnp.bfloat16), strict=True):
        np.testing.assert_array_equal(rounded_at_the_end, given)


@pytest.mark.parametrize("count", [1, 2])
def test_the_cost_counts_every_exponential(count):
    """Of logits, half of them hidden; of values, once for each pair of blocks; and of outputs."""
    options = common.Options(
        laser=True, causal=True, scale=1.0, soft_cap=0.0, block=16, tile=16, backward_tile=16
    )
    shape = (2, 3, 16 * count, D)
    heads, of_block, met = 2 * 3, 16 * D, {1: 1, 2: 3}[count]
    logits = heads * (16 * count) ** 2 // 2
    costs = [kernel.cost(shape, D, options, [], []) for kernel in (forward, backward)]
    ends = heads * count * of_block  # log(y) of outputs; exp(V) that dV is multiplied with
    of_pairs = heads * met * of_block
    expected = [logits + of_pairs + ends, logits + 3 * of_pairs + ends]
    assert [cost.transcendentals for cost in costs] == expected


@pytest.mark.parametrize(
    "tiles", [(512, 256, 128), (1024, 512, 256)], ids=lambda tiles: "-".join(map(str, tiles))
)
@pytest.mark.slow
def test_the_tables_own_tiles(tiles):
    sizes = blocks.BlockSizes(*tiles)
    assert tiles[1:] in [row[2:] for row in blocks.TILES]
    tried = dataclasses.replace(
        PALLAS, call=functools.partial(PALLAS.call.func, sizes), length=sizes.block
    )
    inputs = tried.inputs()
    actual, _ = tried.run(inputs, kind="laser")
    assert_close(actual, oracle(inputs, kind="laser"), 3e-6)


SHARDINGS = {
    "whole": (P(), P(), P()),
    "rows": (P("data"), P("data"), P("data")),
    "heads": (P("data", None, "tensor"),) * 3,
    "mixed": (P(None, "data", "tensor"), P(("data", "tensor")), P(None, None, None, "tensor")),
}


@pytest.mark.parametrize("specs", SHARDINGS.values(), ids=SHARDINGS)
@pytest.mark.parametrize("types", ["explicit", "mixed"])
def test_arrays_of_any_sharding_under_an_explicit_mesh(specs, types):
    """The output is sharded as the query is, and each gradient as its array."""
    axis_type = jax.sharding.AxisType
    second = axis_type.Explicit if types == "explicit" else axis_type.Auto
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(axis_type.Explicit, second))
    if types == "mixed":
        specs = [P(*("data" if name == "data" else None for name in spec)) for spec in specs]

    def check(query, key, value, segment_ids):
        call = functools.partial(PALLAS_ONE_TILE.call, kind="laser", segment_ids=segment_ids)
        out, vjp = jax.vjp(lambda *x: call(*x)[0], query, key, value)
        given, found = (
            [jax.typeof(x).sharding.spec for x in arrays]
            for arrays in ((query, query, key, value), (out, *vjp(out)))
        )
        assert found == [P(*given[0][:3], None), *given[1:]]

    shape = (4, 40, 4, D)
    with jax.set_mesh(mesh):
        arrays = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
            for spec in specs
        ]
        segments = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=jax.NamedSharding(mesh, P()))
        for segment_ids in (None, segments):
            jax.eval_shape(check, *arrays, segment_ids)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["heads", "mixed"])
def test_values_and_gradients_under_an_explicit_mesh(sharding):
    inputs = [np.concatenate([x, x]) for x in PALLAS_ONE_TILE.inputs(length=40)]
    arrays = [jnp.float32(x) for x in inputs[:3]]

    def found(query, key, value):
        out, vjp = jax.vjp(lambda *x: PALLAS_ONE_TILE.call(*x, kind="laser")[0], query, key, value)
        return out, *vjp(jnp.sin(out))

    alone = jax.jit(found)(*arrays)
    axes = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=axes)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, jax.NamedSharding(mesh, spec))
            for x, spec in zip(arrays, SHARDINGS[sharding], strict=True)
        ]
        spread = jax.jit(found)(*placed)
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
        jax.eval_shape(lambda x: attention(x, x, x, kind="standard", implementation="pallas"), x)


def test_a_mesh_that_does_not_divide_the_heads_is_named():
    x = jax.ShapeDtypeStruct((8, 128, 3, 64), jnp.float32)
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=axes)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"'tensor'.* split 3 heads over 2"):
        jax.eval_shape(lambda x: attention(x, x, x, kind="standard", implementation="pallas"), x)


def described_mesh(platform, kind=None):
    device = jax.sharding.AbstractDevice(
        device_kind=kind or platform, num_cores=None, platform=platform
    )
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


@pytest.mark.parametrize(
    ("device_kind", "length", "size", "chosen"),
    [
        ("TPU v5 lite", 8192, 720, ("pallas", "")),
        ("TPU v4", 1024, 128, ("pallas", "")),
        ("TPU v3", 1024, 256, ("pallas", "")),
        ("TPU v4", 8192, 720, ("chunked", "the limit is 16")),
        ("TPU v2", 2**15, 64, ("chunked", "the limit is 16")),
    ],
)
def test_the_chips_memory_decides(device_kind, length, size, chosen):
    x = jax.ShapeDtypeStruct((1, length, 2, size), jnp.bfloat16)
    options = {"segment_ids": None, "logits_soft_cap": None}
    with jax.sharding.use_abstract_mesh(described_mesh("tpu", device_kind)):
        found, why = interface._choose(x, x, x, "laser", options)
        call = functools.partial(attention, kind="laser", implementation=found)
        jaxpr = str(jax.make_jaxpr(call)(x, x, x)) if found == "pallas" else ""
    assert found == chosen[0]
    assert chosen[1] in why
    limit = 16 if device_kind in blocks.OLDER_VMEM_BYTES else 64
    used = {int(number) for number in re.findall(r"vmem_limit_bytes=(\d+)", jaxpr)}
    assert (found == "pallas") == bool(used)
    assert max(used, default=0) <= limit * blocks.MEBI


def test_the_tables_memory_is_the_estimate():
    first, second = re.findall(r"(?:^\| \d+ \|.*\n)+", blocks.__doc__, re.MULTILINE)
    for row in first.splitlines():
        size, tiles, memory, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        sizes = blocks.BlockSizes(1024, *map(int, tiles.split(",")))
        assert sizes == blocks.block_sizes(1024, int(size), int(size), 2)
        needed = blocks.vmem_estimate(1024, int(size), int(size), sizes, 2)
        assert memory == f"{needed / blocks.MEBI:.0f}", row
    for row in second.splitlines():
        size, block, memory = map(int, row.split("|")[1:4])
        sizes = blocks.block_sizes(8192, size, size, 2)
        assert (sizes.block, sizes.tile) == (block, 512)
        needed = blocks.vmem_estimate(8192, size, size, sizes, 2)
        assert memory == round(needed / blocks.MEBI), row


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
