"""The training loop, from a config to a finished run; starting it again goes on where it was.

The order within a step matters and is this: dispatch step n, then look at the metrics of step n - 1
(so the device never waits for the host), evaluate, save, and only then react to a signal. Before
anything is written to disk, the metrics of every step so far have been looked at. While steps are
skipped nothing is saved, so that good checkpoints stay. An evaluation that a signal has ended is
owed: the checkpoint says so, and the run that goes on from there begins with it.
"""

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from data.addresses import told_as_os_errors
from data.errors import first_line
from data.sealed import SEAL
from laser.training import (
    compiler,
    exits,
    hardware,
    hosts,
    preemption,
    roofline,
    sharding,
    versions,
    wandb_writer,
)
from laser.training.checkpoint import CheckpointError, Checkpoints, restore_parameters
from laser.training.config import RunConfig, to_dict
from laser.training.evaluation import Evaluation, on_validation
from laser.training.folders import absolute, folder_of
from laser.training.goodput import Goodput
from laser.training.incidents import TooManySkippedSteps, record_skipped, record_spike
from laser.training.init_from import check_init
from laser.training.metrics import (
    METRICS_FILE,
    SKIPPED_FILE,
    SPIKES_FILE,
    MetricsWriter,
    make_writer,
    mark_of,
    read_metrics,
)
from laser.training.outlook import outlook, warn_of_repeated_text
from laser.training.profile import Profile
from laser.training.program import Program
from laser.training.records import Records
from laser.training.report import Report
from laser.training.rows import Rows, progress, resolved
from laser.training.run_folder import (
    check_hosts_agree,
    open_run_folder,
    saved_step_folders,
)
from laser.training.spikes import Spikes
from laser.training.step import TrainState
from laser.training.tensors import tensor_types
from laser.training.wandb_writer import WandbWriter
from laser.training.watchdog import Watchdog
from models.families import train_flops_per_token

log = logging.getLogger(__name__)


def open_run(config: RunConfig, rows: Rows, workdir: str, allow_config_change: bool) -> "Run":
    """Checks that config, devices and workdir fit together, and makes the run's folder.

    Raises:
      ValueError: they do not, on this host or another one; nothing was changed.
    """
    with hosts.together("find the run to start from"):
        init_step = check_init(config, rows) if config.init_from else None
    with hosts.together("compare config and data"):
        check_hosts_agree(config, rows, init_step)
    with hosts.together("lay out the program"):
        wandb_writer.check_installed(config.training.wandb_project)
        complete = resolved(config, rows)
        program = Program(complete, sharding.make_mesh(complete))
    tensors = tensor_types(program.abstract_state)
    record = open_run_folder(workdir, config, rows, init_step, allow_config_change, tensors)
    shape = [f"{name} {size}" for name, size in program.mesh.shape.items() if size > 1]
    chips = program.mesh.devices.flat
    run = Run(program, workdir, rows, record)
    of_packages = [f"{name} {version}" for name, version in run.packages.items()]
    log.info(
        "on %d x %s%s, with %s", len(chips), chips[0].device_kind,
        f" as {' x '.join(shape)}" if shape else "", ", ".join(of_packages),
    )  # fmt: skip
    log.info("%s", outlook(complete, rows, program.abstract_state.params))
    if not config.training.epochs:
        warn_of_repeated_text(complete, rows)
    compiler.keep_programs(absolute(run.workdir), jax.default_backend())
    return run


def train(run: "Run", evaluations: Sequence[Evaluation] = (), began: float | None = None) -> int:
    """Trains until config.training.steps, from the newest checkpoint if there is one.

    Args:
      run: of `open_run`.
      evaluations: besides the loss on the validation split. Those of a step make one record.
      began: when the process did, in seconds since 1970; now if None.

    Returns:
      The exit code of the process: 0 done, 1 stopped by an error that the log explains, 3 diverged,
      4 no memory for the first step, 75 saved after SIGTERM, SIGHUP or SIGINT.
    """
    steps = run.config.training.steps
    began = began or time.time()
    try:
        with (
            told_as_os_errors(run.workdir),
            run.watchdog,
            Checkpoints(run.workdir, run.config.checkpoint) as checkpoints,
        ):
            with run.watchdog.off_the_steps():
                state = run.first_state(checkpoints)
            if checkpoints.restored:
                if not run.owes_evaluation(checkpoints) and int(state.step) >= steps:
                    log.info("%s: nothing left to do after step %d", run.workdir, int(state.step))
                    return exits.DONE
                log.info("resuming %s after step %d", run.workdir, int(state.step))
            run.goodput = Goodput(checkpoints.restored.get("time"), began)
            validation = functools.partial(on_validation, run.program, run.rows)
            every = Evaluation(run.config.training.eval_every, validation)
            return _train_from(run, state, checkpoints, [every, *evaluations])
    except TooManySkippedSteps as error:
        problem, code = str(error), exits.DIVERGED
    except (OSError, CheckpointError) as error:
        problem, code = str(error), exits.FAILED
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = f"out of memory: {first_line(error, 300)}"
        if not isinstance(error, MemoryError):  # which is of the host
            problem += f"; {_saves_memory(run.config)}"
        begun = run.has_trained or saved_step_folders(run.workdir)
        # What does not suffice for the first step of a run never will.
        code = exits.FAILED if begun or isinstance(error, MemoryError) else exits.TOO_LARGE
    log.error("%s", problem)
    hosts.end_the_others(problem, code)
    return code


