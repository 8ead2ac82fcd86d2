"""Which rows make up the global batch of a step: arithmetic alone, no state.

Every epoch visits every row exactly once, in a pseudo-random order of its own. The order is never
stored: a Feistel network permutes the next power of four, and results beyond the last row are
permuted again until they fall inside (cycle walking), so that any position of any epoch costs the
same. A run therefore resumes from its step alone, on any number of hosts.
"""

import numpy as np

ROUNDS = 8
MIN_HALF_BITS = 2  # mixes few rows better than the smallest network that holds them


def row_ids(seed: int, step: int, batch_size: int, num_rows: int) -> np.ndarray:
    """Rows of the global batch of one step.

    Args:
      seed: any integer; another seed gives another order.
      step: counted from 0. A step may begin in one epoch and end in the next.
      batch_size: rows of a step over all hosts.
      num_rows: rows of the split, 1 to 2**60.

    Returns:
      (batch_size,) int64, values in [0, num_rows).

    Raises:
      ValueError: an argument is out of range.
    """
    if not 1 <= num_rows <= 2**60:
        raise ValueError(
            f"num_rows={num_rows}: must be in 1..2**60; with none, use shorter rows or more text"
        )
    if step < 0 or batch_size < 1:
        raise ValueError(f"step={step}, batch_size={batch_size}: must be at least 0 and 1")
    first_epoch, offset = divmod(step * batch_size, num_rows)  # Python integers: no overflow
    positions = np.uint64(offset) + np.arange(batch_size, dtype=np.uint64)
    epochs = np.uint64(first_epoch) + positions // np.uint64(num_rows)
    return _permute(positions % np.uint64(num_rows), _keys(seed, epochs), num_rows)


def rows_at(seed: int, positions: np.ndarray, num_rows: int) -> np.ndarray:
    """Rows at any positions of the endless order that `row_ids` cuts into batches.

    Args:
      seed, num_rows: as of `row_ids`.
      positions: (n,) int64, counted from 0.

    Returns:
      (n,) int64, values in [0, num_rows).
    """
    epochs, within = np.divmod(positions.astype(np.uint64), np.uint64(num_rows))
    return _permute(within, _keys(seed, epochs), num_rows)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input moves half of those of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    """Round keys, (ROUNDS, len(epochs)) uint64."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    seeds = np.full_like(epochs, seed % 2**64)
    per_epoch = _mix(_mix(seeds + golden) ^ (epochs * golden))
    rounds = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None]
    return _mix(per_epoch[None, :] + rounds * golden)


def _permute(values: np.ndarray, keys: np.ndarray, num_rows: int) -> np.ndarray:
    half_bits = max(MIN_HALF_BITS, ((num_rows - 1).bit_length() + 1) // 2)
    permuted = _feistel(values, keys, half_bits)
    while (outside := np.flatnonzero(permuted >= num_rows)).size:
        permuted[outside] = _feistel(permuted[outside], keys[:, outside], half_bits)
    return permuted.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Permutes [0, 4**half_bits): each round adds a keyed hash of one half to the other."""
    shift, drop = np.uint64(half_bits), np.uint64(64 - half_bits)
    mask = np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) >> drop)
    return (left << shift) | right
