"""Turns the metrics of finished steps into records, one step behind the device.

Fetching a step's metrics waits for that step. Doing so for the step before the one just dispatched
keeps the device busy and keeps the host at most one step ahead.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from laser.training import hardware, hosts
from laser.training.metrics import MetricsWriter

log = logging.getLogger(__name__)

LONG_WAIT = 0.1  # of a step, for data: then the log says which host waits


class Report:
    """Collects, derives speed, and writes every `log_every` steps, the first and the last one.

    The first step of a process has no speed: most of its time goes into compiling.

    Args:
      writer: takes the records.
      steps: of the whole run.
      log_every: steps.
      tokens_per_step: of the whole batch, all hosts.
      flops_per_token: model FLOPs, recomputation not counted.
      peak_flops: of all devices; 0 if unknown, then there is no "mfu".
      bound_seconds: that a step takes at least; 0 if unknown, then there is no "of_bound".
      on_skipped: called with the step and its metrics when a step had no update.
      on_step: called with every step and its metrics.
      of_the_run: what else to write, after so many steps.

    Attributes:
      skipping: whether the last step that was looked at had no update.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        *,
        steps: int,
        log_every: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float,
        bound_seconds: float,
        on_skipped: Callable[[int, dict[str, float]], None],
        on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
        of_the_run: Callable[[int], dict[str, float]] = lambda step: {},
    ):
        self._writer = writer
        self._steps = steps
        self._log_every = log_every
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._bound_seconds = bound_seconds
        self._on_skipped = on_skipped
        self._on_step = on_step
        self._of_the_run = of_the_run
        self.skipping = False
        self._pending: tuple[int, dict[str, jax.Array], float] | None = None
        self._window_start: float | None = None  # when the first step has ended
        self._window_steps = 0
        self._seconds_waited = 0.0

    def push(self, step: int, metrics: dict[str, jax.Array], seconds_waited: float) -> None:
        """Takes the metrics of a step that was just dispatched, and reads those of the one before.

        Args:
          step: steps done with it.
          metrics: scalars on device.
          seconds_waited: for data, since the start.
        """
        self.flush()
        self._pending = (step, metrics, seconds_waited)

    def flush(self) -> None:
        """Waits for the last step that was pushed and reads its metrics."""
        if self._pending is None:
            return
        step, on_device, waited = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        self._window_steps += self._window_start is not None
        self.skipping = metrics["skipped_in_a_row"] > 0
        self._on_step(step, metrics)
        if self.skipping:
            self._on_skipped(step, metrics)
        if step % self._log_every == 0 or step in (1, self._steps):
            derived = {"perplexity": float(np.exp(np.minimum(metrics["loss"], 700.0)))}
            derived |= self._speed(waited)
            self._writer.write(step, metrics | derived | self._of_the_run(step))
        if self._window_start is None:
            self._window_start, self._seconds_waited = time.perf_counter(), waited

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """For what is not training: its time does not count as that of steps."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._window_start is not None:
                self._window_start += time.perf_counter() - start

    def _speed(self, waited: float) -> dict[str, float]:
        """Of the steps since the last record, if there are any; and the most memory so far."""
        if self._window_start is None:
            return {"memory_gib": hardware.memory_gib()}
        now = time.perf_counter()
        seconds_per_step = (now - self._window_start) / self._window_steps
        tokens_per_second = self._tokens_per_step / seconds_per_step
        speed = {
            "seconds_per_step": seconds_per_step,
            "tokens_per_second": tokens_per_second,
        } | self._of_the_worst_host(waited, seconds_per_step)
        if self._peak_flops:
            speed["mfu"] = tokens_per_second * self._flops_per_token / self._peak_flops
        if self._bound_seconds:
            speed["of_bound"] = self._bound_seconds / seconds_per_step
        self._window_start, self._window_steps, self._seconds_waited = now, 0, waited
        return speed

    def _of_the_worst_host(self, waited: float, seconds_per_step: float) -> dict[str, float]:
        """Seconds that a step waited for data, and memory: all hosts wait for the one that waits
        longest. Of the others it is what they said a few seconds ago."""
        own = {
            "data_wait_seconds": (waited - self._seconds_waited) / self._window_steps,
            "memory_gib": hardware.memory_gib(),
        }
        hosts.tell(json.dumps(own))
        said = [json.loads(news) if news else {} for news in hosts.told()]
        waits = [news.get("data_wait_seconds", 0.0) for news in said]
        if waits and max(waits) > LONG_WAIT * seconds_per_step:
            longest = max(waits)
            log.warning(
                "%s waits %.2g s a step for data, of %.2g s",
                hosts.name(waits.index(longest)), longest, seconds_per_step,
            )  # fmt: skip
        return {name: max([x, *(news.get(name, x) for news in said)]) for name, x in own.items()}
