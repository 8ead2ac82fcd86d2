"""A trace of chosen steps, for XProf: what each host and each of its devices did when.

It lies in the run's tensorboard/, under plugins/profile, one .xplane.pb for each host:
`xprof RUN/tensorboard`, or TensorBoard with its profile plugin, opens it.
"""

import logging
from typing import Any

import jax

from laser.training.config import profiled_steps
from laser.training.records import Records

log = logging.getLogger(__name__)


class Profile:
    """Traces the steps of training.profile_steps. Use as a context manager.

    Args:
      records: of the run.
      steps: "FIRST,LAST", both included and counted from 1; "" = none.
    """

    def __init__(self, records: Records, steps: str):
        self._records, self._where = records, records.workdir
        self._folder = records.folder / "tensorboard"
        self._first, self._last = profiled_steps(steps)
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self._stop()

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """To be entered around a step; begins the trace before the first one of those wanted."""
        if self._first <= number <= self._last and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def step_dispatched(self, number: int, results: Any) -> None:
        """Ends the trace after the last one, once the device is done with it."""
        if self._running and number >= self._last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        self._records.write()
        log.info("trace of the steps from %d on: xprof %s/tensorboard", self._first, self._where)
