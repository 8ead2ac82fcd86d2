"""Several stores as one, each with a share of the rows: `a:0.7,b:0.3`.

Which store a row of the run comes from, and which of its rows it is, follow from the row's number
in the run alone, as in order.py: no state, no host, nothing to save. The stores take turns in
a pattern that repeats; the weights are fractions, so that one period has each store's share
exactly. Within it the turns are those of Tijdeman's chairman assignment (Discrete Mathematics 32,
1980): after any number of rows each store has had its share of them to less than one row. The j-th
turn of a store is the j-th row of its own epochs (order.py), so every row comes once an epoch
of its store.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from data.reading.order import BLOCK_ROWS, Places, check_step, places_at
from data.reading.store import Split

LONGEST_PERIOD = 100_000  # rows; a table of so many, made at the start


@dataclasses.dataclass(frozen=True)
class Part:
    """A store's folder and its share of the rows; shares add up to 1."""

    path: str
    share: Fraction


def parse(text: str) -> list[Part]:
    """The parts of `PATH:WEIGHT,PATH:WEIGHT`, or the one of a path alone, which has no comma.

    Raises:
      ValueError: a part without a weight above 0, a path twice, or weights of too many digits.
    """
    if "," not in text:
        return [Part(text, Fraction(1))]
    weights: dict[str, Fraction] = {}
    for part in text.split(","):
        path, _, number = part.strip().rpartition(":")
        try:
            weight = Fraction(number)
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        if not path or weight <= 0:
            raise ValueError(
                f"data.store={text!r}: {part.strip()!r} is no PATH:WEIGHT with a weight above 0, "
                "such as a:0.7,b:0.3"
            )
        if path in weights:
            raise ValueError(f"data.store={text!r}: {path!r} is there twice; add up its weights")
        weights[path] = weight
    total = sum(weights.values())
    parts = [Part(path, weight / total) for path, weight in weights.items()]
    period = math.lcm(*(part.share.denominator for part in parts))
    if period > LONGEST_PERIOD:
        raise ValueError(
            f"data.store={text!r}: shares of such weights repeat only after {period} rows; use "
            "weights of fewer digits"
        )
    return parts


def names(parts: Sequence[Part]) -> list[str]:
    """What to call the stores: the folder's name, or its path where names are the same."""
    short = [Path(part.path).name for part in parts]
    return short if len(set(short)) == len(short) else [part.path for part in parts]


def turns(shares: Sequence[Fraction]) -> np.ndarray:
    """Whose turn each row of a period is, (period,) int64 indices of shares.

    At row n the stores that are behind far enough may come, and of them the one that would be too
    far behind first.
    """
    period = math.lcm(*(share.denominator for share in shares))
    counts = [int(share * period) for share in shares]  # rows of each in a period
    if len(counts) == 1:
        return np.zeros(period, np.int64)
    slack = 2 * len(counts) - 2
    had = [0] * len(counts)
    found = np.empty(period, np.int64)
    for n in range(1, period + 1):
        # All times slack · period, to stay in whole numbers.
        behind = [slack * (n * count - period * h) for count, h in zip(counts, had, strict=True)]
        able = [k for k, x in enumerate(behind) if x >= period]
        k = min(able, key=lambda k: Fraction((slack - 1) * period - behind[k], counts[k]))
        found[n - 1] = k
        had[k] += 1
    return found


class Mixture:
    """Splits of several stores as one, whose rows are numbered through, one store after another."""

    def __init__(self, splits: Sequence[Split], shares: Sequence[Fraction]):
        self._splits = list(splits)
        self._turns = turns(shares)
        self._period = len(self._turns)
        # (period + 1, stores): turns that each has had before a row of the period.
        taken = self._turns[:, None] == np.arange(len(self._splits))
        self._before = np.concatenate([np.zeros_like(taken[:1], np.int64), taken.cumsum(0)])
        self.num_tokens = sum(split.num_tokens for split in self._splits)

    def num_rows(self, seq_len: int) -> int:
        """Of all stores together."""
        return sum(split.num_rows(seq_len) for split in self._splits)

    def counts(self, rows: int) -> np.ndarray:
        """How many of the run's first rows each store has had, (stores,) int64."""
        periods, rest = divmod(rows, self._period)
        return periods * self._before[-1] + self._before[rest]

    def places(
        self,
        seed: int,
        step: int,
        batch_size: int,
        seq_len: int,
        block_rows: int = BLOCK_ROWS,
        steps: int = 1,
    ) -> Places:
        """Where the rows of the global batches of steps are, as `order.step_places`.

        A store has its share of the lanes, to the nearest whole number. Where its share of a batch
        is none, lanes wander from host to host, and those that share a block read it each.
        """
        check_step(step, batch_size)
        numbers = step * batch_size + np.arange(steps * batch_size, dtype=np.int64)
        periods, within = np.divmod(numbers, self._period)
        found = np.empty((3, len(numbers)), np.int64)
        first = 0
        for k, split in enumerate(self._splits):
            mine = self._turns[within] == k
            turn = periods[mine] * self._before[-1, k] + self._before[within[mine], k]
            lanes = max(1, round(batch_size * int(self._before[-1, k]) / self._period))
            rows = split.num_rows(seq_len)
            places = places_at(seed + k, turn, rows, lanes, block_rows)
            found[:, mine] = first + places.first, places.length, places.within
            first += rows
        return Places(*found)

    def piece(self, first: int, count: int, seq_len: int) -> np.ndarray:
        """As `Split.piece`, of the numbers that `places` gives; all are rows of one store."""
        store, first = self.located(first, seq_len)
        return self._splits[store].piece(first, count, seq_len)

    def located(self, row: int, seq_len: int) -> tuple[int, int]:
        """Which store a row of all is of, counted from 0, and which of its rows it is."""
        for store, split in enumerate(self._splits):
            rows = split.num_rows(seq_len)
            if row < rows:
                return store, row
            row -= rows
        raise ValueError(f"row {row} after the last one is not there")
