"""Metrics in TensorBoard's files. Programs that write none do without importing tensorboardX."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from laser.training.records import Records


class TensorBoardWriter:
    """`workdir/tensorboard`. What earlier processes wrote from `first_step` on is hidden there.

    TensorBoard reads files in the order of their names, which begin with the time. Here they are
    numbered, so that the order is right also when the clock was set back.

    Writes in the caller's thread: tensorboardX's own SummaryWriter hands events to a thread, and
    waits for it for ever once that thread has met a full disk.
    """

    def __init__(self, records: Records, first_step: int):
        folder = records.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        number = _next_number(records.workdir / "tensorboard")
        self._events = EventsWriter(str(folder / f"events-{number:06}"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._events.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()


def _next_number(folder: Path) -> int:
    found = folder.iterdir() if folder.exists() else ()
    numbers = [path.name.partition(".")[0].rpartition("-")[2] for path in found]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)
