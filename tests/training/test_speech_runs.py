"""Runs of train.py on tones: killed and gone on with, and on two hosts."""

import numpy as np
import pytest

from data.speech.prepare import SpeechConfig, prepare
from laser.training.metrics import read_metrics
from tests.training import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Command line of a run of 20 steps, without --workdir."""
    folder = tmp_path_factory.mktemp("speech") / "tones"
    prepare(SpeechConfig("tones:10", "tones:6@1", vocab_size=12), folder)
    fields = {
        "model.num_layers": 1, "model.model_dim": 16, "model.mlp_dim": 32, "model.num_heads": 2,
        "model.dropout": 0.1, "data.store": folder, "optimizer.warmup_steps": 3,
        "training.steps": 20, "training.batch_size": 4, "training.log_every": 1,
        "training.eval_every": 20, "evaluation.every": 20, "checkpoint.every": 13,
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config=configs/tones.py:attention=laser", *overrides]


def scores(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    names = ("eval/loss", "eval/wer", "eval/loss/train", "eval/wer/train")
    return [tuple(line[name] for name in names) for line in lines if "eval/wer" in line]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = runs.train(arguments, workdir)
    assert done.returncode == 0, done.stderr
    assert sorted(runs.losses(workdir)) == list(range(1, 21))
    return workdir


def test_interrupted_run_is_bit_equal(arguments, whole, tmp_path):
    terminated = runs.train(arguments, tmp_path, event=runs.SIGTERM_AFTER_7)
    assert terminated.returncode == 75, terminated.stderr
    killed = runs.train(arguments, tmp_path, event=runs.KILL_IN_SAVE)  # steps are done twice
    assert killed.returncode == -9, killed.stderr
    resumed = runs.train(arguments, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 7" in resumed.stdout

    assert runs.losses(tmp_path) == runs.losses(whole)
    assert len(scores(whole)) == 1
    assert scores(tmp_path) == scores(whole)
    runs.assert_same_parameters(tmp_path, whole)


def test_two_hosts_equal_one(arguments, whole, tmp_path):
    done = runs.train_on_hosts(arguments, tmp_path, hosts=2, devices=1)
    assert [run.returncode for run in done] == [0, 0], [run.stderr for run in done]
    losses, expected = runs.losses(tmp_path), runs.losses(whole)
    for step in (1, 2, 3):
        np.testing.assert_allclose(losses[step], expected[step], rtol=2e-4)
    np.testing.assert_allclose(scores(tmp_path)[0][0], scores(whole)[0][0], rtol=0.05)
