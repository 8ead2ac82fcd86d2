"""The backward kernel: one pass over the blocks, five matrix products a tile.

With w = P · exp(V - out), LASER's gradients are dV = Σ dO · w and dlogits = Σ_d dO · w - P Σ_d dO.
No reference appears in them. G = dO · exp(-out) stands for dO, and E = exp(V) for V; all else is as
in standard attention. Where these are too large or too small, `raw`, one power of two per feature
and head serves all blocks, that of the largest value of the whole sequence: E = exp(V) / 2^c, and
G = dO / y, where y is relative to it too. Each pair of blocks forms G and E anew: exponentials, but
no transfers.

What bfloat16 rounds must not hide the small differences that gradients are made of:

- the rows of dlogits sum to 0, so that dQ is the same of keys less a vector common to all of them;
  what their rounding errors sum to would be multiplied by an offset that keys share. (Not with a
  soft cap, whose slopes differ. The columns have no such sum, so that dK has no such form.)
- exp(V) is rounded less a number μ of its feature near which it lies, where there is one. With
  Σ_s w = y: Σ_d G·E - Σ_d G·y = Σ_d G·(E - μ) - Σ_d G·(y - μ).
- that last sum is made, in float32, of the same rounded G as the first.

Where several heads of queries share one of keys, the grid goes through the heads of a group one
after the other, and the float32 sums of dK and dV are kept from the first to the last of them. With
one block to a sequence each head writes the sums so far, without a branch; the last one's stay.

A tile of logits is held transposed, keys along the rows, so that what belongs to a query is a row.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from laser.attention.chunked import LOG2_E
from laser.attention.kernels import common
from laser.attention.kernels.blocks import LANES, SAMPLED_ROWS, sampled_step
from laser.attention.kernels.common import Options

Array = jax.Array


class _Blocks:
    """The refs of a grid step under their names."""

    def __init__(self, refs, options: Options, segments: bool):
        refs = iter(refs)
        self.q, self.k, self.v, self.out = next(refs), next(refs), next(refs), next(refs)
        self.d_out, self.log_sum = next(refs), next(refs)
        self.query_segments: Any = next(refs) if segments else None
        self.key_segments: Any = next(refs) if segments else None
        self.reference: Any = next(refs) if options.laser else None
        self.some_values: Any = next(refs) if options.laser else None
        self.some_keys: Any = next(refs) if _centred(options, self.k.dtype) else None
        self.dq, self.dk, self.dv = next(refs), next(refs), next(refs)
        self.dq_sum, self.dk_sum, self.dv_sum = next(refs), next(refs), next(refs)


def _standard_queries(blocks: _Blocks, rows: slice) -> tuple[Array, Array]:
    """dO (R, D) and Σ_d dO · out as a row (1, R)."""
    d_out = blocks.d_out[rows, :]
    product = d_out.astype(jnp.float32) * blocks.out[rows, :].astype(jnp.float32)
    return d_out, common.to_row(product.sum(axis=1, keepdims=True))


def _laser_queries(blocks: _Blocks, mu: Array, rows: slice, raw: bool) -> tuple[Array, Array]:
    """G (R, D) and Σ_d G·(y - μ) as a row (1, R). Elements without a certificate are left out."""
    d_out = blocks.d_out[rows, :].astype(jnp.float32)
    if raw:
        y = blocks.out[rows, :]
        certified = y >= common.SMALLEST_CERTIFIED
        g = jnp.where(certified, d_out, 0.0) / jnp.where(certified, y, 1.0)
    else:
        log2_y = blocks.out[rows, :].astype(jnp.float32) * LOG2_E
        y, g = jnp.exp2(log2_y), d_out * jnp.exp2(-log2_y)
    g = g.astype(blocks.d_out.dtype)
    delta = (g.astype(jnp.float32) * (y - mu)).sum(axis=1, keepdims=True)
    return g, common.to_row(delta)


def _centred(options: Options, dtype) -> bool:
    """Whether dQ is made of keys less a common vector."""
    return dtype == jnp.bfloat16 and not options.soft_cap


def _shared_offset(some) -> Array:
    """(1, D) float32, of all rows: of the range of the means of some of them what is nearest to 0.

    One that stands out, which a query may not even see, does not move it.
    """
    means = some[...].astype(jnp.float32).mean(axis=1)
    lowest, highest = means.min(axis=0, keepdims=True), means.max(axis=0, keepdims=True)
    return jnp.maximum(lowest, jnp.minimum(highest, 0.0))


def _anchor(blocks: _Blocks, raw: bool) -> Array:
    """μ (1, D): exp(V) of an offset that values share, or 0 where one lies far below it."""
    smallest, offset = blocks.reference[1:2, :], _shared_offset(blocks.some_values)
    log2 = common.log2_exponential(offset, exact=raw)
    mu = jnp.exp2(log2 - blocks.reference[0:1, :] if raw else log2)
    return jnp.where(smallest >= offset - common.LARGEST_ANCHORED_FALL, mu, 0.0)


def _exponentials(blocks: _Blocks, rows: slice, raw: bool) -> Array:
    """exp(V), or with `raw` exp(V) / 2^c, of one tile of keys, float32."""
    # Where values are huge, the rounding of log2 exp(V) is a factor; it must be the one that is in
    # y.
    log2 = common.log2_exponential(blocks.v[rows, :], exact=raw)
    return jnp.exp2(log2 - blocks.reference[0:1, :] if raw else log2)


def _values(blocks: _Blocks, mu: Array | None, rows: slice, raw: bool):
    """What stands for the values, V or E - μ, and in the latter case E, float32."""
    if mu is None:
        return blocks.v[rows, :], None
    exponentials = _exponentials(blocks, rows, raw)
    return (exponentials - mu).astype(blocks.v.dtype), exponentials


def _weights(blocks: _Blocks, options: Options, key: int, query: int, crosses: bool, edges):
    """Transposed probabilities of a pair of tiles, float32, and the slope of the soft cap."""
    rows, columns = options.rows(key), options.rows(query)
    products = common.dot(blocks.k[rows, :], blocks.q[columns, :], (1, 1))
    logits, slope = common.capped(products, options)
    segments: tuple[Any, Any] = (None, None)
    if blocks.key_segments is not None:
        segments = (
            common.to_column(blocks.key_segments[:, rows]),
            blocks.query_segments[:, columns],
        )
    logits = common.masked(logits, *segments, crosses, query_axis=1, edges=edges)
    return jnp.exp2(logits - blocks.log_sum[:, columns]), slope


def _hides(blocks: _Blocks, crosses: bool) -> bool:
    """Whether some query of a pair of tiles may not see some key."""
    return crosses or blocks.key_segments is not None


def _step(
    blocks: _Blocks, options: Options, first_row, first_key, *,
    diagonal: bool, many: bool, member, raw: bool, apart: int = 0,
):  # fmt: skip
    """Adds all tiles of one block of keys and one of queries to the sums.

    Args:
      first_row: of the block of queries in the sequence; of `dq_sum`.
      first_key: of the block of keys in `dk_sum` and `dv_sum`.
      diagonal: the blocks are the same, of a causal mask.
      many: there are more blocks, and so sums to add to.
      member: which head of a group this is, whose heads add to the sums of dK and dV one after the
        other; None where a head of queries has its own keys.
      raw: the residual is y in place of the output.
      apart: of a window, see `Options.pairs`.
    """
    prepare, mu, center = _standard_queries, None, None
    if options.laser:
        mu = _anchor(blocks, raw)
        prepare = functools.partial(_laser_queries, mu=mu, raw=raw)
    if blocks.some_keys is not None:
        center = _shared_offset(blocks.some_keys)
    adds_heads = member is not None and not many
    large = blocks.k.shape[1] > LANES
    # Earlier sums before the rest: 5 % fewer bundles than after it, but not of large heads in many
    # blocks. Of those in one, dK before dV, and earlier sums of dV amid the rest: 3 to 5 % fewer.
    starts_with_sums = member is not None and not (large and many)
    large = large and adds_heads
    queries: dict[int, tuple[Array, Array]] = {}
    for key in range(options.tiles):
        rows = options.rows(key)
        met = options.pairs(key, diagonal, apart, queries_of_key=True)
        if not met:  # outside of the window
            continue
        values, exponentials = _values(blocks, mu, rows, raw)
        keys = blocks.k[rows, :]
        if center is not None:
            keys = (keys.astype(jnp.float32) - center).astype(keys.dtype)
        dk: list[Array] = []
        dv: list[Array] = []
        # From the last query on: 3 % fewer bundles than in order, for both attentions.
        for query in reversed(met):
            to_what_is_there = many or query in queries
            if query not in queries:
                queries[query] = prepare(blocks, rows=options.rows(query))
            g, delta = queries[query]
            crosses, edges = diagonal and query == key, common.NO_EDGES
            if options.window is not None:
                crosses, edges = False, options.edges(query, key, apart)
            weights, slope = _weights(blocks, options, key, query, crosses, edges)
            d_logits = weights * (common.dot(values, g, (1, 1)) - delta)
            if not options.laser and _hides(blocks, crosses or edges != common.NO_EDGES):
                # The product with a huge value that is not seen is infinite, its weight 0.
                d_logits = jnp.where(weights > 0, d_logits, 0.0)
            if slope is not None:
                d_logits *= slope
            rounded = d_logits.astype(keys.dtype)
            for sums in (dk, dv) if large else (dv, dk):
                if sums is dv:
                    dv.append(common.dot(weights.astype(g.dtype), g))
                else:
                    dk.append(common.dot(rounded, blocks.q[options.rows(query), :]))
            at = pl.ds(first_row + query * options.tile, options.tile)
            d_queries = common.dot(d_logits.T.astype(keys.dtype), keys)
            _add(blocks.dq_sum, at, d_queries, to_what_is_there)
        at = _rows_of_sums(options, first_key, key)
        if starts_with_sums:
            dk.insert(0, _so_far(blocks.dk_sum, at, member, many))
            place = len(dv) // 2 if large else 0
            dv.insert(place, _so_far(blocks.dv_sum, at, member, many))
        adds = many and not starts_with_sums
        dk_tile = functools.reduce(jnp.add, dk)
        _add(blocks.dk_sum, at, dk_tile, adds)
        dv_tile = functools.reduce(jnp.add, dv)
        _add(blocks.dv_sum, at, dv_tile, adds)
        if adds_heads:
            _write_keys(blocks, options, rows, dk_tile, dv_tile, exponentials)


def _rows_of_sums(options: Options, first_key, tile: int):
    """Of a tile of keys in `dk_sum` and `dv_sum`."""
    if isinstance(first_key, int):
        return options.rows(tile)
    return pl.ds(first_key + tile * options.tile, options.tile)


def _so_far(sums, rows, member, many: bool) -> Array:
    """What earlier heads of a group added; sums of many blocks start at 0 by themselves."""
    return sums[rows, :] if many else jnp.where(member == 0, 0.0, sums[rows, :])


def _add(ref, rows, more: Array, to_what_is_there):
    ref[rows, :] = ref[rows, :] + more if to_what_is_there else more


def _kernel(*refs, options: Options, segments: bool, blocks: int, group: int, raw: bool):
    named = _Blocks(refs, options, segments)
    more_heads = group > 1
    member = common.member_of_group(pl.program_id(1), group) if more_heads else None
    if blocks == 1:
        _step(
            named, options, 0, 0, diagonal=options.causal, many=False, member=member, raw=raw
        )  # fmt: skip
        _finish_queries(named, options, 0)
        if not more_heads:
            _finish_keys(named, options, 0, raw)
        return
    key, query = pl.program_id(2), pl.program_id(3)
    step_number = query
    steps, _, after = options.steps(blocks)
    if options.window is not None:
        # The last axis of the grid goes through the blocks of queries in reach alone.
        query += jnp.maximum(key - after, 0)
    first_row = pl.multiple_of(query * options.block, options.block)
    first_key: Any = 0
    rows: Any = ...
    if more_heads:
        first_key = pl.multiple_of(key * options.block, options.block)
        rows = pl.ds(first_key, options.block)

    @pl.when((key == 0) & (step_number == 0))
    def _start_queries():
        named.dq_sum[...] = jnp.zeros(named.dq_sum.shape, jnp.float32)

    first = (step_number == 0) & (member == 0) if more_heads else step_number == 0
    pl.when(first)(functools.partial(_start_keys, named, options, rows))
    step = functools.partial(
        _step, named, options, first_row, first_key, many=True, member=member, raw=raw
    )
    if options.window is not None:
        for low, high in options.pieces(blocks):
            here = (query - key >= low) & (query - key <= high) & (query < blocks)
            pl.when(here)(functools.partial(step, diagonal=False, apart=low))
    elif options.causal:
        pl.when(query > key)(functools.partial(step, diagonal=False))
        pl.when(query == key)(functools.partial(step, diagonal=True))
    else:
        step(diagonal=False)
    # Key blocks are visited in order: a causal query block has met all its keys on the diagonal.
    last = query == key if options.causal else key == blocks - 1
    if options.window is not None:
        last = (query < blocks) & (key == jnp.minimum(query + after, blocks - 1))
    pl.when(last)(functools.partial(_finish_queries, named, options, first_row))
    last = step_number == steps - 1
    if more_heads:
        last &= member == group - 1
    pl.when(last)(functools.partial(_finish_keys, named, options, first_key, raw))


def _start_keys(blocks: _Blocks, options: Options, rows):
    for sums in (blocks.dk_sum, blocks.dv_sum):
        sums[rows] = jnp.zeros((options.block, sums.shape[1]), jnp.float32)


def _finish_queries(blocks: _Blocks, options: Options, first_row):
    sums = blocks.dq_sum[pl.ds(first_row, options.block), :]
    blocks.dq[...] = (sums * options.scale).astype(blocks.dq.dtype)


def _finish_keys(blocks: _Blocks, options: Options, first_key, raw: bool):
    whole = isinstance(first_key, int)
    dk = blocks.dk_sum[...] if whole else blocks.dk_sum[pl.ds(first_key, options.block), :]
    blocks.dk[...] = (dk * options.scale).astype(blocks.dk.dtype)
    for number in range(options.tiles):
        rows = options.rows(number)
        dv = blocks.dv_sum[_rows_of_sums(options, first_key, number), :]
        if options.laser:
            dv *= _exponentials(blocks, rows, raw)
        blocks.dv[rows, :] = dv.astype(blocks.dv.dtype)


def _write_keys(blocks: _Blocks, options: Options, rows: slice, dk: Array, dv: Array, exponentials):
    """The gradients of a tile of keys and values, from their sums."""
    blocks.dk[rows, :] = (dk * options.scale).astype(blocks.dk.dtype)
    dv = dv if exponentials is None else dv * exponentials
    blocks.dv[rows, :] = dv.astype(blocks.dv.dtype)


def backward(
    q, k, v, out, d_out, log_sum, segment_ids, reference, options: Options, *, raw: bool = False
):
    """Gradients of attention.

    Args:
      q, k, v, segment_ids, options: as of `forward.forward`.
      out: (B, H, N, D_v), the output; with `raw` y, float32, relative to `reference`.
      d_out: (B, H, N, D_v) cotangent, in the dtype of `v`.
      log_sum: (B, H, 1, N) float32, of the forward kernel.
      reference: (B, K, 2, D_v) float32 for LASER: log2 of the power of two, which only `raw` reads,
        and the smallest value; else None.
      raw: see `out`; elements whose y is not certified then have no part in the gradients.

    Returns:
      Gradients of q, k and v, in their dtypes.
    """
    options = dataclasses.replace(options, tile=options.backward_tile)
    batch, heads, length, d_qk = q.shape
    d_v, block = v.shape[-1], options.block
    blocks = length // block
    group = heads // k.shape[1]
    of_keys = common.head_of_keys(q, k)

    def key_map(b, h, j, i):
        return b, of_keys(h), j, 0

    def dk_map(b, h, j, i):  # written once, of the last head of a group
        if group > 1 and blocks > 1:
            j = jnp.where(common.member_of_group(h, group) == group - 1, j, 0)
        return b, of_keys(h), j, 0

    steps, before, after = options.steps(blocks)

    def query_map(b, h, j, i):  # blocks above the diagonal, or out of the window, are not fetched
        if options.window is not None:
            last = jnp.minimum(j + before, blocks - 1)
            i = jnp.minimum(jnp.maximum(j - after, 0) + i, last)
        elif options.causal:
            i = jnp.maximum(i, j)
        return b, h, i, 0

    def dq_map(b, h, j, i):  # the block that is finished while this key block is visited
        if options.window is not None:
            first = jnp.maximum(j - after, 0)
            return b, h, jnp.where(j == blocks - 1, jnp.minimum(first + i, blocks - 1), first), 0
        return b, h, j if options.causal else jnp.where(j == blocks - 1, i, 0), 0

    def spec(size, index_map):
        return pl.BlockSpec((None, None, block, size), index_map)

    in_specs = [
        spec(d_qk, query_map), spec(d_qk, key_map), spec(d_v, key_map), spec(d_v, query_map),
        spec(d_v, query_map),
        pl.BlockSpec((None, None, 1, block), lambda *ids: (*ids[:2], 0, query_map(*ids)[2])),
    ]  # fmt: skip
    operands = [q, k, v, out, d_out, log_sum]
    if segment_ids is not None:
        in_specs += [
            pl.BlockSpec((None, 1, block), lambda *ids: (ids[0], 0, query_map(*ids)[2])),
            pl.BlockSpec((None, 1, block), lambda b, h, j, i: (b, 0, j)),
        ]
        operands += [segment_ids, segment_ids]
    if options.laser:
        per_head = pl.BlockSpec((None, None, 2, d_v), lambda b, h, j, i: (b, of_keys(h), 0, 0))
        in_specs.append(per_head)
        operands.append(reference)
    for x in [v] * options.laser + [k] * _centred(options, k.dtype):
        spec_of_some, rows = _some(x, block, of_keys)
        in_specs.append(spec_of_some)
        operands.append(rows)
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    sum_rows = block if group == 1 else length
    of_heads: Any = "parallel" if group == 1 else "arbitrary"
    return pl.pallas_call(
        functools.partial(
            _kernel,
            options=options,
            segments=segment_ids is not None,
            blocks=blocks,
            group=group,
            raw=raw,
        ),
        grid=(batch, heads, blocks, steps),
        in_specs=in_specs,
        out_specs=[spec(d_qk, dq_map), spec(d_qk, dk_map), spec(d_v, dk_map)],
        out_shape=out_shape,
        scratch_shapes=[
            pltpu.VMEM((length, d_qk), jnp.float32),
            pltpu.VMEM((sum_rows, d_qk), jnp.float32),
            pltpu.VMEM((sum_rows, d_v), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", of_heads, "arbitrary", "arbitrary"),
            vmem_limit_bytes=options.vmem_bytes,
        ),
        cost_estimate=cost(q.shape, d_v, options, operands, out_shape),
        interpret=options.interpret,
        name=common.kernel_name("backward", options, raw),
    )(*operands)


def _some(x: Array, block: int, of_keys) -> tuple[pl.BlockSpec, Array]:
    """A sample of the rows of each head: some from each of many steps."""
    batch, heads, length, size = x.shape
    step = sampled_step(length, block)
    shape = (length // step, min(SAMPLED_ROWS, step), size)
    spec = pl.BlockSpec((None, None, *shape), lambda b, h, j, i: (b, of_keys(h), 0, 0, 0))
    return spec, x.reshape(batch, heads, length // step, step, size)


def cost(q_shape, d_v: int, options: Options, operands, results) -> pl.CostEstimate:
    """Work of the backward kernel for XLA's scheduler."""
    batch, heads, length, d_qk = q_shape
    pairs = common.pairs_of_positions(q_shape, options)
    # exp(out), exp(-out) and exp(V) of each pair of blocks, and exp(V) for the sums of dV.
    values = 3 * common.pairs_of_blocks(q_shape, options) * options.block * d_v
    values += batch * heads * length * d_v
    return pl.CostEstimate(
        flops=2 * pairs * (3 * d_qk + 2 * d_v),
        transcendentals=pairs + (values if options.laser else 0),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in [*operands, *results]),
    )
