"""SIGTERM and SIGINT as a request that the loop reads between steps: save, then leave.

Cloud TPUs send SIGTERM before they take a machine away; a person presses Ctrl-C. A second Ctrl-C
stops at once, for whoever does not want to wait.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Preemption:
    """Truthy once a signal has come; `name` says which."""

    name = ""

    def __bool__(self) -> bool:
        return bool(self.name)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def watch() -> Iterator[Preemption]:
    """Catches SIGTERM and SIGINT while the context is open; main thread only."""
    preemption = Preemption()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, preemption._receive) for number in numbers}
    try:
        yield preemption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