def _saves_memory(config: RunConfig) -> str:
    """What a user may change for the chips, in words."""
    more = 2 * config.training.accumulation
    remat = "--config.model.remat=full, " if config.model.remat != "full" else ""
    return (
        f"{remat}--config.training.accumulation={more} ({2 * more}, {4 * more}) or a layout of "
        "scripts/plan.py --search need less; a run that has begun takes them with "
        "--allow_config_change"
    )


class Run:
    """What does not change while a run goes on: its program, its data and its folder.

    Attributes:
      records: the files of this host that grow.
      packages: name → version.
      config: of the program, with numbers for what was left to the data.
      init_step: of the checkpoint of config.init_from that the run started from.
      spikes: what was seen of the loss so far.
      goodput: what its time went to so far.
      watchdog: ends the process if a step does not end.
      has_trained: whether this process has done a step.
    """

    def __init__(self, program: Program, workdir: str, rows: Rows, record: dict[str, Any]):
        self.config = program.config
        self.program = program
        self.workdir = folder_of(workdir)
        names = (METRICS_FILE, SKIPPED_FILE, SPIKES_FILE) if hosts.is_first() else ()
        self.records = Records(self.workdir, names)
        self.rows = rows
        self.packages = versions.packages()
        self.init_step: int | None = record["init_step"]
        self.spikes = Spikes()
        self.goodput = Goodput(None, time.time())
        this = hosts.name(jax.process_index())
        self.watchdog = Watchdog(self.config.training.step_timeout_seconds, this)
        self.has_trained = False
        self._config_sha256 = record[SEAL]

    def first_state(self, checkpoints: Checkpoints) -> TrainState:
        """That of the newest checkpoint; where there is none the one before the first step, with
        the parameters of init_from if there is one. Raises CheckpointError."""
        restored = checkpoints.restore_latest(self.program.abstract_state)
        if restored is not None:
            before = checkpoints.restored.get("packages", self.packages)
            versions.tell_changes(before, self.packages)
            return restored
        log.info("starting a new run in %s", self.workdir)
        state = self.program.init_state()
        if not self.config.init_from:
            return state
        log.info("with the parameters of %s, step %d", self.config.init_from, self.init_step)
        wanted = self.program.abstract_state.params
        params = restore_parameters(folder_of(self.config.init_from), wanted, self.init_step)
        return state._replace(params=params)

    def note(self, owed: bool) -> dict[str, Any]:
        """What a checkpoint says of the rest of the folder, and whether an evaluation is owed."""
        self.records.write()
        mark = mark_of(self.records.folder / METRICS_FILE) if hosts.is_first() else None
        losses = list(self.spikes.recent)
        return {
            "config": self._config_sha256, "owed": owed, "metrics": mark, "losses": losses,
            "time": self.goodput.note(), "packages": self.packages,
        }  # fmt: skip

    def owes_evaluation(self, checkpoints: Checkpoints) -> bool:
        """Whether the evaluation of the checkpoint that was restored was left, and not yet made
        since then. All hosts call it."""
        if not checkpoints.restored.get("owed"):
            return False
        step = checkpoints.restored["step"]
        path = self.records.folder / METRICS_FILE
        lines = read_metrics(path) if hosts.is_first() and path.exists() else []
        made = [line for line in lines if line["step"] == step and _is_evaluation(line)]
        written: list[dict[str, float]] = json.loads(
            hosts.exchange("see what was evaluated", json.dumps(made[-1:]))[0]
        )
        for line in written:
            scores = {name: math.nan if x is None else x for name, x in line.items()}
            checkpoints.add_score(step, scores)
            checkpoints.restored["owed"] = False
        return not written

    @contextlib.contextmanager
    def off_the_steps(self, kind: str) -> Iterator[None]:
        """For what is not a step: its time is of a kind of its own, and the watchdog is patient."""
        with self.goodput.during(kind), self.watchdog.off_the_steps():
            yield

    def train_batches(self, start_step: int):
        return self.rows.train_batches(self.config, start_step, self.program.batch_sharding)


