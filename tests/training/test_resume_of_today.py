"""A run with Muon, a held rate, a mixture and a limit of gradients, killed, goes on bit for bit."""

import itertools

import jax
import numpy as np
import pytest

from data import corpus
from data.config import StoreConfig
from data.prepare import prepare
from eval.run import open_model
from laser.training.metrics import read_metrics
from tests.training import runs


@pytest.mark.slow
def test_interrupted_run_is_bit_equal(arguments, store, tmp_path):
    text, other = tmp_path / "text", tmp_path / "other"
    text.mkdir()
    for i, chapter in enumerate(itertools.islice(corpus.documents("train"), 100, 120)):
        (text / f"{i:02}.txt").write_text(chapter)
    tokenizer = str(store / "tokenizer.model")
    prepare(StoreConfig(str(text), tokenizer=tokenizer, validation_fraction=0.1), other)
    fields = {
        "data.store": f"{store}:0.7,{other}:0.3",
        "model.num_kv_heads": 1,
        "model.mlp": "swiglu",
        "optimizer.name": "muon",
        "optimizer.schedule": "wsd",
        "optimizer.decay_steps": 8,
        "training.skip_gradient_norm": 20.0,
        "checkpoint.every": 13,
    }
    arguments = [*arguments, *(f"--config.{name}={value}" for name, value in fields.items())]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished = runs.train(arguments, whole)
    assert finished.returncode == 0, finished.stderr
    terminated = runs.train(arguments, parts, event=runs.SIGTERM_AFTER_7)
    assert terminated.returncode == 75, terminated.stderr
    resumed = runs.train(arguments, parts)
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 7" in resumed.stdout

    assert runs.losses(parts) == runs.losses(whole)
    final = [jax.tree.map(np.asarray, open_model(folder, 20).params) for folder in (parts, whole)]
    jax.tree.map(np.testing.assert_array_equal, *final)
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if "loss" in line]
    for line in lines:
        rows = 8 * line["step"]
        assert abs(line[f"share/{store.name}"] * rows - 0.7 * rows) < 1
        assert line[f"share/{store.name}"] + line["share/other"] == pytest.approx(1)
    assert [line["learning_rate"] for line in lines[3:12]] == pytest.approx([0.01] * 9)
