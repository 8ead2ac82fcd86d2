"""Which rows make up the global batch of a step: arithmetic alone, no state.

Every epoch visits every row exactly once, in a pseudo-random order of its own that reads long
pieces of the store: a bucket answers late, whatever it is asked for. The batch has as many lanes as
rows. A lane takes a block of neighbouring rows, one row a step, in an order of its own, and then
its next block. So the rows of a batch are of as many random places, and each place is read once, in
one piece, by the host that has the lane.

    N rows, B lanes, blocks of R = min(block_rows, N // B) rows
    rounds    N // (B·R) of them: each is R steps, in which every lane has one block
    a short   round of blocks of r = (rows left) // B rows, if r is not 0
    the rest  fewer than B rows, one by one

What is left after the rounds is one piece of the store, which lies between two blocks at a random
place, another one in every epoch. Nothing is stored: a Feistel network permutes the next power of
four, and results beyond the last number are permuted again until they fall inside (cycle walking),
so that any position of any epoch costs the same. A run therefore resumes from its step alone, on
any number of hosts.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

ORDER = "blocks, 1"  # a run goes on in this order only; any change here must give it another name
BLOCK_ROWS = 256  # as in configs/base.py
ROUNDS = 8
MIN_HALF_BITS = 2  # mixes few rows better than the smallest network that holds them
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where rows are, each array (n,) int64.

    Attributes:
      first: the first row of the block that the row is read with.
      length: rows of the block.
      within: of the row in its block, counted from 0.
    """

    first: np.ndarray
    length: np.ndarray
    within: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """The rows themselves, (n,) int64."""
        return self.first + self.within

    def __getitem__(self, part: np.ndarray) -> "Places":
        return Places(self.first[part], self.length[part], self.within[part])


def one_piece_each(runs: Sequence[np.ndarray]) -> Places:
    """Places of runs of neighbouring rows, (n,) int64 each, of which some may be empty."""
    return Places(
        np.concatenate([np.full_like(run, run.min(initial=2**62)) for run in runs]),
        np.concatenate([np.full_like(run, len(run)) for run in runs]),
        np.concatenate([np.arange(len(run)) for run in runs]),
    )


def row_ids(
    seed: int, step: int, batch_size: int, num_rows: int, block_rows: int = BLOCK_ROWS
) -> np.ndarray:
    """Rows of the global batch of one step.

    Args:
      seed: any integer; another seed gives another order.
      step: counted from 0. A step may begin in one epoch and end in the next.
      batch_size: rows of a step over all hosts.
      num_rows: rows of the split, 1 to 2**60.
      block_rows: most rows of a block, at least 1.

    Returns:
      (batch_size,) int64, values in [0, num_rows).

    Raises:
      ValueError: an argument is out of range.
    """
    return step_places(seed, step, batch_size, num_rows, block_rows).rows


def step_places(
    seed: int,
    step: int,
    batch_size: int,
    num_rows: int,
    block_rows: int = BLOCK_ROWS,
    steps: int = 1,
) -> Places:
    """`row_ids`, with the blocks that they are read with, of `steps` steps one after the other."""
    check_step(step, batch_size)
    _check(num_rows, block_rows)
    epoch, offset = divmod(step * batch_size, num_rows)  # Python integers: no overflow
    positions = np.uint64(offset) + np.arange(steps * batch_size, dtype=np.uint64)
    return _places(seed, epoch, positions, num_rows, batch_size, block_rows)


def places_at(
    seed: int, positions: np.ndarray, num_rows: int, lanes: int, block_rows: int
) -> Places:
    """The same at any positions of the endless order that `row_ids` cuts into batches.

    Args:
      seed, num_rows, block_rows: as of `row_ids`.
      positions: (n,) int64, counted from 0.
      lanes: rows between two of a block; for `row_ids` the batch size.
    """
    _check(num_rows, block_rows)
    return _places(seed, 0, positions.astype(np.uint64), num_rows, lanes, block_rows)


