"""Standard and LASER attention by Pallas kernels for TPUs, with exact gradients.

The forward kernel certifies its outputs by the size of the values and of the sum under the
logarithm. Where one fails, its wide form runs, and the few blocks that hold an output which that
does not certify either are repaired by the exact path. The backward pass reads the output in place
of a second residual, which is as good as long as the output is neither far below the largest value
nor too large for its dtype to say the logarithm precisely; else it runs the forward kernel again
for the float32 sums. None of this costs anything where it is not needed.

Shapes: B batch, T length, N padded length, H heads of queries, K of keys and values, D size.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from laser.attention.chunked import LN_2, normaliser, once_differentiable
from laser.attention.kernels import blocks, common, exact
from laser.attention.kernels.backward import backward
from laser.attention.kernels.blocks import BlockSizes
from laser.attention.kernels.common import STATISTICS, Options
from laser.attention.kernels.forward import forward
from laser.attention.products import device_of_program

Array = jax.Array

OUTPUT_NAME = "attention_output"  # for policies of jax.checkpoint: saves the forward kernel
HEAD_AXES = ("tensor",)  # mesh axes that split heads; all others split the batch
NO_SEGMENT = np.iinfo(np.int32).min  # of the padding; callers may not use it

# The output serves as the residual up to this size: 2^-9 (bfloat16) or 2^-24 (float32) of it is the
# relative error of exp(-out), at most 1.6 % and 1e-6. With LARGEST_RISE it also leaves room for dO,
# of which dO · exp(-out) is made: from 1e-25 to 1e17.
LARGEST_RESIDUAL = {jnp.dtype(jnp.bfloat16): 8.0, jnp.dtype(jnp.float32): 16.0}

LARGEST_RANGE = -math.log(jnp.finfo(jnp.float32).tiny)


def check(query: Array, key: Array, value: Array) -> None:
    """Raises ValueError, naming the limit, where the kernels cannot serve such arrays."""
    found = {x.dtype for x in (query, key, value)}
    if len(found) > 1 or not found <= set(LARGEST_RESIDUAL):
        wrong = ", ".join(sorted(str(dtype) for dtype in found))
        raise ValueError(
            "implementation='pallas' takes float32 or bfloat16, the same for all of them; "
            f"got {wrong}; use 'chunked'"
        )
    length, d_qk, d_v = query.shape[1], query.shape[-1], value.shape[-1]
    if max(d_qk, d_v) > blocks.LARGEST_SIZE:
        raise ValueError(
            f"implementation='pallas' serves head sizes up to {blocks.LARGEST_SIZE}; got {d_qk} "
            f"and {d_v}; use 'chunked'"
        )
    limit = _vmem_limit()
    needed = blocks.vmem_estimate(**_shapes(query, value), sizes=_block_sizes(query, value))
    if needed > limit:
        raise ValueError(
            f"implementation='pallas' needs {needed / blocks.MEBI:.0f} MiB of on-chip memory at "
            f"length {length} and head sizes {d_qk} and {d_v}; the limit is "
            f"{limit // blocks.MEBI}; use 'chunked'"
        )
    for what, size, names in zip(("batch", "heads"), value.shape[::2], _mesh_axes(), strict=True):
        devices = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)
        if size % devices:
            raise ValueError(
                f"implementation='pallas': mesh axes {names} split {size} {what} over {devices} "
                "devices, which do not divide it; use 'chunked'"
            )


def _shapes(query: Array, value: Array) -> dict[str, Any]:
    """What block sizes and the memory for them depend on, under the names that blocks.py has."""
    return {
        "length": query.shape[1],
        "d_qk": query.shape[-1],
        "d_v": value.shape[-1],
        "itemsize": query.dtype.itemsize,
        "grouped": query.shape[2] > value.shape[2],
    }


def _vmem_limit() -> int:
    return blocks.vmem_limit(device_of_program().device_kind)


def _block_sizes(query: Array, value: Array) -> BlockSizes:
    return blocks.block_sizes(**_shapes(query, value), limit=_vmem_limit())


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    kind: str,
    logits_scale: float,
    causal: bool,
    segment_ids: Array | None,
    logits_soft_cap: float | None,
    window: tuple[int, int] | None = None,
    sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """The interface's contract; see `laser.attention.attention`.

    Under a mesh (jax.set_mesh) each device computes its own heads of its own rows of the batch.
    Along Explicit axes the arrays may be sharded in any way, and the output is sharded as the query
    is, but for its last dim, which is whole.

    Args:
      sizes: block sizes in place of those of the table, for tests and searches.
      interpret: run on the CPU, slowly, for tests.

    Returns:
      (B, T, H, D_v) in the dtype of `value`, and the float32 scalar range as of
      `chunked.attention`. A range too large for a float32 exponent is given as 87 nats, and so it
      is wherever the exact path ran.

    Raises:
      ValueError: see `check`.
    """
    if sizes is None:
        check(query, key, value)
        sizes = _block_sizes(query, value)
        if window is not None:
            sizes = blocks.in_window(sizes, window)
    options = Options(
        laser=kind == "laser",
        causal=causal,
        scale=float(logits_scale),
        soft_cap=float(logits_soft_cap or 0),
        block=sizes.block,
        tile=sizes.tile,
        backward_tile=sizes.backward_tile,
        window=window,
        vmem_bytes=blocks.vmem_estimate(**_shapes(query, value), sizes=sizes),
        interpret=interpret,
    )
    if segment_ids is None and not causal and query.shape[1] % sizes.block:
        segment_ids = jnp.zeros(query.shape[:2], jnp.int32)  # tells keys from padding
    run = _sharded(functools.partial(_padded, options=options), segment_ids is None)
    out, range_BH = run(query, key, value, segment_ids)
    return out, range_BH.max()


def _mesh_axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes of the mesh in context that split the batch, and those that split heads."""
    mesh = jax.sharding.get_abstract_mesh()
    split = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    split = [name for name in split if name not in mesh.manual_axes]
    heads = tuple(name for name in split if name in HEAD_AXES)
    return tuple(name for name in split if name not in HEAD_AXES), heads


