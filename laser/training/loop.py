"""The training loop, from a config to a finished run; starting it again goes on where it was.

The order within a step matters and is this: dispatch step n, then look at the metrics of step n - 1
(so the device never waits for the host), evaluate, save, and only then react to a signal. Before
anything is written to disk, the metrics of every step so far have been looked at. While steps are
skipped nothing is saved, so that good checkpoints stay. An evaluation that a signal has ended is
owed: the checkpoint says so, and the run that goes on from there begins with it.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.sealed import SEAL
from laser.training import hardware, hosts, preemption, roofline, sharding
from laser.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    restore_parameters,
    saved_steps,
    tensor_types,
)
from laser.training.config import RunConfig, check_devices
from laser.training.goodput import Goodput
from laser.training.metrics import (
    METRICS_FILE,
    SKIPPED_FILE,
    SPIKES_FILE,
    MetricsWriter,
    make_writer,
    mark_of,
)
from laser.training.profile import Profile
from laser.training.program import Program
from laser.training.report import Report
from laser.training.rows import Rows, resolved
from laser.training.run_folder import (
    check_hosts_agree,
    load_run_config,
    open_run_folder,
)
from laser.training.spikes import Spikes
from laser.training.step import TrainState
from laser.training.watchdog import Watchdog
from models.families import AnyModelConfig, init_parameters, train_flops_per_token

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED = 0, 1, 75


class TooManySkippedSteps(RuntimeError):
    """The loss or the gradient was not finite for too many steps in a row."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of a state, wanted every so many steps and after the last one.

    On several hosts all of them call `metrics`, and process 0 writes what it returns.
    """

    every: int
    metrics: Callable[[TrainState], dict[str, float]]


def open_run(config: RunConfig, rows: Rows, workdir: str, allow_config_change: bool) -> "Run":
    """Checks that config, devices and workdir fit together, and makes the run's folder.

    Raises:
      ValueError: they do not, on this host or another one; nothing was changed.
    """
    with hosts.together("find the run to start from"):
        init_step = _check_init(config, rows) if config.init_from else None
    with hosts.together("compare config and data"):
        check_hosts_agree(config, rows, init_step)
    with hosts.together("lay out the program"):
        complete = resolved(config, rows)
        program = Program(complete, sharding.make_mesh(complete))
    tensors = tensor_types(program.abstract_state)
    record = open_run_folder(workdir, config, rows, init_step, allow_config_change, tensors)
    return Run(program, workdir, rows, record)


def train(run: "Run", evaluations: Sequence[Evaluation] = (), began: float | None = None) -> int:
    """Trains until config.training.steps, from the newest checkpoint if there is one.

    Args:
      run: of `open_run`.
      evaluations: besides the loss on the validation split. Those of a step make one record.
      began: when the process did, in seconds since 1970; now if None.

    Returns:
      The exit code of the process: 0 done, 1 stopped by an error that the log explains, 75 saved
      after SIGTERM, SIGHUP or SIGINT.
    """
    steps = run.config.training.steps
    began = began or time.time()
    try:
        with Checkpoints(run.workdir, run.config.checkpoint) as checkpoints:
            state = checkpoints.restore_latest(run.program.abstract_state)
            if state is None:
                log.info("starting a new run in %s", run.workdir)
                state = run.init_state()
            elif int(state.step) >= steps and not checkpoints.restored.get("owed"):
                log.info("%s: nothing left to do after step %d", run.workdir, int(state.step))
                return EXIT_DONE
            else:
                log.info("resuming %s after step %d", run.workdir, int(state.step))
            run.goodput = Goodput(checkpoints.restored.get("time"), began)
            every = Evaluation(run.config.training.eval_every, run.evaluate)
            return _train_from(run, state, checkpoints, [every, *evaluations])
    except (OSError, CheckpointError, TooManySkippedSteps) as error:
        problem = str(error)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = f"out of memory: {(str(error).splitlines() or [''])[0][:300]}"
    log.error("%s", problem)
    hosts.end_the_others(problem)
    return EXIT_FAILED


class Run:
    """What does not change while a run goes on: its program, its data and its folder.

    Attributes:
      config: of the program, with numbers for what was left to the data.
      init_step: of the checkpoint of config.init_from that the run started from.
      spikes: what was seen of the loss so far.
      goodput: what its time went to so far.
      watchdog: ends the process if a step does not end.
    """

    def __init__(self, program: Program, workdir: str, rows: Rows, record: dict[str, Any]):
        self.config = program.config
        self.program = program
        self.workdir = Path(workdir)
        self.rows = rows
        self.init_step: int | None = record["init_step"]
        self.spikes = Spikes()
        self.goodput = Goodput(None, time.time())
        this = hosts.name(jax.process_index())
        self.watchdog = Watchdog(self.config.training.step_timeout_seconds, this)
        self._config_sha256 = record[SEAL]

    def init_state(self) -> TrainState:
        """The state before the first step, with the parameters of init_from if there is one."""
        state = self.program.init_state()
        if not self.config.init_from:
            return state
        log.info("with the parameters of %s, step %d", self.config.init_from, self.init_step)
        wanted = self.program.abstract_state.params
        params = restore_parameters(Path(self.config.init_from), wanted, self.init_step)
        return state._replace(params=params)

    def note(self, owed: bool) -> dict[str, Any]:
        """What a checkpoint says of the rest of the folder, and whether an evaluation is owed."""
        mark = mark_of(self.workdir / METRICS_FILE) if hosts.is_first() else None
        losses = list(self.spikes.recent)
        return {
            "config": self._config_sha256, "owed": owed, "metrics": mark, "losses": losses,
            "time": self.goodput.note(),
        }  # fmt: skip

    @contextlib.contextmanager
    def off_the_steps(self, kind: str) -> Iterator[None]:
        """For what is not a step: its time is of a kind of its own, and no watchdog looks on."""
        with self.goodput.during(kind), self.watchdog.not_watching():
            yield

    def train_batches(self, start_step: int):
        return self.rows.train_batches(self.config, start_step, self.program.batch_sharding)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss in nats per token, the objective's shares, and bits per byte of text, on the
        validation split.

        Of several parts, of each and their mean by the parts' shares. Bits per byte is there only
        where the whole of every split was read.
        """
        metrics: dict[str, float] = {}
        means: dict[str, float] = collections.defaultdict(float)
        bits = 0.0
        for part in self.rows.validation_parts(self.config, self.program.batch_sharding):
            total: dict[str, float] = collections.defaultdict(float)
            for batch in part.batches:
                preemption.between_batches()
                sums = self.program.eval_step(state.params, batch)
                for name, x in {"loss": sums.nll, **sums.shares, "": sums.tokens}.items():
                    total[name] += float(x)
            tokens, nll = total.pop(""), total["loss"]
            whole = part.bytes > 0 and tokens == part.tokens
            bits += part.share * nll / math.log(2) / part.bytes if whole else math.nan
            for name, x in total.items():
                means[name] += part.share * x / tokens
                if part.name:
                    metrics[f"eval/{name}/{part.name}"] = x / tokens
        metrics |= {f"eval/{name}": mean for name, mean in means.items()}
        if math.isfinite(bits):
            metrics["eval/bits_per_byte"] = bits
        return metrics


