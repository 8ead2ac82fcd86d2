"""The forward kernel: softmax(logits) V, or log(softmax(logits) exp(V)), block by block.

A grid step holds one block of queries and one of keys of one head, and works through their tiles.
exp(V) is formed here, in VMEM. Where float32 holds its sums, which the statistics tell, they are
taken as they are. Else the caller asks for the wide form: relative to a power of two per feature,
that of the largest value in the key tiles that a query tile meets. What lies too far below it is
marked with -inf for the exact path (exact.py). In neither form does a later token change the
outputs of an earlier tile: multiplying by a power of two rounds nothing. Which form it is, a token
anywhere in the row of the batch decides. Both have the same bits where the reference is 1, of
values up to 22 nats, and an output not below -40. Otherwise log2 exp(V) is rounded less the power,
or the exact path computes what the narrow form still certifies: in float32 that is a matter of
1e-5 nats, and of 2^-8 in bfloat16, whose rounding of exp(V) and of weights the exact path has not.

In bfloat16, exp(V) near 1 would lose what distinguishes one key from another. There exp(V) - 1 is
what is rounded and weighted (`common.anchor`), once for each tile of keys, and the weight of those
keys is added to the sum.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from laser.attention.chunked import LARGEST_CERTIFIED_OUTPUT, LN_2
from laser.attention.kernels import common
from laser.attention.kernels.common import Options

Array = jax.Array


class Sums(NamedTuple):
    """What a query tile has gathered: (R, 1) maximum and sum of weights, (R, D) weighted values."""

    maximum: Array
    weight: Array
    values: Array


class KeyTile(NamedTuple):
    """One tile of values, and what is known of all values up to its end; (1, D) float32 each.

    Attributes:
      operand: (R, D), what weights multiply: V, or E - μ with E = exp(V), in the wide form
        exp(V) / 2^power.
      smallest: smallest value of this block of keys; None for standard attention, as all below.
      largest: largest value of all blocks so far, which sets the power.
      power: log2 of the reference.
      mu: the anchor; None for float32, whose sums need none.
    """

    operand: Any
    smallest: Any = None
    largest: Any = None
    power: Any = None
    mu: Any = None


def _exponential_tile(v: Array, before: KeyTile | None, wide: bool, exact: bool) -> KeyTile:
    dtype, v = v.dtype, v.astype(jnp.float32)
    smallest, largest = v.min(axis=0, keepdims=True), v.max(axis=0, keepdims=True)
    if before is not None:
        smallest = jnp.minimum(smallest, before.smallest)
        largest = jnp.maximum(largest, before.largest)
    power = common.reference_power(largest)
    log2 = common.log2_exponential(v, exact)
    exponential = jnp.exp2(log2 - power if wide else log2)
    mu = None if dtype == jnp.float32 else common.anchor(smallest, power)
    operand = exponential if mu is None else (exponential - mu).astype(dtype)
    return KeyTile(operand, smallest, largest, power, mu)


def _attend(
    logits: list[Array], tiles: list[KeyTile], last: KeyTile, at_least: list[Array], wide: bool
) -> Sums:
    """One query tile against key tiles of a block, relative to the reference of `last`.

    The maximum is no less than `at_least`.
    """
    maximum = functools.reduce(jnp.maximum, logits).max(axis=1, keepdims=True)
    maximum = functools.reduce(jnp.maximum, at_least, maximum)
    reference = maximum + _headroom(last)
    weight, values = [], []
    for tile_logits, tile in zip(logits, tiles, strict=True):
        weights = jnp.exp2(tile_logits - reference)
        weight.append(weights.sum(axis=1, keepdims=True))
        operand = tile.operand
        if wide and tile is not last:
            shrink = common.power_of_two(tile.power - last.power)
            operand = (operand.astype(jnp.float32) * shrink).astype(operand.dtype)
        values.append(common.dot(weights.astype(operand.dtype), operand))
    if last.mu is not None:
        values.insert(0, _anchored(weight, tiles, last, wide))
    return Sums(maximum, functools.reduce(jnp.add, weight), functools.reduce(jnp.add, values))


def _anchored(weight: list[Array], tiles: list[KeyTile], last: KeyTile, wide: bool) -> Array:
    """Σ P·μ over all tiles, (R, D), which their Σ P·(E - μ) lack.

    From one tile to the next an anchor stays or falls from 1 to 0, so this is the weight of the
    tiles before it fell, and costs no multiplication.
    """
    anchored = jnp.float32(0)
    for so_far, tile in zip(itertools.accumulate(weight), tiles, strict=True):
        anchored = jnp.where(tile.mu > 0, so_far, anchored)
    if wide:  # what has an anchor has the reference 1
        anchored *= common.power_of_two(jnp.minimum(-last.power, 0))
    return anchored


def _headroom(tile: KeyTile) -> float:
    """By how many powers of two all weights are below 1.

    So that a sum over keys of values near the largest float32 does not overflow. LASER's
    exponentials are of bounded size.
    """
    return common.HEADROOM if tile.power is None else 0.0


def _joined(before: Sums, sums: Sums | None, rescale: Array | None) -> Sums:
    """Sums over all blocks so far, relative to this block's reference."""
    if sums is None:  # the window hides this block
        return before if rescale is None else before._replace(values=before.values * rescale)
    shrink = jnp.exp2(before.maximum - sums.maximum)
    earlier = before.values if rescale is None else before.values * rescale
    return Sums(sums.maximum, before.weight * shrink + sums.weight, earlier * shrink + sums.values)


