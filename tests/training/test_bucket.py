"""Runs whose folder lies in a bucket: as on a disk, whatever ends them, and seen by all that reads
runs. The bucket is a server on this machine, see tests/bucket_server.py."""

import json
import os
import random
import re
import signal
import subprocess
import sys

import pytest

from tests import buckets, forked
from tests.quick import QUICK_TO_COMPILE
from tests.training import runs

pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")
pytestmark = pytest.mark.slow
KILLS = 3

# In the process that trains: armed by its first step, or when its second save has begun, and so the
# first one is there.
KILL_AFTER = """
import threading
def arm():
    threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGKILL)).start()
push, save, armed, saves = Report.push, Checkpoints.save, [], []
def push_and_arm(self, *rest):
    push(self, *rest)
    if {of_step} and not armed:
        armed.append(arm())
    time.sleep(0.05)
def save_and_arm(self, *rest, **more):
    save(self, *rest, **more)
    saves.append(1)
    if not {of_step} and len(saves) == 2:
        arm()
Report.push, Checkpoints.save = push_and_arm, save_and_arm
"""

HOLD = """
import sys, tempfile
tempfile.tempdir = sys.argv[2]  # as on a machine of its own
from laser.training import lease
from laser.training.folders import folder_of
lease.BEAT_SECONDS, lease.SILENCE_SECONDS = 0.2, 4.0
lease._machine = lambda: sys.argv[2]
try:
    lease.claim(folder_of(sys.argv[1]))
except ValueError as error:
    sys.exit(str(error))
print("held", flush=True)
sys.stdin.read()
"""


SCRIPT = """
import runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def bucket():
    with buckets.running() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def files(bucket):
    """fsspec's file system of the bucket."""
    return bucket.files()


@pytest.fixture(scope="module")
def in_bucket(bucket, files, store, module_arguments):
    """Arguments of a run that reads its store from the bucket."""
    bucket.upload(store, "store")
    return [
        *module_arguments,
        "--config.checkpoint.every=5",
        "--config.data.store=gs://bucket/store",
    ]


