"""Runs a function over the parts of a source on all cores, with progress and time left.

Every part is a task of its own, so nothing has to be put back into order. Workers are new processes
(TensorFlow and threads don't survive a fork) and end with the process that started them, however
it ends: a worker that lived on would write beside the run that resumes.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from data.preparation.shards import Progress
from data.sources.parts import Part

STOP_SECONDS = 5.0  # in which a worker ends by itself


class Job(Protocol):
    """What is done with a part; can be pickled."""

    def __call__(self, part: Part, threads: int, progress: Progress) -> Any: ...


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
      ValueError: as the job does; the other workers are ended.
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


class _Worker:
    """A process, and the pipe on which it is sent parts and answers with a _Message.

    What is started must be small: a process that dies early would leave its starter waiting for it
    to read. So the job, with all parts of the source in it, comes by the pipe, whose other end
    closes with the process.
    """

    def __init__(self, context: Any):
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, content: Any) -> None:
        try:
            self.pipe.send(content)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> "_Message":
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error

    def end(self, deadline: float) -> None:
        """Its pipe is closed, which ends it at its next message, after it has tidied up."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        self._process.kill()

    def _died(self) -> RuntimeError:
        self._process.join(STOP_SECONDS)  # its pipe may close before it has ended
        return RuntimeError(
            f"a worker process died (exit code {self._process.exitcode}), perhaps for want of "
            "memory: use fewer workers"
        )


class _Message(NamedTuple):
    """What a worker has done since its last message, and how a part ended if it has."""

    text: int = 0
    read: int = 0
    is_done: bool = False
    result: Any = None
    error: Exception | None = None


def _in_processes(
    job: Job, parts: Sequence[Part], processes: int, threads: int, bar: _Bar
) -> Iterator[tuple[Part, Any]]:
    workers: dict[Any, _Worker] = {}
    try:
        with _interrupts_held():
            for _ in range(processes):
                worker = _Worker(multiprocessing.get_context("spawn"))
                workers[worker.pipe] = worker
        for worker in workers.values():
            worker.send((job, threads))
        todo = iter(parts)
        at_work = {worker.pipe: _next_part(worker, todo) for worker in workers.values()}
        while any(at_work.values()):
            for pipe in multiprocessing.connection.wait([p for p, part in at_work.items() if part]):
                message = workers[pipe].receive()
                bar.add(message.text, message.read)
                if message.error is not None:
                    raise message.error
                if message.is_done:
                    part, at_work[pipe] = at_work[pipe], _next_part(workers[pipe], todo)
                    assert part is not None
                    yield part, message.result
    finally:
        for pipe in workers:
            pipe.close()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in workers.values():
            worker.end(deadline)


def _next_part(worker: _Worker, todo: Iterator[Part]) -> Part | None:
    part = next(todo, None)
    if part is not None:
        worker.send(part)
    return part


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that are started here never hear of Ctrl-C: the first one does, and stops them. To
    it a Ctrl-C comes when all are there, so that none is left half started."""
    held: list[int] = []
    multiprocessing.resource_tracker.ensure_running()  # it would unblock the signal
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # they inherit this
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def _work(pipe: Any) -> None:
    """The process: does the parts that it is sent until it is ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone, or has hung up
        job, threads = pipe.recv()
        while True:
            part = pipe.recv()
            try:
                result = job(part, threads, lambda text, read: pipe.send(_Message(text, read)))
                message = _Message(is_done=True, result=result)
            except Exception as error:
                error.add_note(f"in a worker:\n{traceback.format_exc()}")
                message = _Message(error=error)
            pipe.send(message)
