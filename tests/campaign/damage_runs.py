"""Runs that are killed, damaged and starved, again and again: do they come back with the same bits?

    python -m tests.campaign.damage_runs --tries=150 --seed=0 [--only=damage,kill]

Four kinds of trials: `damage` (each file of a run's folder, in each way), `kill` (SIGKILL, SIGTERM
and SIGHUP at random moments), `memory` (a limit on the address space), `disk` (a small tmpfs).
After each of them the same command is given again, as the launcher does. What counts is how that
ends: with parameters and losses of the undisturbed run to the bit, or refused with a reason. A run
that was refused is looked at with scripts/verify_run.py, which must not find it intact. `hosts`, on
request, has one of two hosts frozen or killed, and waits for the other.

One start takes some seconds, 150 tries an hour on two cores. pytest leaves this file out.
"""

import argparse
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorstore

from tests.campaign.damage import (
    ROOT,
    Ended,
    Trial,
    Verdict,
    Way,
    damage,
    files_of,
    judge,
    report,
    run,
)

STEPS = 12
KINDS = ("damage", "kill", "memory", "disk")
FIELDS = {
    "model.vocab_size": 400,
    "model.num_layers": 1,
    "model.model_dim": 32,
    "model.mlp_dim": 64,
    "model.num_heads": 2,
    "model.head_dim": 16,
    "data.seq_len": 32,
    "training.steps": STEPS,
    "training.batch_size": 8,
    "training.log_every": 1,
    "training.eval_every": 4,
    "optimizer.warmup_steps": 3,
    "optimizer.learning_rate": 0.01,
    "checkpoint.every": 4,
    "checkpoint.best": "loss",
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all trials share: a store, the undisturbed run, one that was stopped, a work folder."""

    folder: Path
    command: list[str]
    env: dict[str, str]
    whole: Path
    stopped: Path
    seconds: float  # that a start and all steps take

    def start(self, workdir: Path, **options) -> Ended:
        return run([*self.command, f"--workdir={workdir}"], env=self.env, **options)

    def copy(self, number: int) -> Path:
        """A fresh copy of the stopped run."""
        workdir = self.folder / f"try-{number}"
        shutil.copytree(self.stopped, workdir)
        return workdir


def make_bench(folder: Path) -> Bench:
    text = folder / "text"
    text.mkdir()
    from data.preparation.config import StoreConfig
    from data.preparation.prepare import prepare
    from data.sources import corpus  # heavy, and only here

    for i, chapter in zip(range(40), corpus.documents("train")):
        (text / f"{i:02}.txt").write_text(chapter)
    prepare(StoreConfig(str(text), vocab_size=400, validation_fraction=0.1), folder / "store")
    overrides = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    command = [
        sys.executable, "train.py", "--config=configs/quickstart.py", *overrides,
        f"--config.data.store={folder / 'store'}",
    ]  # fmt: skip
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **cache}
    bench = Bench(folder, command, env, folder / "whole", folder / "stopped", 0.0)
    for workdir in (bench.whole, folder / "again"):
        ended = bench.start(workdir)
        if ended.code:
            raise SystemExit(f"the undisturbed run failed:\n{ended.stdout}\n{ended.stderr}")
    same = same_as(bench, folder / "again")
    if not same():
        raise SystemExit("two undisturbed runs differ, so nothing can be told from the others")
    bench = dataclasses.replace(bench, seconds=ended.seconds)
    code = bench.start(bench.stopped, during=after_step(bench.stopped, 9, signal.SIGTERM)).code
    if code != 75:
        raise SystemExit(f"the run that was to be stopped left with {code}")
    return bench


def after_step(workdir: Path, step: int, number: int) -> Callable[[subprocess.Popen], None]:
    """Sends a signal once a step is in metrics.jsonl."""

    def during(process: subprocess.Popen) -> None:
        path = workdir / "metrics.jsonl"
        while process.poll() is None:
            if path.exists() and f'"step": {step},' in path.read_text():
                os.kill(process.pid, number)
                return
            time.sleep(0.005)

    return during


def result_of(workdir: Path) -> dict:
    """The last checkpoint's tensors, and losses and scores by step."""
    base = (workdir / "checkpoints" / str(STEPS) / "state").as_uri() + "/"
    kvstore = {"driver": "ocdbt", "base": base}
    names = tensorstore.KvStore.open(kvstore).result().list().result()
    tensors = {}
    for name in sorted({name.decode().rpartition("/")[0] for name in names}):
        spec = {"driver": "zarr", "kvstore": {**kvstore, "path": name + "/"}}
        tensors[name] = tensorstore.open(spec).result().read().result()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    keys = ("loss", "eval/loss", "eval/bits_per_byte")
    losses = {(line["step"], key): line[key] for line in lines for key in keys if key in line}
    return {"tensors": tensors, "losses": losses}


def same_as(bench: Bench, workdir: Path, losses: bool = True) -> Callable[[], bool]:
    """Whether a finished run is the undisturbed one to the bit."""

    def same() -> bool:
        expected, actual = result_of(bench.whole), result_of(workdir)
        names = expected["tensors"].keys()
        return (
            names == actual["tensors"].keys()
            and all(np.array_equal(expected["tensors"][n], actual["tensors"][n]) for n in names)
            and (not losses or expected["losses"] == actual["losses"])
        )

    return same


def damage_trials(bench: Bench, rng: random.Random, tries: int) -> Iterator[Trial]:
    names = [str(path.relative_to(bench.stopped)) for path in files_of(bench.stopped)]
    cases = [(name, way) for name in names if name != ".lock" for way in Way]
    rng.shuffle(cases)
    for number, (name, way) in zip(range(tries), cases * (1 + tries // len(cases))):
        workdir = bench.copy(number)
        other = workdir / rng.choice([other for other in names if other != name])
        told = damage(workdir / name, way, rng, other)
        ended = bench.start(workdir)
        # Metrics are a record of what was: lines that are lost or changed are told.
        told_of = "metrics.jsonl" in ended.stdout and "damaged" in ended.stdout
        losses = not (name == "metrics.jsonl" and (told_of or not ended.code))
        said = name != "metrics.jsonl" or told_of or same_as(bench, workdir)()
        trial = judge(
            f"{name} ({told})",
            f"damage: {way}",
            ended,
            lambda workdir=workdir, losses=losses, said=said: (
                said and same_as(bench, workdir, losses)()
            ),
        )
        if trial.verdict == Verdict.REFUSED and verify(workdir).code == 0:
            trial = dataclasses.replace(trial, verdict=Verdict.UGLY)  # nothing was the matter
        yield trial
        shutil.rmtree(workdir)


def verify(workdir: Path) -> Ended:
    return run([sys.executable, "scripts/verify_run.py", str(workdir)])


def kill_trials(bench: Bench, rng: random.Random, tries: int) -> Iterator[Trial]:
    for number in range(tries):
        workdir = bench.folder / f"kill-{number}"
        kind = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
        times = [rng.uniform(0.2, 1.0) * bench.seconds for _ in range(rng.randint(1, 3))]

        def during(process, times=times, kind=kind):
            try:
                process.wait(timeout=times.pop())
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, kind)

        name = f"{kind.name} after {', '.join(f'{x:.1f}' for x in times)} s"
        while times and (ended := bench.start(workdir, during=during)) and not ended.hung:
            if ended.code not in (-9, 0, 75, -15, -1):  # before it listens, a signal ends it
                break
        else:
            ended = bench.start(workdir)
        trial = judge(name, f"kill: {kind.name}", ended, same_as(bench, workdir))
        yield must_end_well(trial)
        shutil.rmtree(workdir, ignore_errors=True)


def must_end_well(trial: Trial) -> Trial:
    """Nothing was damaged, so to refuse is wrong here."""
    if trial.verdict != Verdict.REFUSED:
        return trial
    return dataclasses.replace(trial, verdict=Verdict.UGLY)


def memory_trials(bench: Bench, rng: random.Random, tries: int) -> Iterator[Trial]:
    """The limited start may end as it likes, as an allocator aborts; the next one must go on."""
    for number in range(tries):
        workdir = bench.copy(number)
        mebibytes = rng.randint(300, 3000)
        command = ["prlimit", f"--as={mebibytes << 20}", *bench.command, f"--workdir={workdir}"]
        first = run(command, env=bench.env)
        ended = first if first.hung else bench.start(workdir)
        trial = judge(f"{mebibytes} MiB", "memory", ended, same_as(bench, workdir))
        yield must_end_well(trial)
        shutil.rmtree(workdir)


def disk_trials(bench: Bench, rng: random.Random, tries: int) -> Iterator[Trial]:
    """On a small tmpfs; then the folder is copied to a disk with room, and goes on there."""
    for number in range(tries):
        disk, kept = bench.folder / f"disk-{number}", bench.folder / f"kept-{number}"
        disk.mkdir()
        size, inodes = rng.randint(200, 3000), rng.choice([0, 0, rng.randint(20, 150)])
        script = (
            f"mount -t tmpfs -o size={size}k,nr_inodes={inodes} tmpfs {disk}; "
            f'"$@" --workdir={disk}/run; code=$?; cp -a {disk}/run {kept}; exit $code'
        )
        command = ["unshare", "--map-root-user", "--mount", "bash", "-c", script, "bash"]
        first = run([*command, *bench.command], env=bench.env)
        name, group = f"{size} KiB, {inodes or 'any number of'} files", "disk"
        trial = judge(name, group, first, lambda: True)
        if trial.verdict in (Verdict.SAME, Verdict.REFUSED):
            again = bench.start(kept)
            trial = must_end_well(judge(name, group, again, same_as(bench, kept)))
        yield trial
        shutil.rmtree(kept, ignore_errors=True)
        disk.rmdir()


def host_trials(bench: Bench, rng: random.Random, tries: int) -> Iterator[Trial]:
    """One of two hosts is frozen or killed; the other must leave with 1 and name it."""
    from tests.training.runs import free_port

    for number in range(tries):
        workdir, victim = bench.folder / f"hosts-{number}", rng.randrange(2)
        kind = rng.choice([signal.SIGSTOP, signal.SIGKILL])
        step = rng.randint(1, STEPS - 2)
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        port = free_port()
        common = {**os.environ, **bench.env}
        processes = [
            subprocess.Popen(
                [*bench.command, "--config.training.steps=4000", f"--workdir={workdir}"],
                cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=common | dict(zip(names, (f"localhost:{port}", "2", str(i)))),
            )
            for i in range(2)
        ]  # fmt: skip
        after_step(workdir, step, kind)(processes[victim])
        began = time.monotonic()
        other = processes[1 - victim]
        try:
            out, _ = other.communicate(timeout=60)
            ended = Ended(other.returncode, out, "", time.monotonic() - began)
        except subprocess.TimeoutExpired:
            ended = Ended(-9, "", "", time.monotonic() - began, hung=True)
        for process in processes:
            process.kill()
            process.communicate()
        trial = judge(f"step {step}", f"hosts: {kind.name} to host {victim}", ended, lambda: False)
        if trial.verdict == Verdict.REFUSED and f"host {victim} (" not in ended.stdout:
            trial = dataclasses.replace(trial, verdict=Verdict.UGLY)
        yield trial
        shutil.rmtree(workdir, ignore_errors=True)


TRIALS = {
    "damage": damage_trials,
    "kill": kill_trials,
    "memory": memory_trials,
    "disk": disk_trials,
    "hosts": host_trials,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=150, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS), help=f"some of {', '.join(TRIALS)}")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kinds = arguments.only.split(",")
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        bench = make_bench(Path(folder))
        weights = [3 if kind == "damage" else 1 for kind in kinds]  # there are many files
        for kind, weight in zip(kinds, weights):
            share = round(arguments.tries * weight / sum(weights))
            rng = random.Random(f"{arguments.seed}-{kind}")
            for trial in TRIALS[kind](bench, rng, share):
                print(f"{trial.verdict:9} {trial.group}: {trial.name}", flush=True)
                trials.append(trial)
    return report(trials)


if __name__ == "__main__":
    sys.exit(main())