@pytest.fixture(scope="module")
def on_disk(module_arguments, tmp_path_factory):
    """The folder of the same run on a disk."""
    folder = tmp_path_factory.mktemp("disk") / "run"
    done = runs.train([*module_arguments, "--config.checkpoint.every=5"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def run(bucket, in_bucket):
    """Name of a run in the bucket that is done."""
    done = runs.train(
        in_bucket, "gs://bucket/runs/done", "--config.training.profile_steps=3,4",
        env=bucket.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return "runs/done"


@pytest.fixture(scope="module")
def data(files):
    """Address of a folder with the data of one task."""
    text = "".join(
        json.dumps({"premise": "He ran.", "choice1": "He was late.", "choice2": "He slept.",
                    "question": "cause", "label": 0, "idx": i}) + "\n"
        for i in range(4)
    )  # fmt: skip
    for split in ("train", "val"):
        files.pipe_file(f"bucket/data/COPA/{split}.jsonl", text.encode())
    return "gs://bucket/data"


def fetched(files, name, folder):
    """A folder of the bucket as one of this machine."""
    files.get(f"bucket/{name}", str(folder), recursive=True)
    return folder


def script(bucket, *command):
    """A finished program of scripts/, on one device."""
    return python(bucket, SCRIPT, *command)


def python(bucket, program, *arguments):
    """A finished program, from its source text."""
    environment = {**os.environ, **bucket.environment, "XLA_FLAGS": QUICK_TO_COMPILE}
    return forked.run(program, list(map(str, arguments)), environment, timeout=800)


def test_three_kills_leave_the_run_as_one_on_a_disk(
    bucket, files, in_bucket, module_arguments, tmp_path
):
    # Of fast steps, too, a process ends at most 6 after it was armed, and 30 come from all three.
    length = ("--config.training.steps=40", "--config.checkpoint.every=5")
    whole = runs.train(module_arguments, tmp_path / "whole", *length)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    killed = (in_bucket, "gs://bucket/runs/killed", *length)
    rng = random.Random(0)
    for kill in range(KILLS):
        event = KILL_AFTER.format(seconds=rng.uniform(0, 0.3), of_step=kill % 2 == 0)
        ended = runs.train(*killed, event=event, env=bucket.environment)
        assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
    done = runs.train(*killed, env=bucket.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"resuming gs://bucket/runs/killed after step \d", done.stdout)
    here = fetched(files, "runs/killed", tmp_path / "here")
    assert runs.tensors(here, 40) == runs.tensors(tmp_path / "whole", 40)
    assert runs.losses(here) == runs.losses(tmp_path / "whole")
    seen = script(bucket, "scripts/verify_run.py", "gs://bucket/runs/killed")
    assert seen.returncode == 0, seen.stdout + seen.stderr
    assert "checkpoints/40: intact" in seen.stdout


def test_a_damaged_checkpoint_is_set_aside(bucket, files, in_bucket, run, on_disk, tmp_path):
    files.copy(f"bucket/{run}/", "bucket/runs/damaged/", recursive=True)
    (part,) = files.find("bucket/runs/damaged/checkpoints/20/state/d")
    files.pipe_file(part, b"nonsense")
    seen = script(bucket, "scripts/verify_run.py", "gs://bucket/runs/damaged")
    assert seen.returncode == 1
    assert "checkpoints/20: damaged" in seen.stdout
    done = runs.train(in_bucket, "gs://bucket/runs/damaged", env=bucket.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint 20 moved to 20.unreadable" in done.stdout
    assert "resuming gs://bucket/runs/damaged after step 15" in done.stdout
    here = fetched(files, "runs/damaged", tmp_path / "here")
    assert (here / "20.unreadable/record/metadata").is_file()
    assert runs.tensors(here, 20) == runs.tensors(on_disk, 20)
    assert runs.losses(here) == runs.losses(on_disk)
    seen = script(bucket, "scripts/verify_run.py", "gs://bucket/runs/damaged")
    assert "20.unreadable: damaged" in seen.stdout
    assert "checkpoints/20: intact" in seen.stdout
    events = sorted(path.name.partition(".")[0] for path in (here / "tensorboard").glob("events*"))
    assert events == ["events-000001", "events-000002"]


def test_what_reads_runs_reads_them_there(bucket, files, run, data, on_disk, tmp_path):
    address = f"gs://bucket/{run}"
    (trace,) = files.glob(f"bucket/{run}/tensorboard/plugins/profile/*/*.xplane.pb")
    assert files.size(trace) > 1000
    prompt = ["--prompt=In the", "--max_new_tokens=8"]
    said = script(bucket, "scripts/generate.py", f"--workdir={address}", *prompt)
    assert said.returncode == 0, said.stderr
    here = script(bucket, "scripts/generate.py", f"--workdir={on_disk}", *prompt)
    assert said.stdout == here.stdout
    scored = script(
        bucket, "scripts/evaluate.py", f"--workdir={address}", "--tasks=copa", f"--data_dir={data}"
    )
    assert scored.returncode == 0, scored.stderr
    assert files.glob(f"bucket/{run}/eval/20/*/results.json")
    png = f"--png={tmp_path / 'compare.png'}"
    compared = script(bucket, "scripts/compare_runs.py", address, str(on_disk), png)
    assert compared.returncode == 0, compared.stderr
    out = f"--output={tmp_path / 'exported'}"
    exported = script(bucket, "scripts/export.py", f"--workdir={address}", out)
    assert exported.returncode == 0, exported.stdout + exported.stderr


def test_a_run_starts_from_one_and_is_scored_with_data_there(bucket, files, run, in_bucket, data):
    done = runs.train(
        in_bucket, "gs://bucket/runs/second", f"--config.init_from=gs://bucket/{run}",
        "--config.training.steps=4", "--config.evaluation.tasks=copa",
        f"--config.evaluation.data_dir={data}", env=bucket.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"with the parameters of gs://bucket/{run}, step 20" in done.stdout
    lines = files.cat_file("bucket/runs/second/metrics.jsonl").decode().splitlines()
    assert any("eval/copa/accuracy" in json.loads(line) for line in lines)


def test_several_hosts_write_one_run_there_and_go_on_with_it(bucket, files, in_bucket, on_disk):
    for event, code in ((runs.SIGTERM_TO_HOST_1_AFTER_3, 75), ("", 0)):
        done = runs.train_on_hosts(
            in_bucket, "gs://bucket/runs/hosts", hosts=2, devices=2, event=event,
            common=bucket.environment,
        )  # fmt: skip
        assert [host.returncode for host in done] == [code, code], done[0].stdout + done[0].stderr
    assert "resuming gs://bucket/runs/hosts after step" in done[0].stdout
    assert files.exists("bucket/runs/hosts/checkpoints/20/state/ocdbt.process_1/manifest.ocdbt")
    lines = files.cat_file("bucket/runs/hosts/metrics.jsonl").decode().splitlines()
    found = {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}
    expected = runs.losses(on_disk)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "address"),
    [("nothing", "gs://no-such-bucket/run"), ("rights", "gs://denied/run")],
)
def test_a_bucket_without_rights_is_one_line(bucket, in_bucket, run, name, address):
    del name
    for flag, said in (
        (f"--workdir={address}", f"workdir={address}: cannot be written"),
        (f"--config.init_from={address}", f"init_from={address}: "),
        (f"--config.evaluation.data_dir={address}", f"evaluation.data_dir={address}: "),
        (f"--config.data.store={address}", f"error: {address}"),
    ):
        more = ["--config.evaluation.tasks=copa"] if "data_dir" in flag else []
        refused = runs.train(
            in_bucket, "gs://bucket/runs/never", *more, flag, env=bucket.environment
        )
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert said in refused.stderr
        assert "Traceback" not in refused.stderr + refused.stdout


def hold(bucket, address, machine):
    machine.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, address, str(machine)],
        cwd=runs.ROOT,
        env={**os.environ, **bucket.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_process_at_a_time(bucket, tmp_path):
    address, here, there = "gs://bucket/runs/held", tmp_path / "here", tmp_path / "there"
    first = hold(bucket, address, here)
    assert first.stdout.readline() == "held\n"
    for machine in (here, there):
        refused = hold(bucket, address, machine)
        assert (
            f"{address}: another process trains here (pid {first.pid} on"
            in (refused.communicate()[1])
        )
    first.send_signal(signal.SIGSTOP)  # for longer than the others wait
    second = hold(bucket, address, there)
    assert second.stdout.readline() == "held\n"
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 1
    assert "another process trains here now" in first.communicate()[1]
    second.kill()
    second.communicate()
    third = hold(bucket, address, here)  # after a kill it has to look first
    assert third.stdout.readline() == "held\n"
    third.communicate()  # the end of its input ends it
    assert not bucket.files().exists("bucket/runs/held/.lock")


def test_a_busy_bucket_is_asked_again(store, module_arguments, on_disk, tmp_path):
    with buckets.running(fail_every=5) as busy:
        busy.upload(store, "store")
        done = runs.train(
            [*module_arguments, "--config.checkpoint.every=5"], tmp_path / "run",
            "--config.data.store=gs://bucket/store", "--config.data.requests=4",
            env=busy.environment,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.losses(tmp_path / "run") == runs.losses(on_disk)
    # The data has moved, which is no other config; and the folder can be read.
    arguments = [*module_arguments, "--config.checkpoint.every=5"]
    assert runs.train(arguments, tmp_path / "run").returncode == 0


# And the library's six tries come one after another in a twentieth of their time.
DIES = """
import asyncio, types
from gcsfs import retry
retry.asyncio = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 20))
push = Report.push
def push_and_cut(self, done, *rest):
    push(self, done, *rest)
    if done == 8:
        os.kill(int(os.environ["SERVER"]), signal.SIGKILL)
Report.push = push_and_cut
"""


def test_a_network_that_dies_ends_the_run_in_one_line(store, module_arguments, on_disk, tmp_path):
    arguments = [*module_arguments, "--config.checkpoint.every=5"]
    more = ["--config.data.read_ahead=0", "--config.data.block_rows=1"]
    reference = runs.train(arguments, tmp_path / "reference", *more)
    assert reference.returncode == 0
    with buckets.running() as dies:
        dies.upload(store, "store")
        ended = runs.train(
            arguments, tmp_path / "run", "--config.data.store=gs://bucket/store", *more, event=DIES,
            env={**dies.environment, "SERVER": str(dies.process.pid)},
        )  # fmt: skip
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "gs://bucket/store/train-00000.bin" in ended.stdout.splitlines()[-1]
    assert "Traceback" not in ended.stdout + ended.stderr
    gone_on = runs.train(arguments, tmp_path / "run", *more)
    assert gone_on.returncode == 0
    assert re.search(r"after step (5|10)\n", gone_on.stdout)  # rows of steps 9 and 10 may be there
    assert runs.losses(tmp_path / "run") == runs.losses(tmp_path / "reference")
    assert runs.tensors(tmp_path / "run", 20) == runs.tensors(tmp_path / "reference", 20)


SCORES = """
import jax.numpy as jnp
from configs import base
from laser.training.checkpoint import Checkpoints
from laser.training.config import CheckpointConfig
config = CheckpointConfig(every=1, keep=1, keep_period=0, best="loss")
for steps in ((1, 2), (3,), ()):
    with Checkpoints("gs://bucket/runs/scores", config) as checkpoints:
        for step in steps:
            loss = {"eval/loss": {1: 3.0, 2: 1.0, 3: 2.0}[step]}
            late = step == 2
            checkpoints.save(step, {"x": jnp.ones(3)}, None if late else loss)
            checkpoints.wait()
            if late:
                checkpoints.add_score(step, loss)
        print(checkpoints.best(), checkpoints._steps())
"""


def test_the_best_checkpoint_is_kept_by_a_score_that_came_later(bucket):
    said = python(bucket, SCORES)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[-3:] == [
        "(2, 1.0) [1, 2]",
        "(2, 1.0) [2, 3]",
        "(2, 1.0) [2, 3]",
    ]
