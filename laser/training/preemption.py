"""SIGTERM, SIGHUP and SIGINT as a request that is read between steps: save, then leave.

Cloud TPUs send SIGTERM before they take a machine away; a terminal that is closed sends SIGHUP,
unless nohup keeps it off; a person presses Ctrl-C. A second Ctrl-C stops at once, for whoever does
not want to wait. An evaluation is given up between batches, and done again when the run goes on.

The signal may reach one of several hosts alone. There jax's preemption service has SIGTERM: in the
background it asks all hosts how far they are, and has them stop after one and the same step. That
costs a step nothing and takes a second or two.
"""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from jax.experimental.multihost_utils import reached_preemption_sync_point

from laser.training import hosts

_watching: "Preemption | None" = None  # while `watch` is open


class Interrupted(Exception):
    """An evaluation was given up, because the process is to leave."""


class Preemption:
    """Whether a signal has come; `name` says which. A second Ctrl-C is for `at_once`.

    `alive` is called between two batches of an evaluation.
    """

    name = ""

    def __init__(self, at_once: Callable[[int, FrameType | None], Any], alive: Callable[[], None]):
        self.at_once, self.alive = at_once, alive
        self._stops = self._ctrl_c = False
        self._calls = itertools.count(1)

    def stops(self) -> bool:
        """Whether to save and leave now; all hosts ask equally often, and get the same answer."""
        if not hosts.several():
            return bool(self.name)
        if not self._stops:
            self._stops = reached_preemption_sync_point(next(self._calls))
        if self._stops:
            self.name = self.name or "SIGTERM on one of the hosts"
        return self._stops

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._ctrl_c:
            self.at_once(number, frame)
        self._ctrl_c = self._ctrl_c or number == signal.SIGINT
        self.name = signal.Signals(number).name
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)  # for jax's service


def between_batches() -> None:
    """For evaluations, between two batches. Raises Interrupted if the run is to save and leave."""
    if _watching is None:
        return
    _watching.alive()
    if _watching.stops():
        raise Interrupted(_watching.name)


@contextlib.contextmanager
def watch(alive: Callable[[], None] = lambda: None) -> Iterator[Preemption]:
    """Catches the signals while the context is open; main thread only."""
    global _watching
    ctrl_c = signal.getsignal(signal.SIGINT)
    at_once = ctrl_c if callable(ctrl_c) else signal.default_int_handler
    preemption = Preemption(at_once, alive)
    numbers = [signal.SIGINT] if hosts.several() else [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, preemption._receive) for number in numbers}
    _watching = preemption
    try:
        yield preemption
    finally:
        _watching = None
        for number, handler in before.items():
            signal.signal(number, handler)