def _train_from(
    run: Run, state: TrainState, checkpoints: Checkpoints, evaluations: Sequence[Evaluation]
) -> int:
    """The steps that are left, with metrics and signals looked after."""
    config, step = run.config, int(state.step)
    run.spikes = Spikes(checkpoints.restored.get("losses", ()))
    writer = make_writer(
        run.workdir,
        config.training.steps,
        resume_step=step,
        mark=checkpoints.restored.get("metrics"),
        enabled=hosts.is_first(),
    )
    report = Report(
        writer,
        log_every=config.training.log_every,
        tokens_per_step=config.training.batch_size * config.data.seq_len,
        flops_per_token=train_flops_per_token(config.model, config.data.seq_len),
        peak_flops=hardware.peak_flops(),
        bound_seconds=_bound_seconds(run.program),
        on_skipped=functools.partial(_record_skipped, run),
        on_step=functools.partial(_record_spike, run),
        of_the_run=lambda step: run.rows.metrics(config, step) | run.goodput.metrics(),
    )
    try:
        with preemption.watch() as preempted, run.watchdog:
            due = _Evaluations(evaluations, run, writer, report)
            return _run_steps(run, state, checkpoints, due, report, preempted)
    finally:
        writer.close()


def _bound_seconds(program: Program) -> float:
    """The least time of a step on its devices, see `roofline`; 0 where it is not known."""
    chip = hardware.CHIPS.get(program.mesh.devices.flat[0].device_kind)
    if chip is None:
        return 0.0
    mesh = check_devices(program.config, program.mesh.size)
    return roofline.analytic_bound(program.config, mesh, chip).seconds


