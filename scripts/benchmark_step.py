"""Times a config's training step on the devices at hand, without data, checkpoints or a folder.

    python scripts/benchmark_step.py --config=configs/c4.py:size=2p2b,slice=v5e-256 --steps=20
    python scripts/benchmark_step.py --config=... --config.training.batch_size=8 --profile=trace

It is the program that train.py runs and plan.py compiles, with the same mesh, on one made-up batch:
tokens, masked tokens, images or recordings, whichever the model learns from. So what train.py's
own line says beyond it is time in which devices wait for data or for the host. On several hosts
start it on each, as train.py. Steps are timed as there, from the metrics of one to those of the
next, after two that are not counted; MFU and the bound are also train.py's. Data of tasks
(configs/finetune.py) are refused: their rows decide the program.
--profile traces three steps more, which `xprof FOLDER` shows.
Exit codes: 0 done, 2 mistake in the command line or the config, 4 out of memory, 1 anything else.
"""

import contextlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from absl import flags

from data.errors import first_line
from laser.training import exits, hosts
from laser.training.config import RunConfig, to_dict
from laser.training.console import end_on_ctrl_c, interruptible, start_logging
from laser.training.flags import exit_with, parse_or_exit
from laser.training.hardware import tune_cpu
from scripts import check_gradients

if TYPE_CHECKING:  # jax only after the config was found to be right
    import jax

    from laser.training.program import Program

log = logging.getLogger(__name__)

NOT_COUNTED = 2  # steps: the first waits for programs that are loaded, and fills caches
PROFILED = 3  # steps
Step = Callable[[Any, Any], tuple[Any, dict[str, Any]]]


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("steps", 20, "that are timed", flag_values=values, lower_bound=1)
    flags.DEFINE_string(
        "profile", "", f"folder for a trace of {PROFILED} more steps", flag_values=values
    )


def main(argv: list[str]) -> int:
    config, values = parse_or_exit(argv, define_flags, __doc__)
    if config.data.tasks:
        exit_with(
            argv[0],
            f"data.tasks={config.data.tasks}: rows of tasks are as long as their longest example, "
            "which is not known without them; give the config of the run that init_from names",
        )
    start_logging()
    tune_cpu(config.model.dtype)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hosts.joined())
            check_hosts_agree(config, values.steps, values.profile)
            with hosts.together("lay out the program"):
                program, lowered = lower(config)
        except ValueError as error:
            exit_with(argv[0], str(error))
        if problem := benchmark(program, lowered, values.steps, values.profile):
            log.error("%s", problem)
            hosts.end_the_others(problem, exits.TOO_LARGE)
            hosts.leave(exits.TOO_LARGE)
    return exits.DONE


def check_hosts_agree(config: RunConfig, steps: int, profile: str) -> None:
    """Raises ValueError, on all hosts, if they were not given one command: they would wait for ever
    for each other."""
    given = hosts.exchange("compare the commands", json.dumps([to_dict(config), steps, profile]))
    if other := [hosts.name(i) for i, theirs in enumerate(given) if theirs != given[0]]:
        raise ValueError(f"{', '.join(other)} has another config or other flags than host 0")


def lower(config: RunConfig) -> "tuple[Program, jax.stages.Lowered]":
    """The program of train.py on all devices, and its step for XLA. Raises ValueError if they do
    not fit together."""
    import jax

    from laser.planning.compile import trace_step

    program, traced = trace_step(config, jax.devices())
    return program, traced.lower()


def benchmark(
    program: "Program", lowered: "jax.stages.Lowered", steps: int, profile: str
) -> str | None:
    """Prints what compiling and steps take. Returns what went wrong, if memory did not suffice."""
    import jax

    devices = program.mesh.devices
    shape = [f"{name} {size}" for name, size in program.mesh.shape.items() if size > 1]
    log.info(
        "on %d x %s%s, jax %s", devices.size, devices.flat[0].device_kind,
        f" as {' x '.join(shape)}" if shape else "", jax.__version__,
    )  # fmt: skip
    try:
        start = time.perf_counter()
        step = lowered.compile()
        log.info("compiled in %.1f s", time.perf_counter() - start)
        state, batch = program.init_state(), made_up(program)
        state, losses, ends = run(step, state, batch, NOT_COUNTED + steps)
        for line in report(program, losses, np.diff(ends)[NOT_COUNTED - 1 :].tolist()):
            log.info("%s", line)
        if profile:
            with jax.profiler.trace(profile):
                run(step, state, batch, PROFILED)
            log.info("trace of %d steps: xprof %s", PROFILED, profile)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return f"out of memory: {first_line(error, 300)}"
    return None


def made_up(program: "Program") -> "dict[str, jax.Array]":
    """A batch of noise where the program wants it; all hosts make the same one. Where rows are
    packed, each is one document."""
    from laser.training import sharding

    rows = check_gradients.batch(program.config)
    wanted = program.abstract_batch()
    if "segment_ids" in wanted:
        rows.setdefault("segment_ids", np.ones_like(rows["inputs"]))
    return {name: sharding.placed(rows[name], wanted[name].sharding) for name in wanted}


def run(step: Step, state: Any, batch: Any, count: int) -> tuple[Any, list[float], list[float]]:
    """Runs so many steps, each dispatched before the metrics of the last are read, as in train.py.

    Returns:
      The state after them; of each step the loss, and when its metrics were there, in seconds.
    """
    import jax

    losses: list[float] = []
    ends: list[float] = []
    dispatched: list[dict[str, Any]] = []

    def read() -> None:
        losses.append(float(jax.device_get(dispatched.pop(0))["loss"]))
        ends.append(time.perf_counter())

    for _ in range(count):
        state, metrics = step(state, batch)
        dispatched.append(metrics)
        if len(dispatched) > 1:
            read()
    read()
    return state, losses, ends


def report(program: "Program", losses: Sequence[float], seconds: Sequence[float]) -> list[str]:
    """The lines to print; all hosts call it."""
    import jax

    from laser.training import hardware, roofline

    config, median = program.config, statistics.median(seconds)
    tokens = config.training.batch_size * config.data.seq_len
    lines = [
        f"loss           {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last",
        f"ms a step      {1e3 * median:,.1f}, median of {len(seconds)}; "
        f"{1e3 * min(seconds):,.1f} to {1e3 * max(seconds):,.1f}",
        f"tokens/s       {tokens / median:,.0f}",
    ]
    if peak := hardware.peak_flops():
        lines.append(f"MFU            {roofline.model_flops(config) / peak / median:.1%}")
    if bound := roofline.bound_seconds(config, program.mesh.devices):
        lines.append(f"of the bound   {bound / median:.0%}, which is {1e3 * bound:,.1f} ms")
    gib = max(map(float, hosts.exchange("compare memory", str(hardware.memory_gib()))))
    whose = "the process" if jax.default_backend() == "cpu" else "the fullest device"
    return [*lines, f"peak memory    {gib:.2f} GiB of {whose}"]


if __name__ == "__main__":
    end_on_ctrl_c("stopped")
    sys.exit(interruptible(main, sys.argv))
