"""Runs train.py in a process of its own, as a user would, with something happening on the way."""

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests import forked
from tests.quick import QUICK_TO_COMPILE

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

# Whoever started the tests under nohup has had SIGHUP ignored, in all of their programs.
SIGHUP_AFTER_13 = "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n" + (
    SIGTERM_AFTER_7.replace("SIGTERM", "SIGHUP").replace("== 7", "== 13")
)

# Of the evaluation that begins after so many steps, in its first batch.
SIGTERM_IN_EVALUATION_AFTER = """
from laser.training import preemption
between_batches, push = preemption.between_batches, Report.push
def push_and_count(self, done, *rest):
    global newest
    newest = done
    push(self, done, *rest)
def signal_between_batches():
    if newest == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
    between_batches()
Report.push, preemption.between_batches = push_and_count, signal_between_batches
"""

KILL_IN_SAVE = """
save = Checkpoints.save
def save_and_die(self, *rest, **more):
    save(self, *rest, **more)  # returns when the copy is made and the writing has begun
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = save_and_die
"""

FILL_DISK_BEFORE_SAVING_10 = """
save = Checkpoints.save
def fill_and_save(self, step, *rest, **more):
    self.wait()
    if step == 10:
        free = shutil.disk_usage(os.environ["DISK"]).free
        Path(os.environ["DISK"], "filler").write_bytes(b"x" * (free - 32768))
    save(self, step, *rest, **more)
Checkpoints.save = fill_and_save
"""

# On several hosts, in each of them; `this` is its index.
KILL_HOST_1_AFTER_7 = """
push = Report.push
workdir, = [name.partition("=")[2] for name in sys.argv if name.startswith("--workdir=")]
def push_and_die(self, done, *rest):
    push(self, done, *rest)
    if done == 7 and this == 1:
        while not Path(workdir, "checkpoints/4").is_dir():  # fast steps overtake a slow disk
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
Report.push = push_and_die
"""

SIGTERM_TO_HOST_1_AFTER_3 = """
push = Report.push
def push_and_signal(self, done, *rest):
    push(self, done, *rest)
    if done == 3 and this == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(4)  # jax looks for signals once in a second
Report.push = push_and_signal
"""

HOST_1_CANNOT_READ_12 = """
import orbax.checkpoint as ocp
restore = ocp.Checkpointer.restore
def restore_or_fail(self, directory, *rest, **more):
    if this == 1 and Path(directory).parent.name == "12":
        raise ValueError("DATA_LOSS: this disk is broken")
    return restore(self, directory, *rest, **more)
ocp.Checkpointer.restore = restore_or_fail
"""

# Frozen until host 1 has ended; then it goes on, so that nothing is left behind.
FREEZE_HOST_0_AFTER_7 = """
import subprocess
push = Report.push
workdir, = [name.partition("=")[2] for name in sys.argv if name.startswith("--workdir=")]
other = Path(workdir, "pid-of-1")
if this == 1:
    other.write_text(str(os.getpid()))
def push_and_freeze(self, done, *rest):
    push(self, done, *rest)
    if done == 7 and this == 0:
        wait = f"while kill -0 {other.read_text()}; do sleep 0.5; done 2>/dev/null"
        subprocess.Popen(["sh", "-c", f"{wait}; kill -KILL {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
Report.push = push_and_freeze
"""

DISK_ERROR_ON_HOST_1 = """
save = Checkpoints.save
def save_or_fail(self, *rest, **more):
    if this == 1:
        raise OSError("no space left on device")
    save(self, *rest, **more)
Checkpoints.save = save_or_fail
"""

HOST_0_SEES_NO_DIVERGENCE = """
from laser.training import incidents, loop
def record_or_wait(*rest):
    try:
        incidents.record_skipped(*rest)
    except incidents.TooManySkippedSteps:
        time.sleep(600 if this == 0 else 0)
        raise
loop.record_skipped = record_or_wait
"""

