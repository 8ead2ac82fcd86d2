"""Batches as global jax.Arrays, made ahead of the step by a background thread.

The batch of a step follows from the seed and the step alone (order.py). Each host looks up in
the sharding which rows of the global batch its devices hold, and reads no other blocks than theirs,
ahead of the steps (blocks.py).

    inputs       (batch_size, seq_len) int32: row[:-1]
    targets      (batch_size, seq_len) int32: row[1:]
    weights      (batch_size, seq_len) float32: 1 for a real target, 0 for padding
    segment_ids  (batch_size, seq_len) int32, on request: documents of a row, counted from 1; an EOS
                 belongs to the document after it, as its beginning-of-sequence token
"""

import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import jax
import numpy as np
from jax.sharding import Sharding

from data.reading.blocks import READ_AHEAD, REQUESTS, BlockReader
from data.reading.masking import Masking
from data.reading.mixture import Mixture
from data.reading.order import BLOCK_ROWS, Places, one_piece_each
from data.reading.store import Split

Batch = dict[str, jax.Array]
Arrays = dict[str, np.ndarray]
PLANNED_ROWS = 1024  # at a time: the arithmetic of fewer takes as long
POLL_SECONDS = 0.05  # how long close() may wait for the thread to notice


def train_batches(
    split: Split | Mixture,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    segment_ids: bool,
    eos_id: int,
    sharding: Sharding | None = None,
    prefetch: int = 2,
    block_rows: int = BLOCK_ROWS,
    read_ahead: int = READ_AHEAD,
    requests: int = REQUESTS,
    masking: Masking | None = None,
) -> "Prefetcher":
    """Shuffled batches of whole rows, one for each step in [start_step, stop_step).

    Args:
      split: of a TokenStore, or of several.
      seq_len: tokens of a row.
      batch_size: rows of a step over all hosts.
      seed: of the order.
      start_step: steps done already.
      stop_step: steps of the whole run.
      segment_ids: whether batches have them.
      eos_id: of the tokenizer.
      sharding: of a (batch, sequence) array; None puts whole batches on the default device.
      prefetch: batches made ready ahead, at least 1.
      block_rows: most neighbouring rows that are read in one piece, at least 1.
      read_ahead: steps whose blocks are asked for ahead of the batch that is made, at least 0.
      requests: reads of this host under way at once, at least 1.
      masking: of tokens to fill in, in the place of a next token; needs segment_ids.

    Returns:
      An iterator and context manager over (step, batch).

    Raises:
      ValueError: the split is shorter than one row, or prefetch < 1.
    """
    num_rows = split.num_rows(seq_len)
    if num_rows < 1:
        raise ValueError(
            f"seq_len={seq_len}: the split has only {split.num_tokens} tokens; use shorter rows"
        )

    shape = (batch_size, seq_len)
    ranges = host_ranges(shape, sharding)

    own = np.concatenate([np.arange(*part) for part in ranges])
    together = -(-PLANNED_ROWS // batch_size)

    def plan() -> Iterator[tuple[int, Places]]:
        for first in range(start_step, stop_step, together):
            steps = min(together, stop_step - first)
            places = split.places(seed, first, batch_size, seq_len, block_rows, steps)
            for i in range(steps):
                yield first + i, places[i * batch_size + own]

    def make_batch(step: int) -> tuple[int, Batch]:
        _, rows = next(reader)
        valid = np.full(len(rows), seq_len)
        arrays = arrays_of(rows, valid, eos_id if segment_ids else None)
        if masking:
            arrays = masking(arrays, step, own)
        return step, global_batch(parts_of(ranges, arrays), shape, sharding)

    reader = BlockReader(split, seq_len, plan(), read_ahead, requests)
    return Prefetcher(make_batch, range(start_step, stop_step), prefetch, reader.close)


def eval_batches(
    split: Split,
    *,
    seq_len: int,
    batch_size: int,
    segment_ids: bool,
    eos_id: int,
    pad_id: int,
    sharding: Sharding | None = None,
    max_batches: int = 0,
    read_ahead: int = READ_AHEAD,
    requests: int = REQUESTS,
    masking: Masking | None = None,
) -> Iterator[Batch]:
    """The split in order, every token but the first one a target exactly once.

    The last row may be short and the last batch may lack rows: both are filled up with `pad_id` at
    weight 0. The other arguments are those of `train_batches`.

    Args:
      max_batches: stop after so many; 0 = all.
    """
    num_rows = split.num_rows(seq_len, partial=True)
    num_batches = -(-num_rows // batch_size)

    shape = (batch_size, seq_len)
    ranges = host_ranges(shape, sharding)
    own = [np.arange(*part) for part in ranges]
    columns = np.arange(seq_len + 1)

    def plan() -> Iterator[tuple[int, Places]]:
        for step in range(min(num_batches, max_batches or num_batches)):
            runs = [part + step * batch_size for part in own]
            yield step, one_piece_each([run[run < num_rows] for run in runs])

    with BlockReader(split, seq_len, plan(), read_ahead, requests) as reader:
        for step, found in reader:
            ids = step * batch_size + np.concatenate(own)
            rows, valid = np.full((len(ids), seq_len + 1), pad_id, np.int32), np.zeros_like(ids)
            there = ids < num_rows
            rows[there], valid[there] = found, split.targets(ids[there], seq_len)
            rows[columns > valid[:, None]] = pad_id
            arrays = arrays_of(rows, valid, eos_id if segment_ids else None)
            if masking:
                arrays = masking(arrays, None, ids)
            yield global_batch(parts_of(ranges, arrays), shape, sharding)


class Prefetcher:
    """Calls a function for each step in a background thread and hands over the results in order.

    An exception of the function is raised by `next`, with its traceback. Leave the context, or call
    `close`, to end the thread, and what else `on_close` ends.

    Attributes:
      seconds_waited: in `next`, so far.
    """

    def __init__(
        self,
        make_batch: Callable[[int], tuple[int, Batch]],
        steps: range,
        prefetch: int,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the thread. Raises ValueError if prefetch < 1, after a call of `on_close`."""
        if prefetch < 1:
            on_close()
            raise ValueError(f"prefetch={prefetch}: must be at least 1")
        self.seconds_waited = 0.0
        self._queue: queue.Queue[tuple[int, Batch] | BaseException | None]
        self._queue = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._on_close = on_close
        self._thread = threading.Thread(
            target=_fill,
            args=(self._queue, self._stop, make_batch, steps),
            name="data-prefetch",
            daemon=True,  # a forgotten close() must not keep the process alive
        )
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._stop.is_set():
            raise StopIteration
        began = time.perf_counter()
        item = self._queue.get()
        self.seconds_waited += time.perf_counter() - began
        if isinstance(item, tuple):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread, after the batch it is working on. May be called more than once."""
        self._stop.set()
        self._thread.join()
        self._on_close()


def _fill(
    results: queue.Queue,
    stop: threading.Event,
    make_batch: Callable[[int], tuple[int, Batch]],
    steps: range,
) -> None:
    """The thread: results of `make_batch`, then None or the exception that ended it."""

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                return results.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    try:
        for step in steps:
            if stop.is_set():
                return
            put(make_batch(step))
    except BaseException as error:  # whatever it is, the main thread must hear of it
        put(error)
    else:
        put(None)


def arrays_of(rows: np.ndarray, valid: np.ndarray, eos_id: int | None) -> Arrays:
    """Splits rows (n, seq_len + 1) with so many valid targets (n,) into the arrays of a batch; with
    segment ids if `eos_id` is given."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    arrays = {
        "inputs": inputs,
        "targets": targets,
        "weights": (np.arange(inputs.shape[1]) < valid[:, None]).astype(np.float32),
    }
    if eos_id is not None:
        arrays["segment_ids"] = 1 + np.cumsum(inputs == eos_id, axis=1, dtype=np.int32)
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def host_ranges(shape: tuple[int, ...], sharding: Sharding | None) -> list[tuple[int, int]]:
    """The rows [start, stop) of a global (batch, ...) array that this host's devices hold."""
    if sharding is None:
        return [(0, shape[0])]
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({index[0].indices(shape[0])[:2] for index in indices if index is not None})


def parts_of(ranges: list[tuple[int, int]], arrays: Arrays) -> Callable[[int, int], Arrays]:
    """How `global_batch` reads, where `arrays` has the rows of `ranges` one after the other."""
    lengths = [stop - start for start, stop in ranges]
    places = dict(zip(ranges, itertools.accumulate(lengths, initial=0)))

    def read(start: int, stop: int) -> Arrays:
        first = places[start, stop]
        return {name: array[first : first + stop - start] for name, array in arrays.items()}

    return read


def global_batch(
    read: Callable[[int, int], Arrays], shape: tuple[int, ...], sharding: Sharding | None
) -> Batch:
    """Global arrays from `read(start, stop)`, which is asked for this host's rows alone, once.

    Their dims besides the rows are those of what is read; `shape` has the rows of all hosts first.
    """
    batch_size = shape[0]
    if sharding is None:
        return {name: jax.device_put(array) for name, array in read(0, batch_size).items()}
    parts = {(start, stop): read(start, stop) for start, stop in host_ranges(shape, sharding)}

    def piece(name: str, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        return parts[start, stop][name][:, *index[1:]]

    return {
        name: jax.make_array_from_callback(
            (batch_size, *array.shape[1:]), sharding, functools.partial(piece, name)
        )
        for name, array in next(iter(parts.values())).items()
    }