class Finished(NamedTuple):
    """Output (R, D), y that it is made of, and log2 Σ (1, R).

    In the wide form the output is -inf, and y is 0, where they are not certified: where y is too
    small, or the output too large for the precision of its exponentials.
    """

    out: Array
    y: Array
    log_sum: Array


def _finish(sums: Sums, tile: KeyTile, options: Options) -> Finished:
    y = sums.values * (1 / sums.weight)
    log_sum = common.to_row(sums.maximum + _headroom(tile) + jnp.log2(sums.weight))
    if not options.laser:
        return Finished(y, y, log_sum)
    out = jnp.log(y)
    if options.wide:
        out += tile.power * LN_2
        failed = (y < common.SMALLEST_CERTIFIED) | (jnp.abs(out) > LARGEST_CERTIFIED_OUTPUT)
        out, y = jnp.where(failed, -jnp.inf, out), jnp.where(failed, 0.0, y)
    return Finished(out, y, log_sum)


class _Blocks:
    """The refs of a grid step under their names."""

    def __init__(self, refs, options: Options, segments: bool, reference: bool, many: bool):
        refs = iter(refs)
        self.q, self.k, self.v = next(refs), next(refs), next(refs)
        self.query_segments: Any = next(refs) if segments else None
        self.key_segments: Any = next(refs) if segments else None
        self.reference: Any = next(refs) if reference else None
        self.out, self.log_sum = next(refs), next(refs)
        self.statistics: Any = next(refs) if options.laser else None
        if many:
            self.maximum, self.weight, self.values = next(refs), next(refs), next(refs)
        both = many and options.laser
        self.smallest: Any = next(refs) if both else None
        self.largest: Any = next(refs) if both else None


def _key_tile(blocks: _Blocks, options: Options, number: int, before) -> KeyTile:
    v = blocks.v[options.rows(number), :]
    if not options.laser:
        return KeyTile(v)
    # A CPU's compiler would fold constants in the one form and not in the other.
    return _exponential_tile(v, before, options.wide, exact=options.wide or options.interpret)


def _logits(
    blocks: _Blocks, options: Options, query: int, key: int, diagonal: bool, apart: int
) -> Array:
    rows, columns = options.rows(query), options.rows(key)
    products = common.dot(blocks.q[rows, :], blocks.k[columns, :], (1, 1))
    segments: tuple[Any, Any] = (None, None)
    if blocks.key_segments is not None:
        segments = (
            common.to_column(blocks.query_segments[:, rows]),
            blocks.key_segments[:, columns],
        )
    logits = common.capped(products, options)[0]
    if options.window is not None:
        edges = options.edges(query, key, apart)
        return common.masked(logits, *segments, False, query_axis=0, edges=edges)
    return common.masked(logits, *segments, diagonal and query == key, query_axis=0)