def _train_from(
    run: Run, state: TrainState, checkpoints: Checkpoints, evaluations: Sequence[Evaluation]
) -> int:
    """The steps that are left, with metrics and signals looked after."""
    config, step = run.config, int(state.step)
    run.spikes = Spikes(checkpoints.restored.get("losses", ()))
    writer = make_writer(
        run.records,
        config.training.steps,
        resume_step=step,
        mark=checkpoints.restored.get("metrics"),
        enabled=hosts.is_first(),
        more=_other_writers(run),
    )
    report = Report(
        writer,
        steps=config.training.steps,
        log_every=config.training.log_every,
        tokens_per_step=config.training.batch_size * config.data.seq_len,
        flops_per_token=train_flops_per_token(config.model, config.data.seq_len),
        peak_flops=hardware.peak_flops(),
        bound_seconds=roofline.bound_seconds(config, run.program.mesh.devices),
        on_skipped=functools.partial(record_skipped, run),
        on_step=functools.partial(_step_was_done, run),
        of_the_run=lambda step: progress(config, run.rows, step) | run.goodput.metrics(),
    )
    try:
        with preemption.watch(run.watchdog.alive) as preempted:
            due = _Evaluations(evaluations, run, writer, report)
            return _run_steps(run, state, checkpoints, due, report, preempted)
    finally:
        writer.close()


def _step_was_done(run: Run, step: int, metrics: dict[str, float]) -> None:
    run.has_trained = True
    record_spike(run, step, metrics)


def _other_writers(run: Run) -> list[MetricsWriter]:
    project = run.config.training.wandb_project
    if not project or not hosts.is_first():
        return []
    return [WandbWriter(project, run.records, to_dict(run.config))]


def _run_steps(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    evaluations: "_Evaluations",
    report: Report,
    preempted: preemption.Preemption,
) -> int:
    config, start = run.config, int(state.step)
    steps, first, due = config.training.steps, True, False
    if checkpoints.restored.get("owed") and not _made_up(state, checkpoints, evaluations):
        log.warning("%s: left in the evaluation of step %d", preempted.name, start)
        return exits.PREEMPTED
    profile = Profile(run.records, config.training.profile_steps)
    run.goodput.steps_begin()
    run.watchdog.step_ended(start)
    with run.train_batches(start) as batches, profile:
        for step, batch in batches:
            done = step + 1
            compiles = run.off_the_steps("compile") if first else contextlib.nullcontext()
            with compiles, profile.step(done):
                state, metrics = run.program.train_step(state, batch)
            profile.step_dispatched(done, metrics)
            run.goodput.waited(batches.seconds_waited)
            report.push(done, metrics, batches.seconds_waited)
            run.watchdog.step_ended(done)
            first = False
            scores, owed = evaluations.after(done, state)
            leave = preempted.stops()
            due = due or _due(done, config.checkpoint.every, steps)
            if due or leave:
                report.flush()
            # After steps without an update there is nothing new to save: it is put off.
            if (due or leave) and (not report.skipping or done == steps):
                with run.off_the_steps("checkpoints"), report.off_the_clock():
                    note = run.note(owed)
                    checkpoints.save(done, state, scores, interim=not due, note=note)
                due = False
            if leave and (owed or done < steps):
                with run.watchdog.off_the_steps():
                    checkpoints.wait()
                what = "steps were skipped, so not saved," if report.skipping else "saved"
                log.warning("%s: %s step %d; start again to go on", preempted.name, what, done)
                return exits.PREEMPTED
    with run.off_the_steps("checkpoints"):
        checkpoints.wait()
    _tell_of_the_end(run, checkpoints)
    return exits.DONE


def _made_up(state: TrainState, checkpoints: Checkpoints, evaluations: "_Evaluations") -> bool:
    """Makes the evaluation that the checkpoint owes; False where a signal has ended it again."""
    step = int(state.step)
    scores, owed = evaluations.after(step, state)
    if not owed:
        checkpoints.add_score(step, scores)
    return not owed


def _tell_of_the_end(run: Run, checkpoints: Checkpoints) -> None:
    times = run.goodput.metrics()
    log.info(
        "goodput %.1f %%; seconds: %s", 100 * times.pop("goodput"),
        ", ".join(f"{name.removeprefix('time/')} {seconds:.0f}" for name, seconds in times.items()),
    )  # fmt: skip
    if best := checkpoints.best():
        name = run.config.checkpoint.best
        log.info("best checkpoint: step %d, %s %.4f", best[0], name, best[1])


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
        scores: dict[str, float] = {}
        try:
            with self._run.off_the_steps("evaluation"), self._report.off_the_clock():
                for evaluation in due:
                    scores |= evaluation.metrics(state)
        except preemption.Interrupted:
            return {}, True
        self._writer.write(done, scores)
        return scores, False


def _is_evaluation(line: Mapping[str, float]) -> bool:
    return any(name.startswith("eval/") for name in line)


def _due(done: int, every: int, steps: int) -> bool:
    return done % every == 0 or done == steps
