"""What the time of a run goes to, by kind, over its whole life, restarts included.

    start        from the start of a process to its first step: data, folder, checkpoint
    compile      the first step of a process, with what it compiles
    steps        the other steps, but not what they wait for:
    data         waiting for the next batch
    checkpoints  as long as a save holds up the steps; it goes on behind them
    evaluation   with what it compiles
    restarts     from the checkpoint that a process goes on from to its start: steps that were lost
                 and are done again, and the time in which nothing ran

`goodput` is the share of `steps` in all of it. A checkpoint carries the seconds up to itself, so
that nothing is counted twice; what passes before the first checkpoint and is lost is not counted.
Google's ml-goodput-measurement does the same through Cloud Logging; this needs no service.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

KINDS = ("start", "compile", "steps", "data", "checkpoints", "evaluation", "restarts")


class Goodput:
    """The seconds of a run by kind. All that is not said to be of another kind is `steps`.

    Args:
      before: the `note` in the checkpoint that the run goes on from, or None at a start.
      began: when this process did, in seconds since 1970.
      now: a clock for the same.
    """

    def __init__(self, before: Mapping[str, Any] | None, began: float, now=time.time):
        self._now = now
        self._seconds = dict.fromkeys(KINDS, 0.0)
        if before:
            self._seconds |= before["seconds"]
            self._seconds["restarts"] += max(0.0, began - before["at"])
        self._kind, self._since = "start", began
        self._waited = 0.0

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """What is done here is of another kind."""
        before = self._turn_to(kind)
        try:
            yield
        finally:
            self._turn_to(before)

    def steps_begin(self) -> None:
        """The start is over."""
        self._turn_to("steps")

    def waited(self, seconds: float) -> None:
        """How long steps have waited for data, in all of this process."""
        self._seconds["data"] += seconds - self._waited
        self._seconds["steps"] -= seconds - self._waited
        self._waited = seconds

    def note(self) -> dict[str, Any]:
        """JSON for a checkpoint that is saved now."""
        self._turn_to(self._kind)
        return {"at": self._since, "seconds": dict(self._seconds)}

    def metrics(self) -> dict[str, float]:
        """`goodput`, and seconds as `time/KIND`."""
        self._turn_to(self._kind)
        total = sum(self._seconds.values())
        times = {f"time/{kind}": seconds for kind, seconds in self._seconds.items()}
        return {"goodput": self._seconds["steps"] / total if total else 0.0} | times

    def _turn_to(self, kind: str) -> str:
        """The kind that it was before."""
        now = max(self._now(), self._since)  # a clock may be set back
        self._seconds[self._kind] += now - self._since
        before, self._kind, self._since = self._kind, kind, now
        return before
