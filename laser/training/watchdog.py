"""Ends a process that hangs, and says where: waiting costs as much as working.

Where a chip, a host or a bucket no longer answers, the hosts of a run wait for each other without
an end. The watchdog writes which host it is and the stacks of all its threads, and ends the process
with 1, so that whoever started it starts it again.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

from laser.training import exits

log = logging.getLogger(__name__)

STDOUT = 1  # where the log goes, and what comes after its line here
POLLS = 10  # in the time that is allowed
GRACE_SECONDS = 60.0  # after which the process is ended even if Python cannot run
OFF_THE_STEPS_SECONDS = 7200.0  # at least, for what is no step: chips hang there, too


class Watchdog:
    """Ends the process when `step_ended` was not called for so long. Use as a context manager.

    Args:
      seconds: allowed between two steps; four times as many, and two hours at least, for what is
        no step; 0 = any.
      host: how people know this one.
    """

    def __init__(self, seconds: float, host: str):
        self._seconds, self._host = seconds, host
        self._last = time.monotonic()
        self._off_the_steps = 0
        self._step = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._seconds:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def step_ended(self, step: int) -> None:
        """So many steps are done."""
        self._step = step
        self.alive()

    def alive(self) -> None:
        """What takes its time goes on."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def off_the_steps(self) -> Iterator[None]:
        """For what takes its time: to restore, to compile, to evaluate, to save."""
        self._last = time.monotonic()
        self._off_the_steps += 1
        faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._off_the_steps -= 1

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds / POLLS):
            off_the_steps = self._off_the_steps > 0
            allowed = self._seconds
            if off_the_steps:
                allowed = max(4 * self._seconds, OFF_THE_STEPS_SECONDS)
            # Ends the process from outside of Python, unless this thread comes around again.
            faulthandler.dump_traceback_later(allowed + GRACE_SECONDS, exit=True, file=STDOUT)
            if time.monotonic() - self._last < allowed:
                continue
            what = "what is no step has not ended" if off_the_steps else "no step has ended"
            log.error(
                "%s: %s for %g s, since step %d (training.step_timeout_seconds); where all threads "
                "are follows, and the process ends with %d",
                self._host, what, allowed, self._step, exits.FAILED,
            )  # fmt: skip
            sys.stdout.flush()
            faulthandler.dump_traceback(all_threads=True, file=STDOUT)
            os._exit(exits.FAILED)  # nothing else would end threads that hang