def _sharded(run, without_segments: bool):
    """`run` on every device of the mesh in context, if there is one of more than one device."""
    batch, heads = (names or None for names in _mesh_axes())
    if batch is None and heads is None:
        return run
    arrays = PartitionSpec(batch, None, heads, None)
    spread = jax.shard_map(
        run,
        in_specs=(arrays,) * 3 + (None if without_segments else PartitionSpec(batch, None),),
        out_specs=(arrays, PartitionSpec(batch, heads)),
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return _resharded(spread) if jax.sharding.get_abstract_mesh().explicit_axes else spread


def _resharded(spread):
    """`spread` of arrays of any sharding: along Explicit axes jax moves nothing by itself."""
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    batch, heads = (tuple(x for x in names if x in explicit) or None for names in _mesh_axes())

    def run(query, key, value, segment_ids):
        given = jax.typeof(query).sharding.spec
        arrays = (jax.reshard(x, PartitionSpec(batch, None, heads)) for x in (query, key, value))
        if segment_ids is not None:
            segment_ids = jax.reshard(segment_ids, PartitionSpec(batch))
        out, range_BH = spread(*arrays, segment_ids)
        return jax.reshard(out, PartitionSpec(*given[:3])), range_BH

    return run


def _padded(query, key, value, segment_ids, *, options: Options):
    """Heads before positions, whole blocks; (B, T, H, D) and the range (B, H)."""
    length = query.shape[1]
    padding = -length % options.block

    def prepare(x):
        # Repeating the last token keeps padding within the range of what is there already.
        x = x.transpose(0, 2, 1, 3)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)), mode="edge") if padding else x

    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)[:, None]
        segment_ids = jnp.pad(
            segment_ids, ((0, 0), (0, 0), (0, padding)), constant_values=NO_SEGMENT
        )
    out, range_BH = _attend(prepare(query), prepare(key), prepare(value), segment_ids, options)
    return out[:, :, :length].transpose(0, 2, 1, 3), range_BH


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segment_ids, options: Options):
    """Attention of (B, H, N, D) over (B, K, N, D), and the range (B, H)."""
    return _attend_fwd(q, k, v, segment_ids, options)[0]