def _run_steps(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    evaluations: "_Evaluations",
    report: Report,
    preempted: preemption.Preemption,
) -> int:
    config, start = run.config, int(state.step)
    steps, first = config.training.steps, True
    if checkpoints.restored.get("owed"):
        scores, owed = evaluations.after(start, state)
        if owed:
            log.warning("%s: left in the evaluation of step %d", preempted.name, start)
            return EXIT_PREEMPTED
        checkpoints.add_score(start, scores)
    profile = Profile(run.workdir, config.training.profile_steps)
    run.goodput.steps_begin()
    with run.train_batches(start) as batches, profile:
        for step, batch in batches:
            done = step + 1
            compiles = run.off_the_steps("compile") if first else contextlib.nullcontext()
            with compiles, profile.step(done):
                state, metrics = run.program.train_step(state, batch)
            profile.step_dispatched(done, metrics)
            run.goodput.waited(batches.seconds_waited)
            report.push(done, metrics, batches.seconds_waited)
            run.watchdog.step_ended(step)
            first = False
            scores, owed = evaluations.after(done, state)
            leave = preempted.stops()
            in_turn = _due(done, config.checkpoint.every, steps)
            if in_turn or leave:
                report.flush()
            if (in_turn or leave) and (not report.skipping or done == steps):
                save = functools.partial(
                    checkpoints.save, done, state, scores, interim=not in_turn, note=run.note(owed)
                )
                with run.off_the_steps("checkpoints"):
                    report.off_the_clock(save)
            if leave and (owed or done < steps):
                with run.watchdog.not_watching():
                    checkpoints.wait()
                what = "steps were skipped, so not saved," if report.skipping else "saved"
                log.warning("%s: %s step %d; start again to go on", preempted.name, what, done)
                return EXIT_PREEMPTED
    with run.off_the_steps("checkpoints"):
        checkpoints.wait()
    times = run.goodput.metrics()
    log.info(
        "goodput %.1f %%; seconds: %s", 100 * times.pop("goodput"),
        ", ".join(f"{name.removeprefix('time/')} {seconds:.0f}" for name, seconds in times.items()),
    )  # fmt: skip
    if best := checkpoints.best():
        log.info("best checkpoint: step %d, %s %.4f", best[0], config.checkpoint.best, best[1])
    return EXIT_DONE


