"""The forward kernel: softmax(logits) V, or log(softmax(logits) exp(V)), block by block.

A grid step holds one block of queries and one of keys of one head, and works through their tiles.
exp(V) is formed here, in VMEM, relative to a power of two per feature that is the largest of the
key tiles met so far: rescaling by a power of two rounds nothing, so a later token cannot change an
earlier output by a bit. Outputs that lie too far below their reference are marked with -inf for the
exact path (exact.py).

In bfloat16, exp(V) near 1 would lose what distinguishes one key from another. On tiles that lie in
the past of all their queries, E - μ is rounded instead of E (`common.anchor`); elsewhere μ would
depend on keys that some queries must not see, and E is split in two bfloat16 parts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from laser.attention.chunked import LN_2
from laser.attention.kernels import common
from laser.attention.kernels.common import Options

Array = jax.Array


class Sums(NamedTuple):
    """What a query tile has gathered: (R, 1) maximum and sum of weights, (R, D) weighted values."""

    maximum: Array
    weight: Array
    values: Array


class KeyTile(NamedTuple):
    """One tile of values, ready to be weighted.

    Attributes:
      parts: arrays (R, D) whose sum is the values, or the exponentials less `anchor`.
      anchor: (1, D) float32, or None.
      rescale: (1, D), from the reference of the tile before to this one's; None for none.
      smallest, largest: (1, D), of the values so far; None for standard attention. The largest one
        sets the reference.
    """

    parts: tuple[Array, ...]
    anchor: Array | None = None
    rescale: Array | None = None
    smallest: Array | None = None
    largest: Array | None = None


def _standard_tile(v: Array) -> KeyTile:
    return KeyTile((v,))


def _exponential_tile(v: Array, before: Any, split: bool, exact: bool) -> KeyTile:
    """exp(V) of a tile relative to the power of two of the largest value so far."""
    v32 = v.astype(jnp.float32)
    own_smallest, own_largest = v32.min(axis=0, keepdims=True), v32.max(axis=0, keepdims=True)
    smallest, largest, rescale = own_smallest, own_largest, None
    if before is not None:
        smallest = jnp.minimum(smallest, before.smallest)
        largest = jnp.maximum(largest, before.largest)
    power = common.reference_power(largest)
    if before is not None:
        rescale = common.power_of_two(common.reference_power(before.largest) - power)

    def exponential(x):
        return jnp.exp2(common.log2_exponential(x, exact) - power)

    exp_v = exponential(v32)
    if v.dtype == jnp.float32:
        return KeyTile((exp_v,), None, rescale, smallest, largest)
    if split:
        high = exp_v.astype(v.dtype)
        low = (exp_v - high.astype(jnp.float32)).astype(v.dtype)
        return KeyTile((high, low), None, rescale, smallest, largest)
    mu = common.anchor(exponential(own_smallest), exponential(own_largest))
    return KeyTile(((exp_v - mu).astype(v.dtype),), mu, rescale, smallest, largest)


def _add_tile(sums: Sums, logits: Array, tile: KeyTile, rescale: bool) -> Sums:
    """Adds the keys of one tile, whose logits do not exceed the maximum."""
    weights = jnp.exp2(logits - sums.maximum)
    rounded = weights.astype(tile.parts[0].dtype)
    if len(tile.parts) == 2:
        # The parts are sharper than the weights: their rounding must cancel against their sum's.
        weights = rounded.astype(jnp.float32)
    weight = weights.sum(axis=1, keepdims=True)
    gathered = functools.reduce(jnp.add, (common.dot(rounded, part) for part in tile.parts))
    if tile.anchor is not None:
        gathered += weight * tile.anchor
    if not rescale:
        return Sums(sums.maximum, weight, gathered)
    before = sums.values if tile.rescale is None else sums.values * tile.rescale
    return Sums(sums.maximum, sums.weight + weight, before + gathered)


def _attend(logits: list[Array], tiles: list[KeyTile], before: Sums | None) -> Sums:
    """One query tile against the key tiles of a block, after what came `before`."""
    maximum = functools.reduce(jnp.maximum, logits).max(axis=1, keepdims=True)
    if before is None:
        sums = Sums(maximum, jnp.zeros_like(maximum), jnp.zeros((1, 1)))
    else:
        maximum = jnp.maximum(maximum, before.maximum)
        shrink = jnp.exp2(before.maximum - maximum)
        sums = Sums(maximum, before.weight * shrink, before.values * shrink)
    for number, (tile_logits, tile) in enumerate(zip(logits, tiles, strict=True)):
        sums = _add_tile(sums, tile_logits, tile, rescale=number > 0 or before is not None)
    return sums


def _finish(sums: Sums, largest: Array | None) -> tuple[Array, Array, Array]:
    """(R, D) output, its y relative to the reference, and log2 of the sum of exponentials (1, R).

    An output that is not certified is -inf.
    """
    y = sums.values * (1 / sums.weight)
    log_sum = common.to_row(sums.maximum + jnp.log2(sums.weight))
    if largest is None:
        return y, y, log_sum
    out = jnp.log(y) + common.reference_power(largest) * LN_2
    return jnp.where(y < common.SMALLEST_CERTIFIED, -jnp.inf, out), y, log_sum


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
        if many and options.laser:
            self.smallest, self.largest = next(refs), next(refs)


def _key_tile(blocks: _Blocks, options: Options, number: int, before, **how) -> KeyTile:
    v = blocks.v[options.rows(number), :]
    return _exponential_tile(v, before, **how) if options.laser else _standard_tile(v)


def _logits(blocks: _Blocks, options: Options, query: int, key: int, diagonal: bool) -> Array:
    rows, columns = options.rows(query), options.rows(key)
    products = common.dot(blocks.q[rows, :], blocks.k[columns, :], (1, 1))
    segments: tuple[Any, Any] = (None, None)
    if blocks.key_segments is not None:
        segments = (
            common.to_column(blocks.query_segments[:, rows]),
            blocks.key_segments[:, columns],
        )
    crosses = diagonal and query == key
    return common.masked(common.capped(products, options)[0], *segments, crosses, query_axis=0)


def _step(blocks: _Blocks, options: Options, *, diagonal: bool, many: bool, last, raw: bool):
    """All tiles of one block of queries and one of keys.

    Args:
      diagonal: the blocks are the same, of a causal mask.
      many: there are more blocks of keys, and so sums in scratch.
      last: whether this is the last block of keys, static or traced.
      raw: write y, not its logarithm.
    """
    before = None
    if options.laser and (many or blocks.reference is not None):
        if many:
            smallest, largest = blocks.smallest[:1, :], blocks.largest[:1, :]
        else:
            smallest = largest = blocks.reference[...]
        before = KeyTile((), smallest=smallest, largest=largest)
    segments = blocks.key_segments is not None
    past: list[KeyTile] = []
    results: list[tuple[Sums, KeyTile]] = []
    for query in range(options.tiles):
        keys = options.pairs(query, diagonal)
        # Tiles are made when they are first met, so that their work overlaps the products'.
        while len(past) < len(keys) - diagonal:
            previous = past[-1] if past else before
            past.append(_key_tile(blocks, options, len(past), previous, split=segments, exact=raw))
        tiles = past[: len(keys)]
        if diagonal:
            previous = past[-1] if past else before
            tiles = past + [_key_tile(blocks, options, query, previous, split=True, exact=raw)]
        rows = options.rows(query)
        carried = None
        if many:
            carried = Sums(blocks.maximum[rows, :], blocks.weight[rows, :], blocks.values[rows, :])
        logits = [_logits(blocks, options, query, key, diagonal) for key in keys]
        sums = _attend(logits, tiles, carried)
        results.append((sums, tiles[-1]))
    # Not before: the scheduler overlaps less where stores lie between the products.
    for query, (sums, tile) in enumerate(results):
        _hand_over(blocks, options, query, sums, tile, last, raw)


def _hand_over(blocks: _Blocks, options: Options, query: int, sums: Sums, tile, last, raw: bool):
    """Writes the outputs of a query tile after the last block of keys, else its sums to scratch."""
    rows = options.rows(query)

    def finish():
        out, y, log_sum = _finish(sums, tile.largest)
        blocks.out[rows, :] = (y if raw else out).astype(blocks.out.dtype)
        blocks.log_sum[:, rows] = log_sum
        if options.laser:
            _write_statistics(blocks.statistics, out, y, tile, first=query == 0)

    def carry():
        blocks.maximum[rows, :] = sums.maximum
        blocks.weight[rows, :] = sums.weight
        blocks.values[rows, :] = sums.values
        if options.laser and query == options.tiles - 1:
            blocks.smallest[...] = jnp.broadcast_to(tile.smallest, blocks.smallest.shape)
            blocks.largest[...] = jnp.broadcast_to(tile.largest, blocks.largest.shape)

    if last is True:
        finish()
    elif last is False:
        carry()
    else:
        pl.when(last)(finish)
        pl.when(jnp.logical_not(last))(carry)


def _write_statistics(ref, out: Array, y: Array, tile: KeyTile, first: bool):
    """Adds a query tile to the statistics of its block, in the order of `common.STATISTICS`."""
    if first:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
    folds = ((jnp.minimum, jnp.min, y), (jnp.minimum, jnp.min, out), (jnp.maximum, jnp.max, out))
    for number, (fold, over_rows, x) in enumerate(folds):
        row = slice(number, number + 1)
        found = over_rows(x, axis=0, keepdims=True)
        ref[row, :] = found if first else fold(ref[row, :], found)
    ref[3:4, :] = tile.smallest
    ref[4:5, :] = tile.largest


def _kernel(*refs, options: Options, segments: bool, reference: bool, blocks: int, raw: bool):
    many = blocks > 1
    named = _Blocks(refs, options, segments, reference, many)
    if not many:
        _step(named, options, diagonal=options.causal, many=False, last=True, raw=raw)
        return
    query, key = pl.program_id(2), pl.program_id(3)

    @pl.when(key == 0)
    def _start():
        named.maximum[...] = jnp.full(named.maximum.shape, 2 * common.MASKED, jnp.float32)
        named.weight[...] = jnp.zeros(named.weight.shape, jnp.float32)
        named.values[...] = jnp.zeros(named.values.shape, jnp.float32)
        if options.laser:
            start = named.reference[...] if reference else jnp.float32(common.LOWEST_VALUE)
            named.largest[...] = jnp.broadcast_to(start, named.largest.shape)
            named.smallest[...] = jnp.full(named.smallest.shape, jnp.inf, jnp.float32)

    step = functools.partial(_step, named, options, many=True, raw=raw)
    if options.causal:
        pl.when(key < query)(functools.partial(step, diagonal=False, last=False))
        pl.when(key == query)(functools.partial(step, diagonal=True, last=True))
    else:
        step(diagonal=False, last=key == blocks - 1)


def forward(q, k, v, segment_ids, options: Options, *, reference=None, raw: bool = False):
    """Attention of padded arrays.

    Args:
      q, k: (B, H, N, D_qk), float32 or bfloat16.
      v: (B, H, N, D_v).
      segment_ids: (B, 1, N) int32 or None.
      options: sizes and switches; `options.block` divides N.
      reference: (B, H, 1, D_v) float32, the largest value of the sequence, to set the reference of
        all exponentials in place of the running one; LASER only.
      raw: return y = softmax(logits) exp(V) / 2^power, float32, instead of its logarithm.

    Returns:
      (B, H, N, D_v) output in the dtype of `v`, -inf where LASER is not certified; (B, H, 1, N)
      float32 log2 Σ exp(logits); and for LASER (B, H, blocks, 8, D_v) float32 statistics, in the
      order of `common.STATISTICS`, else None.
    """
    batch, heads, length, d_qk = q.shape
    d_v, block = v.shape[-1], options.block
    blocks = length // block

    def query_map(b, h, i, j):
        return b, h, i, 0

    def key_map(b, h, i, j):  # blocks above the diagonal are not fetched
        return b, h, jnp.minimum(i, j) if options.causal else j, 0

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
        in_specs.append(pl.BlockSpec((None, None, 1, d_v), lambda b, h, i, j: (b, h, 0, 0)))
        operands.append(reference)
    out_specs = [
        pl.BlockSpec((None, None, block, d_v), query_map),
        pl.BlockSpec((None, None, 1, block), lambda b, h, i, j: (b, h, 0, i)),
    ]
    out_shape = [
        jax.ShapeDtypeStruct(v.shape, jnp.float32 if raw else v.dtype),
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
        grid=(batch, heads, blocks, blocks),
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
    """Work of the forward kernel for XLA's scheduler; causal attention is half of the square."""
    batch, heads, length, d_qk = q_shape
    pairs = batch * heads * length * length // (2 if options.causal else 1)
    values = batch * heads * length * d_v
    return pl.CostEstimate(
        flops=2 * pairs * (d_qk + d_v),
        transcendentals=pairs + (2 * values if options.laser else 0),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in [*operands, *results]),
    )
