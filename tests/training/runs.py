"""Runs train.py in a process of its own, as a user would, with something happening on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What can happen in the middle of a run. `done` is the step that has just been dispatched.
SIGTERM_AFTER_7 = """
push = Report.push
def push_and_signal(self, done, *rest):
    push(self, done, *rest)
    if done == 7:
        os.kill(os.getpid(), signal.SIGTERM)
Report.push = push_and_signal
"""

KILL_IN_SAVE = """
save = Checkpoints.save
def save_and_die(self, step, state):
    save(self, step, state)  # returns when the copy is made and the writing has begun
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = save_and_die
"""

FILL_DISK_BEFORE_SAVING_10 = """
save = Checkpoints.save
def fill_and_save(self, step, state):
    self.wait()
    if step == 10:
        free = shutil.disk_usage(os.environ["DISK"]).free
        Path(os.environ["DISK"], "filler").write_bytes(b"x" * (free - 32768))
    save(self, step, state)
Checkpoints.save = fill_and_save
"""

DRIVER = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import train
from laser.training.hardware import tune_cpu
tune_cpu()
from laser.training.checkpoint import Checkpoints
from laser.training.report import Report
{event}
sys.exit(train.main(["train.py", *sys.argv[1:]]))
"""


def train(arguments, workdir, *extra, event="", command=(), env=None, timeout=240):
    """The finished process; stdout and stderr are text."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **(env or {})}
    start = [sys.executable, "-c", DRIVER.format(root=str(ROOT), event=event)]
    if not event:
        start = [sys.executable, "train.py"]
    return subprocess.run(
        [*command, *start, *arguments, f"--workdir={workdir}", *extra],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def losses(workdir):
    """Step → loss of metrics.jsonl, where each step must be there once."""
    records = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").open()]
    pairs = [(record["step"], record["loss"]) for record in records if "loss" in record]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)
