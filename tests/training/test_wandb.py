"""Weights & Biases beside the other writers, without a network."""

import struct
import sys
import time

import pytest

from laser.training import wandb_writer
from laser.training.records import Records
from tests.training import runs


def logged(path):
    """The records of a file of W&B, one after the other: in LevelDB's form, after 7 bytes."""
    content, place = path.read_bytes(), 7
    assert len(content) < 32768, "more than one block"
    while place < len(content):
        _, size, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1, "a record in parts"
        yield content[place + 7 : place + 7 + size]
        place += 7 + size


def told(folder):
    """Ids, and steps with their losses, of all files of W&B below a run's folder."""
    from wandb.proto import wandb_internal_pb2

    ids, losses = set(), []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in logged(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: item.value_json
                         for item in record.history.item}  # fmt: skip
                losses.append((int(items["_step"]), float(items["loss"])))
    return ids, losses


@pytest.mark.slow
def test_a_run_is_told_in_full(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (1, 3):  # a restart that does steps again
        time.sleep(1)  # a folder is named by its second: two of one second would be one
        writer = wandb_writer.WandbWriter("p", Records(tmp_path), {"model": {"layers": 2}})
        for step in range(start, start + 3):
            writer.write(step, {"loss": 1 / step})
        writer.close()
    expected = [(step, 1 / step) for step in (1, 2, 3, 3, 4, 5)]
    deadline = time.monotonic() + 60
    while (found := told(tmp_path))[1] != expected and time.monotonic() < deadline:
        time.sleep(0.2)  # a process of W&B's writes, and may be later than the run
    ids, losses = found
    assert ids == {(tmp_path / "wandb-id").read_text()}
    assert losses == expected


def test_a_project_without_the_package_is_a_mistake(monkeypatch):
    wandb_writer.check_installed("")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(wandb_writer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"training.wandb_project=p: .*requirements-wandb.txt"):
        wandb_writer.check_installed("p")


def test_what_weights_and_biases_refuses_is_told_in_a_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**options):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(OSError, match=r"training.wandb_project=p: No API key configured\.; log in"):
        wandb_writer.WandbWriter("p", Records(tmp_path), {})


@pytest.mark.slow
def test_a_run_writes_there_if_it_is_told_to(arguments, tmp_path):
    pytest.importorskip("wandb")
    done = runs.train(
        arguments, tmp_path, "--config.training.wandb_project=p", "--config.training.steps=3",
        env={"WANDB_MODE": "offline"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1
