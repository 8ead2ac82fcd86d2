"""Runs a function over the parts of a source on all cores, with progress and time left.

Every part is a task of its own, so nothing has to be put back into order. Workers are new processes
(TensorFlow and threads don't survive a fork) and end with the process that started them, however
it ends: a worker that lived on would write beside the run that resumes.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from tqdm import tqdm

from data.parts import Part
from data.shards import Progress

POLL_SECONDS = 0.5

log = logging.getLogger(__name__)


class Job(Protocol):
    """What is done with a part; can be pickled."""

    def __call__(self, part: Part, threads: int, progress: Progress) -> Any: ...


class Stopped(Exception):
    """The run ended early, because of another part."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parts(
    job: Job, parts: Sequence[Part], workers: int, label: str, total: int
) -> Iterator[tuple[Part, Any]]:
    """Calls job(part, ...) for every part, in up to `workers` processes.

    Args:
      job: gives the same result wherever and whenever it runs.
      parts: to be done.
      workers: at least 1. With one, or one part alone, all happens in this process.
      label: of the progress bar.
      total: size of all parts, those included that were done before.

    Yields:
      (part, result), in the order in which they are ready.

    Raises:
      ValueError: as the job does; the other workers stop at their next batch.
      RuntimeError: a worker died.
    """
    processes = min(workers, len(parts))
    threads = max(1, workers // max(1, processes))
    done_before = total - sum(part.size for part in parts)
    with _Bar(label, total, done_before) as bar:
        if processes <= 1:
            for part in parts:
                yield part, job(part, threads, bar.add)
        else:
            yield from _in_processes(job, parts, processes, threads, bar)


class _Bar:
    """A line of progress: share of the source, text, MB/s of text since the start, time left."""

    def __init__(self, label: str, total: int, done_before: int):
        self._bar = tqdm(
            desc=label,
            total=total,
            initial=done_before,
            mininterval=1.0,
            bar_format="{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left{postfix}",
        )
        self._text = 0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def add(self, text: int, read: int) -> None:
        self._text += text
        elapsed = max(self._bar.format_dict["elapsed"], 1e-3)
        speed = self._text / elapsed / 1e6
        self._bar.set_postfix_str(f"{self._text / 1e6:,.0f} MB, {speed:.1f} MB/s", refresh=False)
        self._bar.update(read)


class _Shared:
    """What the processes share: counters, and whether to stop."""

    def __init__(self, context: Any):
        self.text, self.read = context.Value("q", 0), context.Value("q", 0)
        self.stop = context.Event()

    def add(self, text: int, read: int) -> None:
        if self.stop.is_set():
            raise Stopped
        for counter, value in ((self.text, text), (self.read, read)):
            with counter.get_lock():
                counter.value += value


def _in_processes(
    job: Job, parts: Sequence[Part], processes: int, threads: int, bar: _Bar
) -> Iterator[tuple[Part, Any]]:
    context = multiprocessing.get_context("spawn")
    shared = _Shared(context)
    with ProcessPoolExecutor(processes, context, _start_worker, (job, threads, shared)) as pool:
        # All workers start now and inherit this; set in them alone it would come too late for a
        # Ctrl-C while they import. The first process hears of it, and stops them.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            futures: dict[Future, Part] = {pool.submit(_work, part): part for part in parts}
        finally:
            signal.signal(signal.SIGINT, before)
        text = read = 0
        try:
            while futures:
                ready, _ = wait(futures, POLL_SECONDS, FIRST_COMPLETED)
                bar.add(shared.text.value - text, shared.read.value - read)
                text, read = shared.text.value, shared.read.value
                for future in ready:
                    yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died, perhaps for want of memory: use fewer workers"
            ) from error
        finally:
            shared.stop.set()
            pool.shutdown(cancel_futures=True)


_worker: tuple[Job, int, Callable[[int, int], None]]


def _start_worker(job: Job, threads: int, shared: _Shared) -> None:
    global _worker
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker = (job, threads, shared.add)


def _work(part: Part) -> Any:
    job, threads, progress = _worker
    return job(part, threads, progress)
