"""SIGTERM and SIGINT as a request that the loop reads between steps: save, then leave.

Cloud TPUs send SIGTERM before they take a machine away; a person presses Ctrl-C. A second Ctrl-C
stops at once, for whoever does not want to wait.

The signal may reach one of several hosts alone. There jax's preemption service has SIGTERM: in the
background it asks all hosts how far they are, and has them stop after one and the same step. That
costs a step nothing and takes a second or two.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from jax.experimental.multihost_utils import reached_preemption_sync_point

from laser.training import hosts


class Preemption:
    """Whether a signal has come; `name` says which. A second Ctrl-C is for `at_once`."""

    name = ""

    def __init__(self, at_once: Callable[[int, FrameType | None], Any]):
        self.at_once = at_once

    def stops_after(self, step: int) -> bool:
        """Whether to save and leave after this step; to be asked once after each, on all hosts."""
        if not hosts.several():
            return bool(self.name)
        stops = reached_preemption_sync_point(step)
        if stops:
            self.name = self.name or "SIGTERM on one of the hosts"
        return stops

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            self.at_once(number, frame)
        self.name = signal.Signals(number).name
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)  # for jax's service


@contextlib.contextmanager
def watch() -> Iterator[Preemption]:
    """Catches SIGTERM and SIGINT while the context is open; main thread only."""
    ctrl_c = signal.getsignal(signal.SIGINT)
    preemption = Preemption(ctrl_c if callable(ctrl_c) else signal.default_int_handler)
    numbers = [signal.SIGINT] if hosts.several() else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, preemption._receive) for number in numbers}
    try:
        yield preemption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
