"""Batches of images as global jax.Arrays: decoded and augmented on all cores, ahead of the step.

Which images make up a step, and all that is drawn for them, follows from the seed, the step and the
place in the global batch: no number of hosts, threads or resumptions changes a byte.

    images          (batch_size, size, size, 3) uint8
    labels          (batch_size,) int32
    weights         (batch_size,) float32: 0 for an image that is broken or fills a last batch
    noise           (batch_size,) uint32: what the image's dropout follows from; in training
    partners        as images: the ones before each in the batch, with mixup (arXiv 1710.09412)
    partner_labels  their labels
    shares          (batch_size,) float32: of the image itself in what is mixed; one number a step
"""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jax.sharding import Sharding

from data.images import augment
from data.images.draws import Draws
from data.images.sources import Broken, Example, Images
from data.reading.examples import eval_ids, steps_per_epoch
from data.reading.loader import Arrays, Batch, Prefetcher, global_batch, host_ranges, parts_of
from data.reading.order import step_places

ROWS_PER_TASK = 8  # of a thread
STEPS_AHEAD = 1  # whose images are in work besides those of the batch that is waited for
NOISE, MIXUP = 1, 2  # streams besides that of a place's augmentation, which has a key of three


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What becomes of an image.

    Attributes:
      size: of its sides in the batch.
      crop: "imagenet", random parts that are mirrored half of the time, and for evaluation the
        centre; or "none", the whole image.
      operations: of RandAugment on each image; 0 = off.
      magnitude: of these, 0 to 10.
      mixup: alpha of the distribution of shares; 0 = off.
    """

    size: int
    crop: str
    operations: int
    magnitude: float
    mixup: float

    def train(self, example: Example, draws: Draws) -> augment.Image:
        """Pixels to train on. Raises BrokenImage."""
        image = _pixels(example)
        if self.crop == "none":
            image = _whole(image, self.size)
        else:
            image = augment.random_crop(image, self.size, draws)
            image = augment.mirrored(image) if draws.sign() > 0 else image
        return augment.rand_augment(image, self.operations, self.magnitude, draws)

    def evaluate(self, example: Example) -> augment.Image:
        """Pixels to evaluate on. Raises BrokenImage."""
        image = _pixels(example)
        crop = _whole if self.crop == "none" else augment.centre_crop
        return crop(image, self.size)


def _pixels(example: Example) -> augment.Image:
    return augment.decode(example.image) if isinstance(example.image, bytes) else example.image


def _whole(image: augment.Image, size: int) -> augment.Image:
    return image if image.shape[:2] == (size, size) else augment.resize(image, size)


def train_batches(
    images: Images,
    augmentation: Augmentation,
    broken: Broken,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    sharding: Sharding | None,
    workers: int,
    prefetch: int = 2,
    block_rows: int = 1,
) -> Prefetcher:
    """Augmented batches in random order, one for each step in [start_step, stop_step).

    Args:
      images: to train on.
      augmentation: of them.
      broken: is told of images that cannot be decoded; they get weight 0.
      batch_size: images of a step over all hosts.
      seed: of the order and of all that is drawn.
      start_step: steps done already.
      stop_step: steps of the whole run.
      sharding: of the rows; None puts whole batches on the default device.
      workers: threads that decode.
      prefetch: batches made ready ahead, at least 1.
      block_rows: most neighbouring images that a lane of the batch takes one after the other.

    Returns:
      An iterator and context manager over (step, batch).
    """
    ranges = host_ranges((batch_size,), sharding)
    lanes = _lanes(ranges, batch_size)
    places = {start: lanes.index(start, 1) for start, _ in ranges}

    def begin(step: int) -> Callable[[], Arrays]:
        rows = step_places(seed, step, batch_size, len(images), block_rows).rows[lanes].tolist()

        def make(k: int) -> tuple[augment.Image, int]:
            example = images.read(rows[k])
            return augmentation.train(example, Draws(seed, step, lanes[k])), example.label

        return crew.begin(rows, make)

    crew = _Crew(images, augmentation.size, broken, workers)
    work = _Ahead(begin, start_step, stop_step)

    def make_batch(step: int) -> tuple[int, Batch]:
        arrays = work.finish(step)
        share = None
        if augmentation.mixup:
            share = Draws(seed, step, 0, MIXUP).beta(augmentation.mixup)

        def read(start: int, stop: int) -> Arrays:
            part = _with_partners(arrays, places[start], places[start] + stop - start, share)
            noise = [Draws(seed, step, lane, NOISE).bits() >> 32 for lane in range(start, stop)]
            return part | {"noise": np.array(noise, np.uint32)}

        return step, global_batch(read, (batch_size,), sharding)

    return Prefetcher(make_batch, range(start_step, stop_step), prefetch, crew.close)


def eval_batches(
    images: Images,
    augmentation: Augmentation,
    broken: Broken,
    *,
    batch_size: int,
    sharding: Sharding | None,
    workers: int,
    max_batches: int = 0,
) -> Iterator[Batch]:
    """Each image once, or some of them; the last batch is filled up with black ones of weight 0.

    Arguments are those of `train_batches`, and `max_batches` of `data.reading.examples.eval_ids`.
    """
    ids = eval_ids(len(images), batch_size, max_batches)
    ranges = host_ranges((batch_size,), sharding)
    own = np.concatenate([np.arange(*part) for part in ranges])

    def begin(step: int) -> Callable[[], Arrays]:
        places = step * batch_size + own
        rows = ids[places[places < len(ids)]].tolist()

        def make(k: int) -> tuple[augment.Image, int]:
            example = images.read(rows[k])
            return augmentation.evaluate(example), example.label

        return crew.begin(rows, make, len(own))

    crew = _Crew(images, augmentation.size, broken, workers)
    steps = steps_per_epoch(len(ids), batch_size)
    work = _Ahead(begin, 0, steps)
    try:
        for step in range(steps):
            yield global_batch(parts_of(ranges, work.finish(step)), (batch_size,), sharding)
    finally:
        crew.close()


def _lanes(ranges: list[tuple[int, int]], batch_size: int) -> list[int]:
    """Places in the global batch of this host's images, each run of them after the one before it,
    which is its first one's partner."""
    lanes: list[int] = []
    for start, stop in ranges:
        if not lanes or lanes[-1] != start - 1:
            lanes.append((start - 1) % batch_size)
        lanes += range(start, stop)
    return lanes


