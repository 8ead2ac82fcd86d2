"""A run that can be watched: it says where it hangs and ends, traces steps, counts its time."""

import itertools
import json
import subprocess
import sys

import jax
import pytest

from laser.training.goodput import KINDS, Goodput
from laser.training.run_folder import read_sidecar
from tests.training import runs

HANGS = """
import ctypes, logging, sys, time
from laser.training import watchdog
from laser.training.watchdog import Watchdog
watchdog.GRACE_SECONDS = 0.5
watchdog.OFF_THE_STEPS_SECONDS = 3.0
def never_returns():
    ctypes.PyDLL(None).sleep(60)  # and no other thread runs
def waits_for_ever():
    time.sleep(60)
def takes_its_time():
    time.sleep(1.5)
logging.basicConfig(stream=sys.stdout)
with Watchdog(0.5, "host 3 (there)") as watchdog:
    watchdog.step_ended(7)
    if sys.argv[1] == "hang":
        waits_for_ever()
    if sys.argv[1] == "hold":
        time.sleep(0.2)
        never_returns()
    with watchdog.off_the_steps():
        takes_its_time()
        if sys.argv[1] == "evaluate":
            waits_for_ever()
        for _ in range(3):  # beyond the limit in all
            watchdog.alive()
            takes_its_time()
"""


def test_what_hangs_ends_with_its_stacks_and_what_takes_its_time_does_not():
    start = [sys.executable, "-c", HANGS]
    processes = [
        subprocess.Popen([*start, how], cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)
        for how in ("hang", "save", "hold", "evaluate")
    ]
    outputs = [process.communicate(timeout=50)[0] for process in processes]
    hung, saved, held, evaluated = outputs
    assert [process.returncode for process in processes] == [1, 0, 1, 1], outputs
    assert "host 3 (there): no step has ended for 0.5 s, since step 7" in hung
    assert "in waits_for_ever" in hung
    assert "in never_returns" in held
    assert "host 3 (there): what is no step has not ended for 3 s, since step 7" in evaluated
    assert "in waits_for_ever" in evaluated
    assert saved == ""


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_all_time_is_of_one_kind_over_restarts():
    clock = Clock()
    spent = Goodput(None, 990.0, clock)
    spent.steps_begin()
    with spent.during("compile"):
        clock.now += 20
    clock.now += 50
    spent.waited(5.0)
    with spent.during("checkpoints"):
        clock.now += 2
        note = json.loads(json.dumps(spent.note()))
        clock.now += 1
    clock.now += 30  # lost
    clock.now += 100  # nothing runs
    again = Goodput(note, clock.now, clock)
    clock.now += 8
    again.steps_begin()
    clock.now += 55
    again.waited(5.0)
    metrics = again.metrics()
    seconds = {name.removeprefix("time/"): x for name, x in metrics.items() if name != "goodput"}
    assert seconds == {
        "start": 18, "compile": 20, "steps": 95, "data": 10, "checkpoints": 2, "evaluation": 0,
        "restarts": 131,
    }  # fmt: skip
    assert sum(seconds.values()) == clock.now - 990
    assert metrics["goodput"] == pytest.approx(95 / 276)


HANG_AT_12 = """
import threading
from laser.training import versions
versions.packages = lambda: {"jax": "0.0.1"}
push = Report.push
def push_and_hang(self, done, *rest):
    push(self, done, *rest)
    if done == 12:
        threading.Event().wait()
Report.push = push_and_hang
"""


def test_a_step_that_hangs_ends_the_run_which_then_goes_on(arguments, tmp_path):
    """With a trace of two steps, and its time over both processes, of which one had another jax."""
    workdir = tmp_path / "run"
    watched = ["--config.checkpoint.every=5", "--config.training.profile_steps=3,4"]
    limit = "--config.training.step_timeout_seconds=8"
    hung = runs.train(arguments, workdir, *watched, limit, event=HANG_AT_12)
    assert hung.returncode == 1, hung.stderr
    assert "host 0: no step has ended for 8 s, since step 11" in hung.stdout
    assert "in push_and_hang" in hung.stdout
    assert "data-prefetch" in hung.stdout or "_fill" in hung.stdout  # other threads, too

    (trace,) = workdir.glob("tensorboard/plugins/profile/*/*.xplane.pb")
    steps = {
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert steps == {3, 4}

    resumed = runs.train(arguments, workdir, *watched)  # and without the limit
    assert resumed.returncode == 0, resumed.stderr
    assert "so steps may differ in their last bits: jax: 0.0.1 -> " in resumed.stdout
    assert list(runs.losses(workdir)) == list(range(1, 21))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    times = [{kind: line[f"time/{kind}"] for kind in KINDS} for line in lines if "loss" in line]
    assert times[9]["restarts"] == 0
    assert times[10]["restarts"] > 8  # seconds of the watchdog
    for earlier, later in itertools.pairwise(times):
        assert all(later[kind] >= earlier[kind] - 1e-6 for kind in KINDS)
    note = read_sidecar(workdir / "checkpoints" / "20")["time"]
    assert note["seconds"]["evaluation"] > 0
    assert "goodput " in resumed.stdout