def _row_major(x: Array) -> Array:
    """`x` laid out as kernels take it, here and not again in each branch that follows."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _attend_fwd(q, k, v, segment_ids, options: Options):
    q, k, v = map(_row_major, once_differentiable((q, k, v)))
    found = forward(q, k, v, segment_ids, options)
    range_BH, residual = jnp.zeros(q.shape[:2], jnp.float32), None
    if options.laser:

        def wide_form(q, k, v, segment_ids):
            form = dataclasses.replace(options, wide=True)
            out, log_sum, statistics = forward(q, k, v, segment_ids, form)
            failed = (_row(statistics, "smallest_out") == -jnp.inf).any(-1)
            out = exact.repair(out, q, k, v, segment_ids, failed, form)
            return out, log_sum, statistics

        found = _redone(found, ~_certified(found[2]), wide_form, q, k, v, segment_ids)
        range_BH, residual = (
            _range(found[2]),
            _residual(found[0], found[2], q.shape[1] // k.shape[1], options),
        )
    # A dim of size 1 that is next to last would take the space of 8 in memory.
    named = (found[0], found[1][:, :, 0], residual)
    out, log_sum, residual = jax.tree.map(lambda x: checkpoint_name(x, OUTPUT_NAME), named)
    return (out, range_BH), (q, k, v, segment_ids, out, log_sum, residual)


def _redone(found, failed: Array, function, *given: Array | None):
    """`found` with function(*given) in place of those rows of the batch that failed, (B,).

    They are done one at a time, for the sake of memory, in a loop that does not turn in the usual
    case; unlike a conditional it copies nothing that it may change.
    """

    def redo(state):
        found, failed = state
        (row,), failed = exact.next_flag(failed)
        again = function(*(None if x is None else _of_row(x, row) for x in given))
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=row, axis=0)
        return tuple(map(put, found, again)), failed

    return lax.while_loop(lambda state: state[1].any(), redo, (tuple(found), failed))[0]


def _of_row(x: Array, row: Array) -> Array:
    return lax.dynamic_slice_in_dim(x, row, 1)


def _certified(statistics: Array) -> Array:
    """Whether float32 holds the sums of exponentials as they are, of each row of the batch."""
    largest = _row(statistics, "largest_value")
    # Weights are at most 1, and both they and their products may be lost to underflow.
    smallest = common.SMALLEST_SHARE * jnp.exp(jnp.maximum(largest, 0))
    fits = largest <= common.LARGEST_NARROW_VALUE
    return (fits & (_row(statistics, "smallest_y") >= smallest)).all((1, 2, 3))


def _range(statistics: Array) -> Array:
    """(B, H) float32, nats from the reference of the wide form down to the smallest output.

    What that form leaves to the exact path counts as -inf here.
    """
    power = common.reference_power(_row(statistics, "largest_value"))
    range_nats = power * LN_2 - _row(statistics, "smallest_out")
    return jnp.clip(range_nats, 0, LARGEST_RANGE).max((2, 3))


def _attend_bwd(options: Options, residuals, cotangents):
    q, k, v, segment_ids, out, log_sum, residual = residuals
    # A scan over layers keeps them in one array each, of which XLA would take a layer's k and v out
    # twice: the kernel reads them in blocks and in samples.
    q, k, v = lax.optimization_barrier((q, k, v))
    log_sum = log_sum[:, :, None]
    d_out = _row_major(cotangents[0])  # the range is a report; nothing is trained on it
    reference = None
    if options.laser:
        reference = jnp.stack([jnp.zeros_like(residual.smallest), residual.smallest], axis=2)
    gradients = backward(q, k, v, out, d_out, log_sum, segment_ids, reference, options)
    if options.laser:

        def from_sums(q, k, v, d_out, log_sum, segment_ids):
            form = dataclasses.replace(options, wide=True)
            largest = v.max(axis=2, keepdims=True).astype(jnp.float32)
            smallest = v.min(axis=2, keepdims=True).astype(jnp.float32)
            reference = jnp.concatenate([common.reference_power(largest), smallest], axis=2)
            y = forward(q, k, v, segment_ids, form, reference=largest, raw=True)[0]
            # Gradients are linear in dO, which is divided by sums of any size.
            to_one, back = normaliser(d_out, axis=(1, 2, 3))
            d_out *= to_one.astype(d_out.dtype)
            gradients = backward(q, k, v, y, d_out, log_sum, segment_ids, reference, form, raw=True)
            gradients = exact.add_gradients(gradients, y, d_out, q, k, v, segment_ids, form)
            return tuple(x * back.astype(x.dtype) for x in gradients)

        given = (q, k, v, d_out, log_sum, segment_ids)
        gradients = _redone(gradients, ~residual.precise, from_sums, *given)
    return *gradients, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _row(statistics: Array, name: str) -> Array:
    """(B, H, blocks, D_v) of the forward kernel's statistics."""
    return statistics[:, :, :, STATISTICS.index(name)]


class Residual(NamedTuple):
    """What else the backward pass of LASER needs of the forward pass.

    Attributes:
      smallest: (B, K, D_v) float32, of all values.
      precise: (B,) bool, where the output may be read in place of the sums.
    """

    smallest: Array
    precise: Array


def _residual(out: Array, statistics: Array, group: int, options: Options) -> Residual:
    def of_all_keys(name, reduce):
        rows = _row(statistics, name)
        # Without a window the last block of queries has met every key.
        return rows[:, :, -1] if options.window is None else reduce(rows, axis=2)

    smallest_value = of_all_keys("smallest_value", jnp.min)
    largest_value = of_all_keys("largest_value", jnp.max)
    smallest, limit = _row(statistics, "smallest_out"), LARGEST_RESIDUAL[out.dtype]
    precise = (smallest >= -limit) & (largest_value[:, :, None] - smallest <= common.LARGEST_RISE)
    # No output is larger than the largest value; if that is too large, the outputs are looked at.
    small = (largest_value <= limit).all((1, 2))
    small = lax.cond(small.all(), lambda _: small, lambda x: (x <= limit).all((1, 2, 3)), out)
    if group > 1:  # whose heads of queries have the same values
        smallest_value = smallest_value[:, ::group]
    return Residual(smallest_value, precise.all((1, 2, 3)) & small)
