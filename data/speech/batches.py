"""Batches of recordings, padded to one length, as a function of the seed and the step.

    inputs      (batch, frames, MEL_BINS) float32: normalised features, 0 beyond a recording
    frames      (batch,) int32: of each recording; 0 in a row that fills up a batch
    targets     (batch, labels) int32: token ids and EOS, 0 beyond
    labels      (batch,) int32: of each transcript
    noise       (batch,) uint32, in training alone: what the row's dropout follows from

An epoch has each recording once, as in data/reading/examples.py. Every host makes the features of
its own rows. What is drawn of a row, SpecAugment and noise, follows from seed, step and row.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jax.sharding import Sharding

from data.reading.examples import eval_ids, example_ids
from data.reading.loader import Arrays, Batch, Prefetcher, global_batch
from data.speech.augment import SpecAugment, draws_of_row
from data.speech.features import MEL_BINS
from data.speech.store import Split

THREADS = 16  # NumPy and SciPy let others run while they compute


class Shape(NamedTuple):
    """The shape of a batch. No recording has more frames, and no transcript more labels."""

    rows: int
    frames: int
    labels: int


def train_batches(
    split: Split,
    shape: Shape,
    augment: SpecAugment,
    *,
    seed: int,
    start_step: int,
    stop_step: int,
    sharding: Sharding | None = None,
    prefetch: int = 2,
) -> Prefetcher:
    """(step, batch) for each step in [start_step, stop_step), made ahead by a thread."""
    pool = ThreadPoolExecutor(THREADS)

    def make_batch(step: int) -> tuple[int, Batch]:
        ids = example_ids(seed, step, shape.rows, len(split))

        def fill(row: int, features: np.ndarray) -> int:
            draws = draws_of_row(seed, step, row)
            augment.mask(features, draws)
            return int(draws.integers(2**32))

        def read(start: int, stop: int) -> Arrays:
            return _arrays(split, ids, range(start, stop), shape, pool, fill)

        return step, global_batch(read, shape[:2], sharding)

    return Prefetcher(make_batch, range(start_step, stop_step), prefetch, pool.shutdown)


def eval_batches(
    split: Split, shape: Shape, *, sharding: Sharding | None = None, max_batches: int = 0
) -> Iterator[Batch]:
    """The recordings of `eval_ids`; the last batch is filled up with rows without frames."""
    all_ids = eval_ids(len(split), shape.rows, max_batches)
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(all_ids), shape.rows):
            ids = all_ids[first : first + shape.rows]

            def read(start: int, stop: int, ids: np.ndarray = ids) -> Arrays:
                return _arrays(split, ids, range(start, stop), shape, pool, None)

            yield global_batch(read, shape[:2], sharding)


def _arrays(
    split: Split,
    ids: np.ndarray,
    rows: Sequence[int],
    shape: Shape,
    pool: ThreadPoolExecutor,
    fill: Callable[[int, np.ndarray], int] | None,
) -> Arrays:
    """Rows of the batch that has the recordings `ids`.

    With `fill`, that of training: it masks the features of a row, and draws its noise.
    """
    count = len(rows)
    arrays: Arrays = {
        "inputs": np.zeros((count, shape.frames, MEL_BINS), np.float32),
        "frames": np.zeros(count, np.int32),
        "targets": np.zeros((count, shape.labels), np.int32),
        "labels": np.zeros(count, np.int32),
    }
    if fill:
        arrays["noise"] = np.zeros(count, np.uint32)

    def make(place: int) -> None:
        row = rows[place]
        if row >= len(ids):
            return
        features, labels = split.features(ids[row]), split.labels(ids[row])
        if fill:
            arrays["noise"][place] = fill(row, features)
        arrays["inputs"][place, : len(features)] = features
        arrays["frames"][place] = len(features)
        arrays["targets"][place, : len(labels)] = labels
        arrays["labels"][place] = len(labels)

    list(pool.map(make, range(count)))
    return arrays
