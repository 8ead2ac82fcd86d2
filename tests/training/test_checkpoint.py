"""Checkpoints: what is read is what was written, or it is not read at all."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import base
from data.sealed import seal
from laser.training import checkpoint
from laser.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    restore_parameters,
    saved_steps,
)
from laser.training.config import load_config
from laser.training.step import TrainState
from tests.training import runs

REPLICATED = PartitionSpec()
CONFIG = load_config(base.get_config()).checkpoint


def make_state(step):
    rng = np.random.default_rng(step)
    params = {
        "blocks": {"up": jnp.float32(rng.normal(size=(8, 300)))},
        "b": jnp.arange(16.0) + step,
    }
    moments = jax.tree.map(lambda x: x * 0.1, params)
    zero = jnp.int32(0)
    return TrainState(jnp.int32(step), params, (moments,), zero, zero, jnp.ones(16))


def abstract(state, spec=REPLICATED):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))

    def leaf(x):
        sharding = NamedSharding(mesh, spec if x.ndim else PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state)


def save(workdir, *steps, config=CONFIG):
    with Checkpoints(workdir, config) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def restore(workdir, spec=REPLICATED):
    with Checkpoints(workdir, CONFIG) as checkpoints:
        return checkpoints.restore_latest(abstract(make_state(0), spec))


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("x"), PartitionSpec(("x", "y"))])
def test_round_trip_onto_any_mesh(tmp_path, spec):
    save(tmp_path, 5)
    state = restore(tmp_path, spec)
    assert_equal(state, make_state(5))
    assert state.params["b"].sharding.spec == spec


def test_no_checkpoint_is_no_error(tmp_path):
    assert restore(tmp_path) is None


def test_retention_by_count_and_by_period(tmp_path):
    config = load_config(base.get_config())
    config = dataclasses.replace(config.checkpoint, keep=2, keep_period=4)
    save(tmp_path, *range(1, 10), config=config)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [4, 8, 9]


def best_config(best, keep=1):
    config = load_config(base.get_config()).checkpoint
    return dataclasses.replace(config, keep=keep, best=best)


@pytest.mark.parametrize(
    ("best", "values", "kept"),
    [
        ("loss", [3.0, 1.0, 2.0, 2.5], [2, 4]),
        ("decoding_accuracy", [0.1, 0.5, 0.5, 0.2], [3, 4]),  # of equals the newest
        ("decoding_accuracy", [0.1, 0.2, 0.3, 0.4], [4]),
        ("decoding_accuracy", [0.9, None, 0.3, None], [1, 4]),  # None: not evaluated
        ("loss", [3.0, 1.0, float("nan"), 2.0], [2, 4]),
    ],
)
def test_the_best_is_kept_beside_the_newest_also_over_restarts(tmp_path, best, values, kept):
    for step, value in enumerate(values, start=1):
        with Checkpoints(tmp_path, best_config(best)) as checkpoints:
            metrics = {"eval/other": 9.0} if value is None else {f"eval/{best}": value}
            checkpoints.save(step, make_state(step), metrics)
            checkpoints.wait()
            found = checkpoints.best()
    assert saved_steps(tmp_path) == kept
    assert found == (kept[0], values[kept[0] - 1])
    assert_equal(restore(tmp_path), make_state(4))


def test_the_best_may_be_told_by_something_else_than_before(tmp_path):
    with Checkpoints(tmp_path, best_config("loss")) as checkpoints:
        checkpoints.save(1, make_state(1), {"eval/loss": 1.0})
        checkpoints.wait()
    with Checkpoints(tmp_path, best_config("decoding_accuracy")) as checkpoints:
        assert checkpoints.best() is None
        for step, value in ((2, 0.5), (3, 0.4)):
            checkpoints.save(step, make_state(step), {"eval/decoding_accuracy": value})
        checkpoints.wait()
        assert checkpoints.best() == (2, 0.5)
    assert saved_steps(tmp_path) == [2, 3]


def test_without_a_metric_there_is_no_best(tmp_path):
    with Checkpoints(tmp_path, best_config("loss", keep=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step))
        checkpoints.wait()
        assert checkpoints.best() is None
    assert saved_steps(tmp_path) == [2, 3]
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        saved_steps(tmp_path / "nowhere")


def data_files(workdir, step):
    files = [p for p in (workdir / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()]
    return sorted(files, key=lambda p: p.stat().st_size)


def test_truncated_checkpoint_falls_back_and_says_so(tmp_path, caplog):
    save(tmp_path, 5, 10)
    largest = data_files(tmp_path, 10)[-1]
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert_equal(restore(tmp_path), make_state(5))
    assert "cannot be read" in caplog.text
    assert "10.unreadable" in caplog.text
    assert (tmp_path / "10.unreadable").is_dir()
    save(tmp_path, 10)  # the place is free again
    assert_equal(restore(tmp_path), make_state(10))


@pytest.mark.slow
def test_one_flipped_bit_is_noticed(tmp_path):
    """Wherever it is in the tensors' files: what is read is right, or it is refused.

    All of them, since what Orbax puts into which one differs from save to save.
    """
    save(tmp_path, 5)
    wanted = abstract(make_state(0)).params
    refused = 0
    for path in (path for path in data_files(tmp_path, 5) if path.parent.name == "d"):
        content = path.read_bytes()
        for place in range(len(content) // 48, len(content), max(1, len(content) // 24)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
            try:
                params = restore_parameters(tmp_path, wanted)
            except CheckpointError:
                refused += 1
            else:
                assert_equal(params, make_state(5).params)  # the bit was of an optimizer's moment
        path.write_bytes(content)
    assert refused >= 5


def test_damage_that_only_a_checksum_sees_falls_back(tmp_path, caplog):
    save(tmp_path, 5, 10)
    record = tmp_path / "checkpoints" / "10" / "record" / "metadata"
    content = json.loads(record.read_text())
    content["tensors"]["params/b"]["sum"] += 1
    record.write_text(json.dumps(seal(content)))
    assert_equal(restore(tmp_path), make_state(5))
    assert "checksum of params/b differs" in caplog.text


def test_nothing_readable_is_an_error_every_time_and_not_a_fresh_start(tmp_path):
    save(tmp_path, 5, 10)
    for step in (5, 10):
        for path in data_files(tmp_path, step):
            path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none of the checkpoints \[5, 10\]"):
            restore(tmp_path)
    assert saved_steps(tmp_path) == [5, 10]
    shutil.move(tmp_path / "checkpoints" / "5", tmp_path / "5.unreadable")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"lost its checkpoints \(5.unreadable was set aside"):
        restore(tmp_path)
    shutil.rmtree(tmp_path / "5.unreadable")
    with pytest.raises(CheckpointError, match=r"lost its checkpoints \(there is a file .saved"):
        restore(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        ValueError("RESOURCE_EXHAUSTED: no memory"),
        ValueError("PERMISSION_DENIED: /x"),
        OSError("this disk is broken"),
        jax.errors.JaxRuntimeError("INTERNAL: a device is lost"),
    ],
    ids=lambda error: f"{error}"[:12],
)
def test_errors_that_are_not_of_a_checkpoint_leave_it_in_place(tmp_path, monkeypatch, error):
    save(tmp_path, 5, 10)

    def fail(*_):
        raise ValueError("could not read") from error

    monkeypatch.setattr(checkpoint, "_read_tensors", fail)
    with pytest.raises(CheckpointError, match=r"10 could not be read: .*left where it is"):
        restore(tmp_path)
    monkeypatch.undo()
    assert saved_steps(tmp_path) == [5, 10]
    assert_equal(restore(tmp_path), make_state(10))


def test_a_state_of_another_model_is_refused_before_anything_is_read(tmp_path):
    save(tmp_path, 5, 10)
    other = abstract(make_state(0))
    other = other._replace(params=other.params | {"c": other.params["b"]})
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.raises(CheckpointError) as refused:
            checkpoints.restore_latest(other)
    assert "params/c is absent there and float32[16] here" in str(refused.value)
    assert saved_steps(tmp_path) == [5, 10]


def test_a_checkpoint_that_was_set_aside_before_is_kept(tmp_path):
    save(tmp_path, 5, 10)
    for _ in range(2):
        largest = data_files(tmp_path, 10)[-1]
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
        assert_equal(restore(tmp_path), make_state(5))
        save(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.glob("*.unreadable")) == [
        "10.1.unreadable", "10.unreadable",
    ]  # fmt: skip


def test_saves_out_of_turn_push_no_others_out(tmp_path):
    config = dataclasses.replace(CONFIG, keep=2)
    kept = []
    for step, interim in ((4, 0), (5, 1), (7, 1), (8, 0), (9, 1), (11, 1), (12, 0)):
        with Checkpoints(tmp_path, config) as checkpoints:  # as a process that is ended each time
            checkpoints.save(step, make_state(step), interim=bool(interim))
        kept.append(saved_steps(tmp_path))
    assert kept == [[4], [4, 5], [4, 7], [4, 8], [4, 8, 9], [4, 8, 11], [8, 12]]


def test_metrics_that_come_later_count_for_the_best(tmp_path):
    with Checkpoints(tmp_path, best_config("loss")) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        checkpoints.add_score(1, {"eval/loss": 2.0})
        assert checkpoints.best() == (1, 2.0)
        checkpoints.save(2, make_state(2), {"eval/loss": 3.0})
        checkpoints.wait()
        assert checkpoints.best() == (1, 2.0)
    assert saved_steps(tmp_path) == [1, 2]
    assert_equal(restore(tmp_path), make_state(2))


def test_parameters_alone(tmp_path):
    save(tmp_path, 5, 10)
    wanted = abstract(make_state(0)).params
    assert_equal(restore_parameters(tmp_path, wanted), make_state(10).params)
    assert_equal(restore_parameters(tmp_path, wanted, 5), make_state(5).params)
    with pytest.raises(CheckpointError, match=r"no checkpoint 7 in .*there are \[5, 10\]"):
        restore_parameters(tmp_path, wanted, 7)


NO_FOLDER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from laser.training.checkpoint import CheckpointError, Checkpoints
from tests.training.test_checkpoint import CONFIG, make_state
workdir, mkdir = Path({workdir!r}), os.mkdir
def no_space(path, *rest, **more):
    if "10.orbax" in str(path):
        raise OSError(28, "No space left on device")
    mkdir(path, *rest, **more)
os.mkdir = no_space
try:
    with Checkpoints(workdir, CONFIG) as checkpoints:
        checkpoints.save(5, make_state(5))
        checkpoints.wait()
        checkpoints.save(10, make_state(10))
        checkpoints.wait()
except CheckpointError as error:
    print(error)
    sys.exit(1)
"""


