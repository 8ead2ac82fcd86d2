"""Reads rows by their blocks, many at a time and ahead of the steps that need them.

A bucket answers after 30 to 100 ms, however little is asked for. So a block (order.py) is one
request, made as soon as one of the next `read_ahead` steps needs it, and up to `requests` of them
are under way at once. A block is kept until no step in sight needs it. What is in memory is thus
bounded: for each row that a host has in a batch, at most 2 blocks and `read_ahead` rows more, as
tokens of the store's own type.
"""

import collections
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self

import numpy as np

from data.reading.order import Places

READ_AHEAD, REQUESTS = 32, 64  # as in configs/base.py


class Rows(Protocol):
    """What rows are read from: a Split, or a Mixture of several."""

    def piece(self, first: int, count: int, seq_len: int) -> np.ndarray:
        """Rows [first, first + count), (count, seq_len + 1), by one read of each file."""


class BlockReader:
    """An iterator over (step, rows), rows as (n, seq_len + 1) int32, for each step of a plan.

    An error of a read is raised by `next`, for the step that needs it. Leave the context, or call
    `close`, to end the threads.
    """

    def __init__(
        self,
        source: Rows,
        seq_len: int,
        plan: Iterator[tuple[int, Places]],
        read_ahead: int = READ_AHEAD,
        requests: int = REQUESTS,
    ):
        """Args:
        source: of the rows.
        seq_len: tokens of a row.
        plan: the places of each step's rows; it is asked for `read_ahead` steps too many.
        read_ahead: steps, at least 0.
        requests: under way at once, at least 1.
        """
        self._source, self._seq_len = source, seq_len
        self._plan, self._read_ahead = plan, read_ahead
        self._pool = ThreadPoolExecutor(requests, thread_name_prefix="data-read")
        self._window: collections.deque[tuple[int, Places]] = collections.deque()
        self._blocks: dict[tuple[int, int], Future[np.ndarray]] = {}
        self._last_step: dict[tuple[int, int], int] = {}  # that needs a block, of those in sight

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, np.ndarray]:
        self._look_ahead()
        if not self._window:
            raise StopIteration
        step, places = self._window.popleft()
        return step, self._gather(step, places)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads, after what they are reading. May be called more than once."""
        self._pool.shutdown(cancel_futures=True)

    @property
    def num_blocks(self) -> int:
        """Blocks that are kept, or being read."""
        return len(self._blocks)

    def _look_ahead(self) -> None:
        while len(self._window) <= self._read_ahead:
            step, places = next(self._plan, (0, None))
            if places is None:
                return
            self._window.append((step, places))
            for block in dict.fromkeys(_blocks(places)):
                self._last_step[block] = step
                if block not in self._blocks:
                    job = self._pool.submit(self._source.piece, *block, self._seq_len)
                    self._blocks[block] = job

    def _gather(self, step: int, places: Places) -> np.ndarray:
        rows = np.empty((len(places.first), self._seq_len + 1), np.int32)
        blocks = _blocks(places)
        for row, block, within in zip(rows, blocks, places.within.tolist(), strict=True):
            row[:] = self._blocks[block].result()[within]
        for block in blocks:
            if self._last_step.get(block) == step:
                del self._blocks[block], self._last_step[block]
        return rows


def _blocks(places: Places) -> list[tuple[int, int]]:
    """First row and length of each row's block."""
    return list(zip(places.first.tolist(), places.length.tolist(), strict=True))
