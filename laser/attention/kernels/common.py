"""What the forward and the backward kernel share: options, tiles of logits, powers of two.

Logits are kept in units of log 2 inside the kernels, so that every exponential is an exp2: the
factor log2 e rides on the multiplication by the scale, which is needed anyway.

Shapes: B batch, H heads, N padded length, D size, M rows of a block, R rows of a tile.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from laser.attention.chunked import (
    LARGEST_EXPONENTIATED,
    LOG2_E,
    SMALLEST_CERTIFIED_EXPONENT,
)

Array = jax.Array

MASKED = -1e30  # below every logit; finite, so that no inf - inf can arise
# Where a running maximum of logits starts: far above MASKED, so that a block none of whose keys a
# query sees has weights of 0 for it, and below every logit.
LOWEST_LOGIT = -1e29
HEADROOM = 15.0  # log2 of how many weighted values standard attention can add up, of any size

# A sum that is at least this much of the largest exponential has lost nothing to underflow.
SMALLEST_SHARE = 2.0**SMALLEST_CERTIFIED_EXPONENT
# Values in nats whose exponentials the narrow form adds up; leaves float32 room for 2^40 of them.
LARGEST_NARROW_VALUE = 60.0
# Largest of V - out, in nats, up to which the backward pass makes dO · exp(V - out) of the output.
LARGEST_RISE = 40.0
# References are powers of 2^64: as long as the largest value lies within 22 nats of 0 the reference
# is 1, as in the narrow form.
POWER_STEP = 64.0
# The largest exponential may be half a step above its reference.
SMALLEST_CERTIFIED = SMALLEST_SHARE * 2.0 ** (POWER_STEP / 2)
LOWEST_VALUE = -3.4e38  # where a running maximum starts
LOWEST_ANCHORED = -2.0  # value down to which exp(V) - 1 is rounded in place of exp(V)
LARGEST_ANCHORED_FALL = 2.0  # of a value below what they share, in nats, in the backward pass

STATISTICS = ("smallest_y", "smallest_out", "smallest_value", "largest_value")
STATISTICS_ROWS = 8  # the smallest tile of rows that a TPU stores; rows beyond the names are zero


@dataclasses.dataclass(frozen=True)
class Options:
    """What a kernel is specialised on.

    Attributes:
      laser: LASER's readout instead of the standard one.
      causal: a query sees no later key.
      scale: factor of the logits.
      soft_cap: c in c · tanh(logits / c), 0 for none.
      block: rows of queries and of keys that a grid step holds; divides the padded length.
      tile: rows of one matrix product within a block, of the forward kernel; divides `block`.
      backward_tile: that of the backward kernel.
      window: how many keys before its own position a query sees, and how many after it; None for
        all. With `causal` none after it.
      wide: exp(V) relative to powers of two, for values that float32 does not hold; LASER only.
      vmem_bytes: what the compiler may use, None for its default.
      interpret: run on the CPU, for tests.
    """

    laser: bool
    causal: bool
    scale: float
    soft_cap: float
    block: int
    tile: int
    backward_tile: int
    window: tuple[int, int] | None = None
    wide: bool = False
    vmem_bytes: int | None = None
    interpret: bool = False

    @property
    def tiles(self) -> int:
        return self.block // self.tile

    def rows(self, tile: int) -> slice:
        """Rows of a block that belong to one of its tiles."""
        return slice(tile * self.tile, (tile + 1) * self.tile)

    def pairs(
        self, tile: int, diagonal: bool, apart: int = 0, queries_of_key: bool = False
    ) -> range:
        """Tiles that a query tile attends to (or a key tile is seen by) in a pair of blocks.

        Args:
          tile: of queries, or with `queries_of_key` of keys.
          diagonal: the blocks are the same, of a causal mask.
          apart: of a window, the number of the block of queries less that of the block of keys.
        """
        if self.window is not None:
            pairs = (
                (other, tile) if queries_of_key else (tile, other) for other in range(self.tiles)
            )
            met = [number for number, pair in enumerate(pairs) if self._meets(*pair, apart)]
            return range(met[0], met[-1] + 1) if met else range(0)
        if not diagonal:
            return range(self.tiles)
        return range(tile, self.tiles) if queries_of_key else range(tile + 1)

    @property
    def reach(self) -> tuple[int, int]:
        """Of a window: how many keys a query sees before its position, and how many after it."""
        assert self.window is not None
        return self.window[0], 0 if self.causal else self.window[1]

    def blocks_in_reach(self, blocks: int) -> tuple[int, int]:
        """Of a window: how many blocks of keys before its own one a block of queries meets, and
        how many after it.
        """
        before, after = (min(-(-keys // self.block), blocks - 1) for keys in self.reach)
        return before, after

    def steps(self, blocks: int) -> tuple[int, int, int]:
        """How many blocks one block meets at most, and of a window `blocks_in_reach`, else 0."""
        if self.window is None:
            return blocks, 0, 0
        before, after = self.blocks_in_reach(blocks)
        return min(before + after + 1, blocks), before, after

    def _meets(self, query: int, key: int, apart: int) -> bool:
        before, after = self.reach
        nearest, farthest = self._distances(query, key, apart)
        return nearest <= before and farthest >= -after

    def _distances(self, query: int, key: int, apart: int) -> tuple[int, int]:
        """Smallest and largest position of a query less that of a key, in a pair of tiles."""
        offset = apart * self.block + (query - key) * self.tile
        return offset - (self.tile - 1), offset + self.tile - 1

    def edges(self, query: int, key: int, apart: int) -> "Edges":
        """What of a pair of tiles the window hides."""
        before, after = self.reach
        smallest, largest = self._distances(query, key, apart)
        offset = (smallest + largest) // 2
        return Edges(
            before - offset if largest > before else None,
            -after - offset if smallest < -after else None,
        )

    def pieces(self, blocks: int) -> list[tuple[int, int]]:
        """Ranges of `apart` in a window that one piece of code serves, both ends included.

        Blocks that see each other whole need no mask, and are all alike, on either side.
        """
        before, after = self.blocks_in_reach(blocks)
        tiles = list(itertools.product(range(self.tiles), repeat=2))

        def kind(apart):
            whole = all(self.edges(*pair, apart) == NO_EDGES for pair in tiles)
            return (apart > 0) - (apart < 0) if whole and apart else f"{apart} itself"

        groups = (list(same) for _, same in itertools.groupby(range(-after, before + 1), kind))
        return [(group[0], group[-1]) for group in groups]


class Edges(NamedTuple):
    """Bounds of a query's row less a key's row in their tiles, beyond which the key is hidden.

    Attributes:
      most: None where no pair of the tiles is farther apart.
      least: likewise.
    """

    most: int | None
    least: int | None


NO_EDGES = Edges(None, None)


def head_of_keys(q: Array, k: Array) -> Callable[[Any], Any]:
    """From a head of queries, of (B, H, N, D), to that of the keys (B, K, N, D) that it meets.

    A group's heads are neighbours: its block of keys stays where it is from one to the next.
    """
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return lambda head: head
    if group & (group - 1):
        return lambda head: lax.div(head, group)
    # A division by a power of two that minds no sign: a dozen bundles less than `lax.div`.
    return lambda head: head >> (group.bit_length() - 1)


def member_of_group(head, group: int):
    """Which head of its group this is, the first being 0; see `head_of_keys`."""
    return lax.rem(head, group) if group & (group - 1) else head & (group - 1)


def kernel_name(what: str, options: Options, raw: bool) -> str:
    """Such as laser_forward; `_wide` and `_raw` run where that one does not do."""
    form = "_raw" if raw else "_wide" if options.wide else ""
    return f"{'laser' if options.laser else 'standard'}_{what}{form}"


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Matrix product in float32; float32 operands are not rounded to bfloat16 on the way."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def to_row(column: Array) -> Array:
    """(R, 1) -> (1, R), through a transposition of whole registers."""
    return jnp.broadcast_to(column, (column.shape[0], 128)).T[:1]


def to_column(row: Array) -> Array:
    """(1, R) -> (R, 1), through a transposition of whole registers."""
    return jnp.broadcast_to(row, (128, row.shape[1])).T[:, :1]


def capped(products: Array, options: Options) -> tuple[Array, Array | None]:
    """Products of queries and keys as logits in units of log 2, and the slope of the soft cap."""
    if not options.soft_cap:
        return products * (options.scale * LOG2_E), None
    t = jnp.tanh(products * (options.scale / options.soft_cap))
    return t * (options.soft_cap * LOG2_E), 1 - t * t


def masked(
    logits: Array, query_segments: Array | None, key_segments: Array | None, crosses: bool,
    query_axis: int, edges: Edges = NO_EDGES,
) -> Array:  # fmt: skip
    """Logits with what a query may not see at MASKED.

    Args:
      logits: (R, R), queries along `query_axis`.
      query_segments, key_segments: (R, 1) and (1, R) int32, the column along the axis 0; or None.
      crosses: the tile lies on the diagonal of a causal mask.
      edges: of a window.
    """
    if crosses:
        query = lax.broadcasted_iota(jnp.int32, logits.shape, query_axis)
        key = lax.broadcasted_iota(jnp.int32, logits.shape, 1 - query_axis)
        logits = jnp.where(query >= key, logits, MASKED)
    if edges != NO_EDGES:
        query = lax.broadcasted_iota(jnp.int32, logits.shape, query_axis)
        distance = query - lax.broadcasted_iota(jnp.int32, logits.shape, 1 - query_axis)
        if edges.most is not None:
            logits = jnp.where(distance <= edges.most, logits, MASKED)
        if edges.least is not None:
            logits = jnp.where(distance >= edges.least, logits, MASKED)
    if query_segments is not None:
        logits = jnp.where(query_segments == key_segments, logits, MASKED)
    return logits


def pairs_of_positions(q_shape, options: Options) -> int:
    """Of queries and keys that meet; causal attention is half of the square."""
    batch, heads, length, _ = q_shape
    if options.window is not None:
        return batch * heads * length * min(length, sum(options.reach) + 1)
    return batch * heads * length * length // (2 if options.causal else 1)


def pairs_of_blocks(q_shape, options: Options) -> int:
    """Of queries and keys that meet, of all heads; in a window at most so many."""
    batch, heads, length, _ = q_shape
    blocks = length // options.block
    met = blocks * options.steps(blocks)[0]
    if options.causal and options.window is None:
        met = blocks * (blocks + 1) // 2
    return batch * heads * met


def log2_exponential(v: Array, exact: bool) -> Array:
    """log2 exp(v), float32; with `exact` bounded, and no compiler joins the product to others."""
    log2, limit = v.astype(jnp.float32) * LOG2_E, LARGEST_EXPONENTIATED * LOG2_E
    return jnp.clip(log2, -limit, limit) if exact else log2


def reference_power(largest: Array) -> Array:
    """log2 of the power of two that exp(V) is taken relative to, for the largest value; float32."""
    bounded = jnp.clip(largest, -LARGEST_EXPONENTIATED, LARGEST_EXPONENTIATED)
    return POWER_STEP * jnp.round(bounded * (LOG2_E / POWER_STEP))


def power_of_two(n: Array) -> Array:
    """2^n for float32 whole n <= 0, exactly; 0 below the normal numbers."""
    biased = jnp.maximum(n, -127.0).astype(jnp.int32) + 127
    return lax.bitcast_convert_type(lax.shift_left(biased, jnp.full_like(biased, 23)), jnp.float32)


def anchor(smallest: Array, power: Array) -> Array:
    """1 or 0: what to subtract from all exponentials of a feature before they are rounded.

    Σ P·E = μ·Σ P + Σ P·(E - μ), and E - 1 is small where V is. Where some V is far below 0, E is
    small there and E - 1 is not, so E itself is rounded. The choice changes how a sum is rounded
    and nothing else.

    Args:
      smallest: of the values V.
      power: log2 of the reference of the exponentials.
    """
    return jnp.where((power == 0) & (smallest >= LOWEST_ANCHORED), 1.0, 0.0)