def shuffled(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """All rows of an epoch without blocks, for what lies in memory: (num_rows,) int64."""
    _check(num_rows, 1)
    keys = _keys(_mix_seed(seed, np.full(num_rows, epoch, np.uint64)))
    return _permute(np.arange(num_rows, dtype=np.uint64), keys, num_rows).astype(np.int64)


def check_step(step: int, batch_size: int) -> None:
    """Raises ValueError for numbers that no step has."""
    if step < 0 or batch_size < 1:
        raise ValueError(f"step={step}, batch_size={batch_size}: must be at least 0 and 1")


def _check(num_rows: int, block_rows: int) -> None:
    if not 1 <= num_rows <= 2**60:
        raise ValueError(
            f"num_rows={num_rows}: must be in 1..2**60; with none, use shorter rows or more text"
        )
    if block_rows < 1:
        raise ValueError(f"block_rows={block_rows}: must be at least 1")


def _places(
    seed: int, first_epoch: int, positions: np.ndarray, num_rows: int, lanes: int, block_rows: int
) -> Places:
    epochs, within = np.divmod(positions, np.uint64(num_rows))
    mixed = _mix_seed(seed, epochs + np.uint64(first_epoch))
    size = min(block_rows, num_rows // lanes)
    blocks = num_rows // (lanes * size) * lanes if size else 0
    left = num_rows - blocks * size
    short = left // lanes
    # Before which block the rows are that fill no round.
    gap = _mix(mixed ^ GOLDEN) % np.uint64(blocks + 1)

    found = np.empty((3, len(positions)), np.int64)  # first, length, within
    ends = np.cumsum([blocks * size, short * lanes, left - short * lanes])
    part = np.searchsorted(ends, within.astype(np.int64), side="right")
    for k, (count, length) in enumerate([(blocks, size), (lanes, short), (left % lanes, 1)]):
        mine = np.flatnonzero(part == k)
        if not mine.size:
            continue
        place = within[mine] - np.uint64(ends[k - 1] if k else 0)
        rounds, inside = np.divmod(place, np.uint64(max(lanes * length, 1)))
        turn, lane = np.divmod(inside, np.uint64(lanes))
        own = _mix(mixed[mine] + np.uint64(k))
        block = _permute(rounds * np.uint64(lanes) + lane, _keys(own), count)
        row = np.zeros_like(turn)
        if length > 1:
            row = _permute(turn, _keys(_mix(own ^ _mix(block + GOLDEN))), length)
        before = gap[mine] * np.uint64(size)  # rows before those that fill no round
        first = block * np.uint64(length)
        if k == 0:
            first += np.where(block >= gap[mine], np.uint64(left), np.uint64(0))
        else:
            first += before + np.uint64(short * lanes if k == 2 else 0)
        found[0, mine], found[1, mine], found[2, mine] = first, length, row
    return Places(*found)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input moves half of those of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_seed(seed: int, epochs: np.ndarray) -> np.ndarray:
    """One number for each epoch, (n,) uint64."""
    seeds = np.full_like(epochs, seed % 2**64)
    return _mix(_mix(seeds + GOLDEN) ^ (epochs * GOLDEN))


def _keys(numbers: np.ndarray) -> np.ndarray:
    """Round keys, (ROUNDS, len(numbers)) uint64."""
    rounds = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None]
    return _mix(numbers[None, :] + rounds * GOLDEN)


def _permute(values: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Permutes [0, count), each value by the keys in its column: (n,) uint64."""
    half_bits = max(MIN_HALF_BITS, ((count - 1).bit_length() + 1) // 2)
    permuted = _feistel(values, keys, half_bits)
    while (outside := np.flatnonzero(permuted >= count)).size:
        permuted[outside] = _feistel(permuted[outside], keys[:, outside], half_bits)
    return permuted


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Permutes [0, 4**half_bits): each round adds a keyed hash of one half to the other."""
    shift, drop = np.uint64(half_bits), np.uint64(64 - half_bits)
    mask = np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) >> drop)
    return (left << shift) | right
