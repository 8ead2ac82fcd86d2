"""What goes wrong ends in one message and the right exit code, and nothing older is lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from laser.training import lease
from laser.training.run_folder import saved_step_folders
from tests.system import NAMESPACE, needs_mounts
from tests.training import runs


def test_workdir_of_another_config_is_refused_with_the_difference(arguments, tmp_path):
    short = [*arguments, "--config.training.steps=4"]
    assert runs.train(short, tmp_path).returncode == 0
    other = [*short, "--config.optimizer.learning_rate=0.02", "--config.attention.kind=standard"]
    refused = runs.train(other, tmp_path)
    assert refused.returncode == 2
    assert "optimizer.learning_rate: 0.01 -> 0.02" in refused.stderr
    assert "attention.kind: laser -> standard" in refused.stderr
    assert "--allow_config_change" in refused.stderr
    assert "Traceback" not in refused.stderr
    longer = [*arguments, "--config.training.steps=6"]
    allowed = runs.train(longer, tmp_path, "--allow_config_change")
    assert allowed.returncode == 0, allowed.stderr
    assert "  training.steps: 4 -> 6\n" in allowed.stdout
    assert sorted(runs.losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["training"]["steps"] == 6
    assert json.loads((tmp_path / "config.0.json").read_text())["config"]["training"]["steps"] == 4


def test_a_second_process_is_refused_while_one_trains(arguments, tmp_path):
    holder = "import os, sys; from laser.training import lease as r; from pathlib import Path"
    holder += "; r.claim(Path(sys.argv[1])); print(os.getpid(), flush=True); sys.stdin.read()"
    first = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        cwd=runs.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pid = first.stdout.readline().strip()
    refused = runs.train(arguments, tmp_path)
    assert refused.returncode == 2
    assert f"{tmp_path}: another process trains here (pid {pid} on" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    first.kill()
    first.communicate()
    lease.claim(tmp_path)  # killed, it holds nothing
    lease.claim(tmp_path)  # a process does not shut itself out


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(lease.fcntl, "flock", flock)
    lease.claim(tmp_path)
    assert "no locks there" in caplog.text


def test_ctrl_c_before_the_first_step_ends_in_one_line(arguments, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments, f"--workdir={tmp_path}"],
        cwd=runs.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "starting a new run" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert error.startswith("\nstopped; the same command goes on")
    assert error.count("\n") == 2


def test_corrupt_shard_is_named(arguments, store, tmp_path):
    spoilt = tmp_path / "store"
    shutil.copytree(store, spoilt)
    shard = spoilt / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    refused = runs.train([*arguments, f"--config.data.store={spoilt}"], tmp_path / "run")
    assert refused.returncode == 2
    assert str(shard) in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.model.vocab_size=200", "model.vocab_size=200: the tokenizer"),
        ("--config.data.seq_len=1000000", "data.seq_len=1000000: the train split"),
        ("--config.mesh.fsdp=3", "mesh.fsdp=3"),
        ("--config.data.store=/nowhere", "no such folder"),
    ],
)
def test_what_does_not_fit_together_is_named(arguments, tmp_path, override, message):
    refused = runs.train([*arguments, override], tmp_path / "run")
    assert refused.returncode == 2, refused.stdout
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_too_many_bad_steps_stop_the_run(arguments, tmp_path):
    wild = [
        *arguments,
        "--config.optimizer.learning_rate=1e30",
        "--config.training.max_skipped_steps=3",
        "--config.checkpoint.every=1",
        "--config.checkpoint.keep=2",
    ]
    stopped = runs.train(wild, tmp_path)
    assert stopped.returncode == 3
    words = "3 steps in a row had no update, the last for a loss or gradient that is not finite"
    assert words in stopped.stdout
    assert "lower optimizer.learning_rate" in stopped.stdout
    records = [json.loads(line) for line in (tmp_path / "skipped.jsonl").open()]
    assert len(records) == 3
    assert all(len(record["row_ids"]) == 8 for record in records)
    steps = {record["step"] for record in records}
    assert len(steps) == 3
    first = min(steps)  # what was good stays: nothing was saved from there on
    assert list(saved_step_folders(tmp_path)) == [s for s in (first - 2, first - 1) if s > 0]


NO_MEMORY_AT = """
from laser.training.program import Program
program_of = Program.__init__
def without_memory(self, *rest, **more):
    program_of(self, *rest, **more)
    step, steps = self.train_step, iter(range(1, 99))
    def step_or_fail(*arguments):
        if next(steps) == {step}:
            import jax
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for 3 GiB\\nmore")
        return step(*arguments)
    self.train_step = step_or_fail