def _with_partners(arrays: Arrays, start: int, stop: int, share: float | None) -> Arrays:
    """Images [start, stop) of what was read, and with a share the ones before as their partners.

    A partner that is broken leaves an image unmixed.
    """
    own = {name: array[start:stop] for name, array in arrays.items()}
    if share is None:
        return own
    before = {name: array[start - 1 : stop - 1] for name, array in arrays.items()}
    shares = np.where(before["weights"] > 0, np.float32(share), np.float32(1))
    return own | {
        "partners": before["images"], "partner_labels": before["labels"], "shares": shares,
    }  # fmt: skip


class _Crew:
    """Threads that turn rows into the arrays of a batch."""

    def __init__(self, images: Images, size: int, broken: Broken, workers: int):
        self._images, self._size, self._broken = images, size, broken
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="images")

    def begin(
        self,
        rows: list[int],
        make: Callable[[int], tuple[augment.Image, int]],
        length: int = 0,
    ) -> Callable[[], Arrays]:
        """Starts on images 0, 1, ... of a batch, which are these rows of the source.

        Args:
          rows: for their names.
          make: from a place in `rows` to pixels and label.
          length: of the arrays, if more than there are rows.

        Returns:
          What waits for the arrays: images, labels, weights.
        """
        count = max(length, len(rows))
        arrays: Arrays = {
            "images": np.zeros((count, self._size, self._size, 3), np.uint8),
            "labels": np.zeros(count, np.int32),
            "weights": np.zeros(count, np.float32),
        }

        def fill(start: int) -> None:
            for k in range(start, min(start + ROWS_PER_TASK, len(rows))):
                try:
                    pixels, label = make(k)
                except augment.BrokenImage as error:
                    self._broken.add(self._images.name(rows[k]), str(error))
                    continue
                arrays["images"][k], arrays["labels"][k], arrays["weights"][k] = pixels, label, 1

        tasks: list[Future[None]] = [
            self._pool.submit(fill, start) for start in range(0, len(rows), ROWS_PER_TASK)
        ]

        def wait() -> Arrays:
            for task in tasks:
                task.result()
            return arrays

        return wait

    def close(self) -> None:
        """Ends the threads, after the images that they are at."""
        self._pool.shutdown(cancel_futures=True)


class _Ahead:
    """Begins what later steps need before it waits for that of a step."""

    def __init__(self, begin: Callable[[int], Callable[[], Arrays]], start: int, stop: int):
        self._begin, self._next, self._stop = begin, start, stop
        self._begun: dict[int, Callable[[], Arrays]] = {}

    def finish(self, step: int) -> Arrays:
        while self._next < min(step + 1 + STEPS_AHEAD, self._stop):
            self._begun[self._next] = self._begin(self._next)
            self._next += 1
        return self._begun.pop(step)()