def _step(
    blocks: _Blocks, options: Options, *,
    diagonal: bool, many: bool, last, raw: bool, apart: int = 0,
):  # fmt: skip
    """All tiles of one block of queries and one of keys.

    Args:
      diagonal: the blocks are the same, of a causal mask.
      apart: of a window, see `Options.pairs`.
      many: there are more blocks of keys, and so sums in scratch.
      last: whether this is the last block of keys, static or traced.
      raw: write y, not its logarithm.
    """
    before: Any = _before(blocks, options, many)
    tiles: list[KeyTile] = []
    finished: list[Finished] = []
    met = [options.pairs(query, diagonal, apart) for query in range(options.tiles)]
    first = min(keys.start for keys in met if keys)
    for query, keys in enumerate(met):
        # Made when first met, kept for the queries after that. Only on the diagonal may the
        # reference not be that of later keys, too.
        stop = keys.stop if diagonal else max(keys.stop for keys in met)
        while first + len(tiles) < stop:
            number = first + len(tiles)
            tiles.append(_key_tile(blocks, options, number, (tiles or [before])[-1]))
        tile, rows = tiles[-1], options.rows(query)
        at_least = []
        if many:
            carried = Sums(blocks.maximum[rows, :], blocks.weight[rows, :], blocks.values[rows, :])
            at_least.append(carried.maximum)
        if finished and options.laser:
            at_least.append(_after(finished[-1]))
        sums: Any = None
        if keys:
            logits = [_logits(blocks, options, query, key, diagonal, apart) for key in keys]
            seen = tiles[keys.start - first : keys.stop - first]
            sums = _attend(logits, seen, tile, at_least, options.wide)
        if many:
            rescale = common.power_of_two(before.power - tile.power) if options.wide else None
            sums = _joined(carried, sums, rescale)
        carry = functools.partial(_carry, blocks, options, query, sums, tile)
        if last is True:
            finished.append(_finish(sums, tile, options))
            _write(blocks, options, query, finished[-1], tile, raw)
        elif last is False:
            carry()
        else:
            end = functools.partial(_end, blocks, options, query, sums, tile, raw)
            pl.when(last)(end)
            pl.when(jnp.logical_not(last))(carry)


def _end(blocks: _Blocks, options: Options, query: int, sums: Sums, tile: KeyTile, raw: bool):
    _write(blocks, options, query, _finish(sums, tile, options), tile, raw)


def _before(blocks: _Blocks, options: Options, many: bool) -> KeyTile | None:
    """What earlier blocks of keys, or the caller, say of the values."""
    if not options.laser or not (many or blocks.reference is not None):
        return None
    largest = blocks.largest[:1, :] if many else blocks.reference[...]
    smallest = jnp.full(largest.shape, jnp.inf, jnp.float32)
    return KeyTile(None, smallest, largest, common.reference_power(largest))


def _after(finished: Finished) -> Array:
    """A (1, 1) maximum that changes none, but which is known only when a tile is finished.

    The compiler would leave the logarithms of all tiles to the end, where no matrix product is left
    to overlap them: 10 % more bundles.
    """
    y = finished.y.min(axis=0, keepdims=True).min(axis=1, keepdims=True)
    return jnp.where(y < 0, 0.0, 2 * common.MASKED)  # a mean of exponentials is not negative


def _carry(blocks: _Blocks, options: Options, query: int, sums: Sums, tile: KeyTile):
    rows = options.rows(query)
    blocks.maximum[rows, :] = sums.maximum
    blocks.weight[rows, :] = sums.weight
    blocks.values[rows, :] = sums.values
    if options.laser and query == options.tiles - 1:
        smallest = jnp.minimum(tile.smallest, blocks.smallest[:1, :])
        blocks.smallest[...] = jnp.broadcast_to(smallest, blocks.smallest.shape)
        blocks.largest[...] = jnp.broadcast_to(tile.largest, blocks.largest.shape)