Program.__init__ = without_memory
"""


@pytest.mark.parametrize(("step", "code"), [(1, 4), (3, 1)])
def test_memory_that_does_not_suffice_for_a_step(arguments, tmp_path, step, code):
    """Started again a process gets no further than its first step; a later one may have been bad
    luck."""
    arguments = [*arguments, "--config.training.accumulation=2", "--config.model.remat=dots"]
    stopped = runs.train(arguments, tmp_path, event=NO_MEMORY_AT.format(step=step))
    assert stopped.returncode == code, stopped.stderr
    assert "out of memory: RESOURCE_EXHAUSTED: no room for 3 GiB; --config.model.remat=full, " in (
        stopped.stdout
    )
    assert "--config.training.accumulation=4 (8, 16) or a layout of scripts/plan.py --search" in (
        stopped.stdout
    )


def test_memory_that_sufficed_before_may_suffice_again(arguments, tmp_path):
    """Of a process that goes on with a run, the launcher tries it once more."""
    assert runs.train(arguments, tmp_path, event=runs.SIGTERM_AFTER_7).returncode == 75
    stopped = runs.train(arguments, tmp_path, event=NO_MEMORY_AT.format(step=1))
    assert stopped.returncode == 1, stopped.stderr
    assert "out of memory: RESOURCE_EXHAUSTED" in stopped.stdout


SKIPPED_AT_8 = """
push_whatever_came = Report.push
def push_as_skipped(self, done, metrics, waited):
    if done == 8:
        metrics = {**metrics, "loss": float("nan"), "skipped_in_a_row": 1.0}
    push_whatever_came(self, done, metrics, waited)
Report.push = push_as_skipped
"""


def test_a_checkpoint_that_was_due_at_a_skipped_step_comes_after_it(arguments, tmp_path):
    flags = ["--config.checkpoint.every=4", "--config.checkpoint.keep=9"]
    done = runs.train([*arguments, *flags], tmp_path, event=SKIPPED_AT_8)
    assert done.returncode == 0, done.stderr
    assert "step 8 skipped (loss nan" in done.stdout
    assert list(saved_step_folders(tmp_path))[:4] == [4, 9, 12, 16]


def test_a_signal_at_a_skipped_step_saves_nothing(arguments, tmp_path):
    flags = ["--config.checkpoint.every=4", "--config.checkpoint.keep=9"]
    signalled = SKIPPED_AT_8 + runs.SIGTERM_AFTER_7.replace("== 7", "== 8")
    stopped = runs.train([*arguments, *flags], tmp_path, event=signalled)
    assert stopped.returncode == 75, stopped.stderr
    assert "steps were skipped, so not saved, step 8; start again to go on" in stopped.stdout
    assert list(saved_step_folders(tmp_path)) == [4]
    done = runs.train([*arguments, *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "after step 4" in done.stdout
    assert sorted(runs.losses(tmp_path)) == list(range(1, 21))


def test_truncated_checkpoint_falls_back_to_the_one_before(arguments, tmp_path):
    arguments = [*arguments, "--config.checkpoint.every=5"]
    assert runs.train([*arguments, "--config.training.steps=10"], tmp_path).returncode == 0
    for path in (tmp_path / "checkpoints" / "10" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:5000])
    resumed = runs.train([*arguments, "--config.training.steps=10"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "10 cannot be read" in resumed.stdout
    assert "Event loop is closed" not in resumed.stderr
    assert "after step 5" in resumed.stdout
    assert (tmp_path / "checkpoints" / "10").exists()


@needs_mounts
def test_full_disk_while_saving(arguments, tmp_path):
    """On a real full file system; test_checkpoint.py has a stand-in for elsewhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4m tmpfs {disk}"
    script = f'{mount}; "$@"; code=$?; ls {disk}/run/checkpoints; exit $code'
    failed = runs.train(
        [*arguments, "--config.checkpoint.every=5"],
        disk / "run",
        event=runs.FILL_DISK_BEFORE_SAVING_10,
        command=[*NAMESPACE, "sh", "-c", script, "sh"],
        env={"DISK": str(disk)},
    )
    assert failed.returncode == 1, failed.stderr
    assert "could not save a checkpoint" in failed.stdout
    assert "steps [5]" in failed.stdout
    assert "5" in failed.stdout.splitlines()
    assert "10" not in failed.stdout.splitlines()
