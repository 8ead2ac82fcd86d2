"""A run with Muon, a held rate, a mixture and a limit of gradients: killed, and over two hosts."""

import itertools

import jax
import numpy as np
import pytest

from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare
from data.sources import corpus
from eval.run import open_model
from laser.training.metrics import read_metrics
from tests.once import once
from tests.training import runs


@pytest.fixture(scope="module")
def of_today(module_arguments, store, tmp_path_factory):
    def make(folder):
        text = folder / "text"
        text.mkdir()
        for i, chapter in enumerate(itertools.islice(corpus.documents("train"), 100, 120)):
            (text / f"{i:02}.txt").write_text(chapter)
        tokenizer = str(store / "tokenizer.model")
        prepare(
            StoreConfig(str(text), tokenizer=tokenizer, validation_fraction=0.1), folder / "other"
        )

    other = once(tmp_path_factory, "other-store-of-today", make) / "other"
    fields = {
        "data.store": f"{store}:0.7,{other}:0.3",
        "data.block_rows": 4,
        "model.num_kv_heads": 1,
        "model.mlp": "swiglu",
        "optimizer.name": "muon",
        "optimizer.schedule": "wsd",
        "optimizer.decay_steps": 8,
        "training.skip_gradient_norm": 20.0,
        "checkpoint.every": 13,
        "mesh.data": 1,
        "mesh.fsdp": 8,
    }
    return [*module_arguments, *(f"--config.{name}={value}" for name, value in fields.items())]


@pytest.fixture(scope="module")
def whole(of_today, tmp_path_factory):
    """(workdir, record) of a run on one host that nothing has disturbed."""

    def make(folder):
        (finished,) = runs.train_on_hosts(
            of_today, folder / "run", hosts=1, devices=8, record=folder / "record"
        )
        assert finished.returncode == 0, finished.stderr

    folder = once(tmp_path_factory, "whole-run-of-today", make)
    return folder / "run", folder / "record"


@pytest.mark.slow
def test_interrupted_run_is_bit_equal(of_today, whole, tmp_path):
    workdir, one_host = tmp_path / "run", {"hosts": 1, "devices": 8}
    (terminated,) = runs.train_on_hosts(of_today, workdir, **one_host, event=runs.SIGTERM_AFTER_7)
    assert terminated.returncode == 75, terminated.stderr
    (resumed,) = runs.train_on_hosts(of_today, workdir, **one_host)
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 7" in resumed.stdout

    assert runs.losses(workdir) == runs.losses(whole[0])
    final = [jax.tree.map(np.asarray, open_model(x, 20).params) for x in (workdir, whole[0])]
    jax.tree.map(np.testing.assert_array_equal, *final)


@pytest.mark.slow
def test_two_hosts_train_as_one(of_today, whole, tmp_path):
    workdir, record = tmp_path / "run", tmp_path / "record"
    finished = runs.train_on_hosts(of_today, workdir, hosts=2, devices=4, record=record)
    assert [process.returncode for process in finished] == [0, 0], finished[0].stderr
    assert runs.rows_read(record) == runs.rows_read(whole[1])
    ours, alone = runs.losses(workdir), runs.losses(whole[0])
    assert ours.keys() == alone.keys()
    np.testing.assert_allclose([*ours.values()], [*alone.values()], rtol=1e-5)


@pytest.mark.slow
def test_what_is_logged_of_a_mixture(whole, store):
    """Shares of the rows so far, and the loss by the shares that were asked for."""
    records = read_metrics(whole[0] / "metrics.jsonl")
    lines = [line for line in records if "loss" in line]
    for line in lines:
        rows = 8 * line["step"]
        assert abs(line[f"share/{store.name}"] * rows - 0.7 * rows) < 1
        assert line[f"share/{store.name}"] + line["share/other"] == pytest.approx(1)
    assert [line["learning_rate"] for line in lines[3:12]] == pytest.approx([0.01] * 9)
    final = [line for line in records if "eval/loss" in line][-1]
    losses = [final[f"eval/loss/{name}"] for name in (store.name, "other")]
    assert losses[0] != losses[1]
    assert final["eval/loss"] == pytest.approx(0.7 * losses[0] + 0.3 * losses[1])
    assert final["eval/bits_per_byte"] > 0