def _write(blocks: _Blocks, options: Options, query: int, found: Finished, tile, raw: bool):
    rows = options.rows(query)
    blocks.out[rows, :] = (found.y if raw else found.out).astype(blocks.out.dtype)
    blocks.log_sum[:, rows] = found.log_sum
    if options.laser:
        _write_statistics(blocks, found, tile, options.wide, first=query == 0)


def _write_statistics(blocks: _Blocks, found: Finished, tile: KeyTile, wide: bool, first: bool):
    """Adds a query tile to the statistics of its block, in the order of `common.STATISTICS`."""
    ref = blocks.statistics
    if first:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
    smallest = found.y.min(axis=0, keepdims=True)
    # The logarithm is monotone: what is least of y is so of the output.
    smallest_out = jnp.log(smallest) + (tile.power * LN_2 if wide else 0.0)
    smallest_out = jnp.where(smallest <= 0.0, -jnp.inf, smallest_out)
    for number, x in enumerate((smallest, smallest_out)):
        row = slice(number, number + 1)
        ref[row, :] = x if first else jnp.minimum(ref[row, :], x)
    earlier = (
        tile.smallest
        if blocks.smallest is None
        else jnp.minimum(tile.smallest, blocks.smallest[:1, :])
    )
    ref[2:3, :] = earlier
    ref[3:4, :] = tile.largest


def _kernel(*refs, options: Options, segments: bool, reference: bool, blocks: int, raw: bool):
    many = blocks > 1
    named = _Blocks(refs, options, segments, reference, many)
    if many and options.window is not None:
        _windowed_kernel(named, options, reference, blocks, raw)
        return
    if not many:
        _step(named, options, diagonal=options.causal, many=False, last=True, raw=raw)
        return
    query, key = pl.program_id(2), pl.program_id(3)

    pl.when(key == 0)(functools.partial(_start, named, options, reference))
    step = functools.partial(_step, named, options, many=True, raw=raw)
    if options.causal:
        pl.when(key < query)(functools.partial(step, diagonal=False, last=False))
        pl.when(key == query)(functools.partial(step, diagonal=True, last=True))
    else:
        step(diagonal=False, last=key == blocks - 1)


def _start(blocks: _Blocks, options: Options, reference: bool):
    blocks.maximum[...] = jnp.full(blocks.maximum.shape, common.LOWEST_LOGIT, jnp.float32)
    blocks.weight[...] = jnp.zeros(blocks.weight.shape, jnp.float32)
    blocks.values[...] = jnp.zeros(blocks.values.shape, jnp.float32)
    if options.laser:
        start = blocks.reference[...] if reference else jnp.float32(common.LOWEST_VALUE)
        blocks.largest[...] = jnp.broadcast_to(start, blocks.largest.shape)
        blocks.smallest[...] = jnp.full(blocks.smallest.shape, jnp.inf, jnp.float32)


def _windowed_kernel(named: _Blocks, options: Options, reference: bool, blocks: int, raw: bool):
    """The last axis of the grid goes through the blocks of keys that the window reaches alone."""
    query, step_number = pl.program_id(2), pl.program_id(3)
    before, after = options.blocks_in_reach(blocks)
    key = jnp.maximum(query - before, 0) + step_number
    apart = query - key
    pl.when(step_number == 0)(functools.partial(_start, named, options, reference))
    for low, high in options.pieces(blocks):
        # The last block of keys lies on the diagonal or after it.
        last = (
            False
            if low > 0
            else True
            if after == 0
            else key == jnp.minimum(query + after, blocks - 1)
        )
        step = functools.partial(
            _step, named, options, diagonal=options.causal and low == 0, many=True, last=last,
            raw=raw, apart=low,
        )  # fmt: skip
        pl.when((apart >= low) & (apart <= high) & (key < blocks))(step)