RECORD_READING = """
restore_latest = Checkpoints.restore_latest
record = Path(os.environ["RECORD"])
class Recorded(BlockReader):
    def _gather(self, step, places):
        with (record / f"rows-{this}.jsonl").open("a") as file:
            print(json.dumps({"step": step, "ids": places.rows.tolist()}), file=file)
        return super()._gather(step, places)
make_batches = data.reading.loader.train_batches
def train_batches(*rest, **named):  # and not those of the validation split
    data.reading.loader.BlockReader = Recorded
    try:
        return make_batches(*rest, **named)
    finally:
        data.reading.loader.BlockReader = BlockReader
def restore_and_record(self, abstract):
    state = restore_latest(self, abstract)
    name = "/tensorstore/kvstore/file/bytes_read"
    metrics = tensorstore.experimental_collect_matching_metrics(name)
    (record / f"bytes-{this}").write_text(str(sum(m["values"][0]["value"] for m in metrics)))
    return state
data.reading.loader.train_batches = train_batches
Checkpoints.restore_latest = restore_and_record
"""

DRIVER = """
import json, os, shutil, signal, sys, time
from pathlib import Path
import train
import data.reading.loader, tensorstore
from data.reading.blocks import BlockReader
from laser.training.checkpoint import Checkpoints
from laser.training.report import Report
this = int(os.environ.get("JAX_PROCESS_ID", 0))
{event}
sys.exit(train.main(["train.py", *sys.argv[1:]]))
"""
AS_IT_IS = 'import runpy; runpy.run_path("train.py", run_name="__main__")'


def train(arguments, workdir, *extra, event="", command=(), env=None, timeout=800):
    """The finished process; stdout and stderr are text.

    `command` starts it: a Python of its own, in place of one that is forked, where that matters, as
    for variables that jax reads when it is imported.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK_TO_COMPILE,
        **(env or {}),
    }
    program = DRIVER.format(event=event) if event else AS_IT_IS
    arguments = [*arguments, f"--workdir={workdir}", *extra]
    if not command:
        return forked.run(program, arguments, environment, timeout)
    return subprocess.run(
        [*command, sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train_on_hosts(
    arguments, workdir, *extra, hosts, devices, event="", record=None, command=(), env=None,
    common=(), timeout=800,
):  # fmt: skip
    """The finished processes of one run on this machine, each with its simulated devices.

    With `record`, a folder, every host writes there what it reads. `env` by host says how they
    find each other; by jax's variables if it is None. `common` is for all of them.
    """
    simulated = f"--xla_force_host_platform_device_count={devices}"
    common = {**dict(common), "XLA_FLAGS": f"{simulated} {QUICK_TO_COMPILE}"}
    if record is not None:
        record.mkdir()
        event += RECORD_READING
        common["RECORD"] = str(record)
    if hosts > 1 and env is None:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        meeting = f"localhost:{free_port()}"
        env = [dict(zip(names, (meeting, str(hosts), str(i)))) for i in range(hosts)]

    def start(index):
        own = env[index] if env else {}
        more = extra[index] if extra else []
        return train(
            [*arguments, *more], workdir, event=event, command=command, env=common | own,
            timeout=timeout,
        )  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(hosts) as pool:
        return list(pool.map(start, range(hosts)))


def assert_same_parameters(one, other):
    """Of the newest checkpoints of two runs, bit for bit, whatever kind of model it is."""
    import jax
    import numpy as np

    from eval.run import chosen_step, open_parameters
    from laser.training.run_folder import load_run_config

    found = []
    for workdir in (one, other):
        step = chosen_step(Path(workdir), None)
        params, _ = open_parameters(Path(workdir), load_run_config(str(workdir)), step)
        found.append((step, jax.tree.map(np.asarray, params)))
    jax.tree.map(np.testing.assert_array_equal, *found)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def rows_read(record, host="*"):
    """Step → the row ids that were read for it, those of host 0 first."""
    rows = {}
    for path in sorted(record.glob(f"rows-{host}.jsonl")):
        for line in path.open():
            read = json.loads(line)
            rows.setdefault(read["step"], []).extend(read["ids"])
    return rows


def tensors(workdir, step):
    """Checksums of a checkpoint's tensors by their names."""
    path = Path(workdir) / f"checkpoints/{step}/record/metadata"
    return json.loads(path.read_text())["tensors"]


def losses(workdir):
    """Step → loss of metrics.jsonl, where each step must be there once."""
    records = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").open()]
    pairs = [(record["step"], record["loss"]) for record in records if "loss" in record]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)