def assert_second_save_fails(script, workdir, seconds):
    """In a process of its own, which ends, and says that the checkpoint of step 5 is left."""
    root = str(Path(__file__).resolve().parents[2])
    script = script.format(root=root, workdir=str(workdir))
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=seconds, check=False
    )
    assert process.returncode == 1, process.stderr
    assert "could not save a checkpoint" in process.stdout
    assert "steps [5]" in process.stdout


@pytest.mark.slow
def test_a_process_ends_where_a_folder_for_a_save_could_not_be_made(tmp_path):
    """Threads that wait for that folder must not keep it: they would do so for 20 minutes."""
    assert_second_save_fails(NO_FOLDER, tmp_path, seconds=200)


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from laser.training.checkpoint import CheckpointError, Checkpoints
from tests.training.test_checkpoint import CONFIG, make_state
workdir = Path({workdir!r})
with Checkpoints(workdir, CONFIG) as checkpoints:
    checkpoints.save(5, make_state(5))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    try:
        checkpoints.save(10, make_state(10))
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
        sys.exit(1)
"""


@pytest.mark.slow
def test_failed_write_leaves_the_older_checkpoint(tmp_path):
    """A limit on the size of files stands in for a full disk: writing fails in the same call."""
    assert_second_save_fails(FULL_DISK, tmp_path, seconds=120)
    assert_equal(restore(tmp_path), make_state(5))


def test_a_save_asks_nothing_of_the_preemption_service(tmp_path, monkeypatch):
    """It counts calls: one with another number, and a signal may be lost."""

    def asked(step):
        raise AssertionError(f"asked at {step}")

    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", asked)
    save(tmp_path, 3)
    assert saved_steps(tmp_path) == [3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [b'{"eval/loss": 5.2\0\0\0\0}', b"", b"[]", b'{"eval/loss": "a"}']
)
def test_a_damaged_score_does_not_end_a_run(arguments, tmp_path, content):
    arguments = [
        *arguments, "--config.checkpoint.every=4", "--config.training.eval_every=4",
        "--config.checkpoint.best=loss",
    ]  # fmt: skip
    assert runs.train(arguments, tmp_path, event=runs.SIGTERM_AFTER_7).returncode == 75
    (tmp_path / "checkpoints/4/metrics/metrics").write_bytes(content)
    done = runs.train(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checkpoints/4/metrics/metrics is damaged" in done.stdout
    assert sorted(runs.losses(tmp_path)) == list(range(1, 21))