class _Evaluations:
    """Those of a run, which write their metrics."""

    def __init__(
        self, all_of_them: Sequence[Evaluation], run: Run, writer: MetricsWriter, report: Report
    ):
        self._all, self._run = all_of_them, run
        self._writer, self._report = writer, report

    def after(self, done: int, state: TrainState) -> tuple[dict[str, float], bool]:
        """The metrics that are due after a step, and whether a signal came first: all are owed."""
        steps = self._run.config.training.steps
        due = [evaluation for evaluation in self._all if _due(done, evaluation.every, steps)]
        if not due:
            return {}, False
        self._report.flush()
        try:
            with self._run.off_the_steps("evaluation"):
                scores = self._report.off_the_clock(functools.partial(_metrics, due, state))
        except preemption.Interrupted:
            return {}, True
        self._writer.write(done, scores)
        return scores, False


def _metrics(due: Sequence[Evaluation], state: TrainState) -> dict[str, float]:
    return {name: x for evaluation in due for name, x in evaluation.metrics(state).items()}


def _due(done: int, every: int, steps: int) -> bool:
    return done % every == 0 or done == steps


def _record_skipped(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Reports a step without an update, and ends the run when there are too many in a row."""
    config = run.config
    ids = run.rows.row_ids(config, step - 1)
    names = ("loss", "gradient_norm", "attention_range")
    values = ", ".join(f"{name} {metrics[name]:.4g}" for name in names)
    log.error("step %d skipped (%s); rows %s", step, values, np.array2string(ids, threshold=16))
    record: dict[str, Any] = {"step": step, "row_ids": ids.tolist()}
    _append(run, SKIPPED_FILE, record | {name: repr(metrics[name]) for name in names})
    in_a_row, limit = int(metrics["skipped_in_a_row"]), config.training.max_skipped_steps
    if in_a_row >= limit:
        factor = config.training.skip_gradient_norm
        too_large = f", or one beyond training.skip_gradient_norm={factor:g}" if factor else ""
        raise TooManySkippedSteps(
            f"{in_a_row} steps in a row had a non-finite loss or gradient{too_large} (step {step}, "
            f"training.max_skipped_steps={limit}): lower optimizer.learning_rate, or look at the "
            f"rows in {run.workdir / 'skipped.jsonl'}"
        )


def _record_spike(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Records a step whose loss is far above the last ones."""
    loss = metrics["loss"]
    height = run.spikes.height(loss)
    if height is None:
        return
    log.warning("step %d: loss %.4g, %.1f standard deviations above the last", step, loss, height)
    ids = run.rows.row_ids(run.config, step - 1)
    record = {"step": step, "loss": loss, "deviations": height, "row_ids": ids.tolist()}
    _append(run, SPIKES_FILE, record)


def _append(run: Run, name: str, record: dict[str, Any]) -> None:
    if hosts.is_first():
        with (run.workdir / name).open("a") as file:
            file.write(json.dumps(record) + "\n")


def _check_init(config: RunConfig, rows: Rows) -> int:
    """The newest step of init_from. Raises ValueError if its parameters do not fit this run."""
    start = Path(config.init_from)
    where = f"init_from={config.init_from}"
    try:
        theirs = load_run_config(config.init_from).model
        step = saved_steps(start)[-1]
    except (ValueError, CheckpointError) as error:
        raise ValueError(f"{where}: {error}") from error
    tokenizer = rows.tokenizer_path
    if tokenizer and (start / "tokenizer.model").read_bytes() != Path(tokenizer).read_bytes():
        raise ValueError(
            f"{where}: its tokenizer is not that of {tokenizer}, so the same ids mean "
            "other text; prepare the data with --tokenizer=" + str(start / "tokenizer.model")
        )
    there, here = (_parameter_shapes(model) for model in (theirs, config.model))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{where}: its model has other parameters: {name} is {there.get(name, 'absent')} "
                f"there and {here.get(name, 'absent')} here; leave the sections model and "
                "attention as that run has them"
            )
    return step


def _parameter_shapes(model: AnyModelConfig) -> dict[str, tuple[int, ...]]:
    abstract = jax.eval_shape(functools.partial(init_parameters, model, 0))
    leaves = jax.tree_util.tree_flatten_with_path(abstract)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
