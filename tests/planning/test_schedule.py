"""Schedules: of programs whose cost is known by construction, by hand and from the compiler."""

import importlib.util
import json

import pytest

from laser.planning.hlo import Module
from laser.planning.schedule import COPIES, KERNELS, PRODUCTS, TRANSFERS, WORK, read_schedule
from laser.training.hardware import CHIPS
from tests import forked

V5P = CHIPS["TPU v5"]
US = 1e-6

# As XLA for TPUs writes them, without what is not read: a loop of seven rounds, in which a gather
# goes on beside a product and another one waits, around kernels, copies and a rare path.
HLO = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/layers.py"
2 "/somewhere/share.py"

FunctionNames
1 "gather"
2 "layer"

FileLocations
1 {file_name_id=1 function_name_id=2 line=49 end_line=50 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=100 end_line=100 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%start (p: bf16[8,64]) -> bf16[16,2000,1000] {
  %all-gather.9 = bf16[16,2000,1000]{2,1,0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%inner (p: bf16[64]) -> bf16[64] {
  ROOT %convolution.1 = bf16[64]{0} convolution(%p, %p), dim_labels=bf_io->bf
}

%async_collective_fusion.1 (p: bf16[64]) -> bf16[64] {
  %fusion.8 = bf16[64]{0} fusion(%p), kind=kOutput, calls=%inner
  ROOT %t.1 = (bf16[64]{0}, bf16[64]{0}) tuple(%fusion.8, %p)
}

%moved (p: bf16[64], i: s32[]) -> bf16[64] {
  %i = s32[]{:T(128)} parameter(1)
  %less = pred[]{:T(512)} compare(%i, %i), direction=LT
  ROOT %dynamic_slice.1 = bf16[64]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={64}
}

%norm (p: bf16[64]) -> bf16[64] {
  ROOT %multiply.1 = bf16[64]{0} multiply(%p, %p)
}

%body (p: (s32[], bf16[64])) -> (s32[], bf16[64]) {
  %gather.1 = bf16[8,1000,1000]{2,1,0} all-gather(%p), replica_groups={{0,4},{1,5}}, dimensions={0}, metadata={op_name="x" stack_frame_id=2}
  %async-collective-start.1 = (bf16[4]{0}, bf16[16]{0}) fusion(%x), kind=kCustom, calls=%start
  %fusion.1 = bf16[64]{0} fusion(%y), kind=kOutput, calls=%async_collective_fusion.1, backend_config={"window_config":{"estimated_cycles":"175000"}}
  %async-collective-done.1 = bf16[128,64]{1,0} fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.2 = bf16[64]{0} fusion(%y, %i), kind=kLoop, calls=%moved, backend_config={"window_config":{"estimated_cycles":"17500"}}
  %fusion.3 = bf16[64]{0} fusion(%y), kind=kLoop, calls=%norm, metadata={op_name="y" stack_frame_id=1}, backend_config={"window_config":{"estimated_cycles":"35000"}}
  ROOT %t = (s32[], bf16[64]{0}) tuple(%i, %fusion.3)
}

%condition (p: (s32[], bf16[64])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %constant.7), direction=LT
}

%unbounded (p: (s32[], bf16[64])) -> pred[] {
  ROOT %flag = pred[] get-tuple-element(%p), index=1
}

%usual (p: bf16[64]) -> bf16[64] {
  ROOT %copy.1 = bf16[64]{0} copy(%p), backend_config={"estimated_cycles":"1750"}
}

ENTRY %main (p: f32[10]) -> f32[10] {
  %while.1 = (s32[], bf16[64]{0}) while(%t), condition=%condition, body=%body
  %while.2 = (s32[], bf16[64]{0}) while(%t), condition=%unbounded, body=%body
  %conditional.1 = bf16[64]{0} conditional(%f, %t, %t), true_computation=%body, false_computation=%usual
  %laser_forward.6 = (bf16[4,8,1024,512]{3,2,1,0}, f32[4,8]{1,0}) custom-call(%q), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"45900000000","transcendentals":"1","bytes_accessed":"64"}}}
  %copy-start.1 = (bf16[2765,10000]{1,0:S(1)}, bf16[2765,10000]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %fusion.4 = bf16[64]{0} fusion(%y), kind=kLoop, calls=%norm, backend_config={"window_config":{"estimated_cycles":"17500"}}
  %copy-done.1 = bf16[2765,10000]{1,0:S(1)} copy-done(%copy-start.1)
  %slice.1 = f32[2765,1000]{1,0} bitcast(%p)
  ROOT %update.1 = f32[2765,1000000]{1,0} dynamic-update-slice(%p, %slice.1, %i, %i)
}
"""  # noqa: E501


def links(axes):
    return frozenset(axes), 200e9 * len(axes)


def read(bundles):
    return read_schedule(Module(HLO), {"fsdp": 2, "fsdp_1": 4}, V5P, links, bundles)


def test_a_schedule_that_is_known_by_construction():
    found = read({})
    # Of a round's two gathers one is waited for, 8 MB at 200 GB/s; the other takes 240 us, of which
    # 100 go by behind the product. The copy from memory takes 20 us, half of it behind a fusion.
    a_round = {TRANSFERS: 40 + 140, PRODUCTS: 100, COPIES: 10, WORK: 20}
    after = {COPIES: 1 + 10 + 8, WORK: 10, KERNELS: 100}
    for kind, seconds in found.waited.items():
        expected = 7 * a_round.get(kind, 0) + after.get(kind, 0)
        assert seconds == pytest.approx(expected * US, rel=1e-3), kind
    assert found.seconds == pytest.approx(sum(found.waited.values()))
    assert found.hidden == pytest.approx({PRODUCTS: 700 * US}, rel=1e-3)
    assert [(x.what, x.count) for x in found.transfers] == [
        ("all-gather fsdp_1", 7), ("all-gather fsdp", 7),
    ]  # fmt: skip
    assert found.transfers[1].gib == 7 * 8e6 / 2**30
    first, second, *_ = found.heaviest
    assert (first.waited, first.source) == (pytest.approx(980 * US, rel=1e-3), "")
    assert (second.what, second.source) == ("all-gather fsdp", "/somewhere/share.py:100")
    assert PRODUCTS not in {line.kind for line in found.heaviest}


def test_kernels_take_their_bundles_where_they_are_known():
    assert read({}).kernels_by == "roofline"
    found = read({"laser_forward": 175})  # of each of 4 rows and 8 heads
    assert found.kernels_by == "bundles"
    assert found.waited[KERNELS] == pytest.approx(3.2 * US)


def test_transfers_over_the_same_links_wait_for_each_other():
    """Two that start at once take as long as one after the other, on other links as the longer."""

    def waited(groups):
        first = "%async-collective-start.1 = (bf16[4]{0}, bf16[16]{0}) fusion(%x), calls=%start"
        hlo = HLO.replace(
            f"  {first.replace('fusion(%x)', 'fusion(%x), kind=kCustom')}",
            f"  %all-gather-start.5 = (bf16[4]{{0}}, bf16[4,2000,1000]{{0}}) all-gather-start(%x), "
            f"replica_groups={groups}\n"
            f"  {first.replace('fusion(%x)', 'fusion(%x), kind=kCustom')}",
        ).replace(
            "  %async-collective-done.1",
            "  %all-gather-done.5 = bf16[4]{0} all-gather-done(%all-gather-start.5)\n"
            "  %async-collective-done.1",
        )
        found = read_schedule(Module(hlo), {"fsdp": 2, "fsdp_1": 4}, V5P, links, {})
        return found.waited[TRANSFERS] / 7 / US - 40

    assert waited("{{0,1,2,3},{4,5,6,7}}") == pytest.approx(60 + 240 - 100, rel=1e-3)
    assert waited("{{0,4},{1,5}}") == pytest.approx(240 - 100, rel=1e-3)


# Two programs for eight chips of v5p: a product that needs what is gathered, and one that does not.
COMPILED = """
import json, sys
sys.path.insert(0, ".")
from laser.planning import topologies
topology = topologies.parse_topology("v5p:2x2x2")
topologies.prepare_environment(topology)
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from laser.planning.hlo import Module
from laser.planning.schedule import read_schedule
from laser.training.hardware import CHIPS