def forward(q, k, v, segment_ids, options: Options, *, reference=None, raw: bool = False):
    """Attention of padded arrays.

    Args:
      q: (B, H, N, D_qk), float32 or bfloat16.
      k: (B, K, N, D_qk); K divides H.
      v: (B, K, N, D_v).
      segment_ids: (B, 1, N) int32 or None.
      options: sizes and switches; `options.block` divides N.
      reference: (B, K, 1, D_v) float32, the largest value of the sequence, to set the reference of
        all exponentials in place of the running one; LASER only.
      raw: return y = softmax(logits) exp(V) / 2^power, float32, instead of its logarithm.

    Returns:
      (B, H, N, D_v) output in the dtype of `v`, see `Finished`; (B, H, 1, N)
      float32 log2 Σ exp(logits); and for LASER (B, H, blocks, 8, D_v) float32 statistics, in the
      order of `common.STATISTICS`, else None.
    """
    batch, heads, length, d_qk = q.shape
    d_v, block = v.shape[-1], options.block
    blocks = length // block
    of_keys = common.head_of_keys(q, k)

    def query_map(b, h, i, j):
        return b, h, i, 0

    steps, before, after = options.steps(blocks)

    def key_map(b, h, i, j):  # blocks above the diagonal, or out of the window, are not fetched
        if options.window is not None:
            last = jnp.minimum(i + after, blocks - 1)
            j = jnp.minimum(jnp.maximum(i - before, 0) + j, last)
        elif options.causal:
            j = jnp.minimum(i, j)
        return b, of_keys(h), j, 0

    in_specs = [
        pl.BlockSpec((None, None, block, d_qk), query_map),
        pl.BlockSpec((None, None, block, d_qk), key_map),
        pl.BlockSpec((None, None, block, d_v), key_map),
    ]
    operands = [q, k, v]
    if segment_ids is not None:
        in_specs += [
            pl.BlockSpec((None, 1, block), lambda b, h, i, j: (b, 0, i)),
            pl.BlockSpec((None, 1, block), lambda b, h, i, j: (b, 0, key_map(b, h, i, j)[2])),
        ]
        operands += [segment_ids, segment_ids]
    if reference is not None:
        per_head = pl.BlockSpec((None, None, 1, d_v), lambda b, h, i, j: (b, of_keys(h), 0, 0))
        in_specs.append(per_head)
        operands.append(reference)
    out_specs = [
        pl.BlockSpec((None, None, block, d_v), query_map),
        pl.BlockSpec((None, None, 1, block), lambda b, h, i, j: (b, h, 0, i)),
    ]
    out_shape = [
        jax.ShapeDtypeStruct((*q.shape[:3], d_v), jnp.float32 if raw else v.dtype),
        jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
    ]
    scratch = []
    if blocks > 1:
        scratch = [(block, 1, jnp.float32), (block, 1, jnp.float32), (block, d_v, jnp.float32)]
    if options.laser:
        rows = common.STATISTICS_ROWS
        out_specs.append(
            pl.BlockSpec((None, None, None, rows, d_v), lambda b, h, i, j: (b, h, i, 0, 0))
        )
        out_shape.append(jax.ShapeDtypeStruct((batch, heads, blocks, rows, d_v), jnp.float32))
        if blocks > 1:
            scratch += 2 * [(rows, d_v, jnp.float32)]
    results = pl.pallas_call(
        functools.partial(
            _kernel,
            options=options,
            segments=segment_ids is not None,
            reference=reference is not None,
            blocks=blocks,
            raw=raw,
        ),
        grid=(batch, heads, blocks, steps),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((rows, columns), dtype) for rows, columns, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=options.vmem_bytes,
        ),
        cost_estimate=cost(q.shape, d_v, options, operands, out_shape),
        interpret=options.interpret,
        name=common.kernel_name("forward", options, raw),
    )(*operands)
    return (*results, None) if not options.laser else tuple(results)


def cost(q_shape, d_v: int, options: Options, operands, results) -> pl.CostEstimate:
    """Work of the forward kernel for XLA's scheduler."""
    batch, heads, length, d_qk = q_shape
    pairs = common.pairs_of_positions(q_shape, options)
    outputs = batch * heads * length * d_v
    # Each block of queries forms exp(V) of the keys that it meets.
    values = common.pairs_of_blocks(q_shape, options) * options.block * d_v
    return pl.CostEstimate(
        flops=2 * pairs * (d_qk + d_v),
        transcendentals=pairs + (values + outputs if options.laser else 0),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in [*operands, *results]),
    )
