"""A run that was interrupted and killed is, bit for bit, the run that was not."""

import json

import numpy as np
import pytest

from configs import base
from laser.training.config import load_config
from laser.training.metrics import read_metrics
from laser.training.rows import StoreRows
from laser.training.run_folder import saved_step_folders
from tests.training import runs


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, accumulation", [("adamw", 1), ("lamb", 4)])
def test_interrupted_run_is_bit_equal(arguments, tmp_path, optimizer, accumulation):
    arguments = [
        *arguments,
        f"--config.optimizer.name={optimizer}",
        f"--config.training.accumulation={accumulation}",
        "--config.checkpoint.every=13",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runs.train(arguments, whole).returncode == 0

    terminated = runs.train(arguments, parts, event=runs.SIGTERM_AFTER_7)
    assert terminated.returncode == 75, terminated.stderr
    assert sorted(runs.losses(parts)) == [1, 2, 3, 4, 5, 6, 7]
    killed = runs.train(arguments, parts, event=runs.KILL_IN_SAVE)
    assert killed.returncode == -9, killed.stderr
    assert sorted(runs.losses(parts))[-1] == 13
    assert not (parts / "checkpoints" / "13").exists()
    resumed = runs.train(arguments, parts)
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 7" in resumed.stdout

    assert runs.losses(parts) == runs.losses(whole)
    assert sorted(runs.losses(whole)) == list(range(1, 21))
    runs.assert_same_parameters(parts, whole)


@pytest.mark.slow
def test_signals_in_evaluations_and_closed_terminals_change_nothing(arguments, tmp_path):
    """Ends in the evaluation of step 10, by a terminal that goes, in the last evaluation, and goes
    on without anybody who reads its output."""
    arguments = [
        *arguments, "--config.training.eval_every=10", "--config.checkpoint.every=10",
        "--config.checkpoint.best=loss",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runs.train(arguments, whole).returncode == 0
    in_evaluation = runs.SIGTERM_IN_EVALUATION_AFTER
    ended = runs.train(arguments, parts, event=in_evaluation.format(step=10))
    assert ended.returncode == 75, ended.stderr
    # Made up for, and lost with all that was since: it is not made again.
    killed = runs.SIGHUP_AFTER_13.replace("pid(), signal.SIGHUP", "pid(), signal.SIGKILL")
    assert runs.train(arguments, parts, event=killed).returncode == -9
    assert scores(parts) == scores(whole)[:1]
    for event, step in (
        (runs.SIGHUP_AFTER_13, 13),
        (in_evaluation.format(step=20), 20),
    ):
        ended = runs.train(arguments, parts, event=event)
        assert ended.returncode == 75, ended.stderr
        assert f"saved step {step}" in ended.stdout
        assert "damaged" not in ended.stdout
        assert sorted(runs.losses(parts)) == list(range(1, step + 1))
    assert step in saved_step_folders(parts)
    unread = ["bash", "-c", '"$@" > >(exec >&-) 2>&1', "bash"]
    assert runs.train(arguments, parts, command=unread).returncode == 0
    again = runs.train(arguments, parts)
    assert "nothing left to do" in again.stdout

    assert scores(parts) == scores(whole)
    assert [step for step, _ in scores(whole)] == [10, 20]
    assert runs.losses(parts) == runs.losses(whole)
    assert list(saved_step_folders(parts)) == [10, 20]
    for step in (10, 20):
        paths = [folder / f"checkpoints/{step}/metrics/metrics" for folder in (parts, whole)]
        ours, theirs = (json.loads(path.read_text()) for path in paths)
        assert ours == theirs
    runs.assert_same_parameters(parts, whole)


def scores(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line]


def test_a_finished_run_stays_as_it_is(arguments, tmp_path):
    assert runs.train(arguments, tmp_path).returncode == 0
    before = runs.losses(tmp_path)
    again = runs.train(arguments, tmp_path)
    assert again.returncode == 0
    assert "nothing left to do" in again.stdout
    assert runs.losses(tmp_path) == before


def test_the_order_of_rows_depends_on_its_own_seed_and_the_step_alone(store):
    """No attention, optimizer, other seed or history enters it."""

    def inputs(start=0, **fields):
        config = base.get_config()
        config.data.update(store=str(store), seq_len=32)
        config.training.update(batch_size=8, steps=20)
        config.optimizer.warmup_steps = 0
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
        loaded = load_config(config)
        rows = StoreRows(loaded)
        with rows.train_batches(loaded, start, None) as batches:
            found = {step: np.asarray(batch["inputs"]) for step, batch in batches}
        assert sorted(found) == list(range(start, 20))
        return found

    whole = inputs()
    for start, fields in (
        (0, {"attention__kind": "standard", "training__seed": 7}),
        (0, {"optimizer__name": "lamb", "model__num_layers": 2}),
        (13, {}),
    ):
        for step, found in inputs(start, **fields).items():
            np.testing.assert_array_equal(found, whole[step])
    assert not np.array_equal(inputs(data__shuffle_seed=1)[0], whole[0])