mesh = Mesh(np.array(topologies.devices(topology)), ("x",))
links = lambda axes: (frozenset(axes), 100e9)
OPTIONS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}

def schedule(dependent):
    def local(a, b, part):
        whole = jax.lax.all_gather(part, "x").reshape(-1, part.shape[1])
        return (a @ whole, b) if dependent else (a @ b, whole)

    specs = (P("x"), P(), P("x"))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P("x"), P()), check_vma=False)
    shapes = ((8 * 4096, 4096), (4096, 8192), (4096, 8192))
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs)
    ]
    hlo = jax.jit(run).lower(*arrays).compile(compiler_options=OPTIONS).as_text()
    found = read_schedule(Module(hlo), {"x": 8}, CHIPS["TPU v5"], links, {})
    return {"waited": found.waited, "hidden": found.hidden, "seconds": found.seconds}

print(json.dumps([schedule(dependent) for dependent in (True, False)]))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu"
)
@pytest.mark.slow
def test_a_product_and_a_gather_that_the_compiler_scheduled():
    result = forked.run_for_tpu(COMPILED, optimized=True)
    assert result.returncode == 0, result.stderr[-2000:]
    product = 2 * 4096 * 4096 * 8192 / V5P.flops
    gather = 4096 * 8192 * 2 * 7 / 8 / 100e9
    dependent, independent = json.loads(result.stdout.splitlines()[-1])
    for found in (dependent, independent):
        assert found["waited"][PRODUCTS] == pytest.approx(product, rel=0.1)
        moved = found["waited"][TRANSFERS] + sum(found["hidden"].values())
        assert moved == pytest.approx(gather, rel=0.01)
        assert found["seconds"] == pytest.approx(sum(found["waited"].values()))
    assert dependent["hidden"] == {}
    assert independent["hidden"][PRODUCTS] > 0.8 * gather
