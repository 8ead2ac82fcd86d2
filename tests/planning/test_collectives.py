"""Collectives read from compiled programs: a small text by hand, and programs compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from laser.planning.collectives import collectives
from laser.planning.hlo import Module

# The forms in which XLA for TPUs writes what moves, with all else left out.
HLO = """\
HloModule jit_step

%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %c = bf16[] add(%a, %b)
}

%fused_start (p: bf16[8,64]) -> bf16[128,64] {
  %all-gather.1 = bf16[128,64]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}
}

%async_collective_fusion.1 (p: bf16[8,64]) -> bf16[128,64] {
  %all-gather.2 = bf16[128,64]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}
}

%all-reduce-scatter.1 (p: bf16[128,64]) -> bf16[32,64] {
  %all-reduce.1 = bf16[128,64]{1,0} all-reduce(%p), replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, to_apply=%add
  ROOT %dynamic-slice = bf16[32,64]{1,0} dynamic-slice(%all-reduce.1, %i, %z), dynamic_slice_sizes={32,64}
}

%body (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %async-collective-start.1 = (bf16[8,64]{1,0}, bf16[128,64]{1,0}) fusion(%x), kind=kCustom, calls=%fused_start
  %fusion.2 = bf16[128,64]{1,0} fusion(%y), kind=kOutput, calls=%async_collective_fusion.1
  %async-collective-done.1 = bf16[128,64]{1,0} fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.3 = bf16[32,64]{1,0:T(8,128)} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
  %scatter = bf16[8,64]{1,0} reduce-scatter(%z), replica_groups=[4,4]<=[16], dimensions={0}, to_apply=%add
  ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%i, %scatter)
}

%condition (p: (s32[], bf16[8,64])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %constant.5), direction=LT
}

%unbounded (p: (s32[], bf16[8,64])) -> pred[] {
  ROOT %flag = pred[] get-tuple-element(%p), index=1
}

ENTRY %main (p: f32[10]) -> f32[10] {
  %while.1 = (s32[], bf16[8,64]{1,0}) while(%t), condition=%condition, body=%body
  %while.2 = (s32[], bf16[8,64]{1,0}) while(%t), condition=%unbounded, body=%body
  %all-reduce.9 = (f32[10]{0}, f32[]) all-reduce(%p, %q), replica_groups=mesh['a'=1,'b'=16] {'b'}, to_apply=%add
  %send.1 = (f32[1000,8]{1,0:T(8,128)}, u32[], token[]) send(%p, %after), is_host_transfer=true, frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,3:5}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[1000,8]{1,0:T(8,128)}, u32[], token[]) recv(%after), is_host_transfer=true, frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,3:5}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %permute = f32[10]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_the_forms_of_tpu_programs():
    found = collectives(Module(HLO), {"data": 1, "fsdp": 4, "fsdp_1": 4})
    by_kind = {(c.kind, c.axes): c for c in found}
    assert len(found) == len(by_kind) == 6
    both, whole = ("fsdp", "fsdp_1"), 128 * 64 * 2
    gather = by_kind["all-gather", both]
    assert (gather.count, gather.bytes, gather.dtype) == (5, 5 * whole * 15 / 16, "bf16")
    assert by_kind["reduce-scatter", ("fsdp",)].bytes == 5 * whole * 3 / 4
    assert by_kind["reduce-scatter", ("fsdp_1",)].bytes == 5 * (8 * 64 * 2 * 4) * 3 / 4
    assert by_kind["all-reduce", both].bytes == 44 * 2 * 15 / 16
    assert by_kind["collective-permute", ("fsdp_1",)].bytes == 40
    assert by_kind["all-reduce", ("data",)].bytes == 1000 * 8 * 4 * 2 * 3 / 4  # over four slices


def compile_on_eight_devices(local, mesh, batch_shape):
    spec = PartitionSpec("data")
    run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct(batch_shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
    return jax.jit(run).lower(x).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def local(x):
        def layer(x, _):
            whole = jax.lax.all_gather(jnp.sin(x), "fsdp")
            return jax.lax.psum_scatter(jnp.cos(whole), "fsdp") * 0.5, None

        return jax.lax.psum(jax.lax.scan(layer, x, None, length=7)[0], "data")

    text = compile_on_eight_devices(local, mesh, (64, 16))
    found = {c.kind: c for c in collectives(Module(text), {"data": 2, "fsdp": 4})}
    part = 32 * 16 * 4
    assert found["all-gather"].count == found["reduce-scatter"].count == 7
    assert found["all-gather"].axes == found["reduce-scatter"].axes == ("fsdp",)
    assert found["all-gather"].bytes == 7 * part * 4 * 3 / 4
    assert found["reduce-scatter"].bytes == 7 * part * 4 * 3 / 4
    assert found["all-reduce"].axes == ("data",)
    assert found["all-reduce"].bytes == pytest.approx(part)
