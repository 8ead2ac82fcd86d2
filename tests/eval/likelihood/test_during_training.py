"""The tasks as an evaluation of a run: the same numbers as from its checkpoint, and nothing else
changes."""

import dataclasses
import json

import pytest

from data.tokenizer import Tokenizer
from eval.likelihood import oneshot
from eval.likelihood.during_training import load_tasks, make_evaluation
from eval.likelihood.oneshot import Settings
from eval.run import open_model
from eval.tasks.catalogue import OFFLINE
from laser.training import sharding
from laser.training.run_folder import load_run_config
from tests.eval.conftest import small_run
from tests.eval.tasks.test_prompts import RAW
from tests.training import runs


@pytest.fixture
def tokenizer(store):
    return Tokenizer(store / "tokenizer.model")


def with_evaluation(config, **fields):
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **fields))


@pytest.mark.slow
def test_metrics_are_those_of_the_checkpoint(trained_run, tokenizer):
    model = open_model(trained_run)
    config = with_evaluation(model.config, tasks=OFFLINE.name, shots=0, limit=20)
    data = load_tasks(config, tokenizer)
    evaluate = make_evaluation(config, sharding.make_mesh(config), tokenizer, data)
    result = oneshot.evaluate_task(
        data[0], Settings(shots=0, limit=20), model.scorer, model.params, tokenizer
    )
    expected = result["metrics"]["accuracy"]["mean"]
    assert evaluate(model.params) == {"eval/held_out/accuracy": expected}
    assert evaluate(model.params) == {"eval/held_out/accuracy": expected}


@pytest.mark.slow
def test_a_run_writes_them_beside_its_loss_and_trains_the_same(trained_run, store, tmp_path):
    evaluated = tmp_path / "evaluated"
    done = runs.train(
        [
            *small_run(store),
            "--config.evaluation.tasks=held_out",
            "--config.evaluation.shots=0",
            "--config.evaluation.limit=8",
            "--config.evaluation.every=3",
        ],
        evaluated,
    )
    assert done.returncode == 0, done.stderr
    assert "held_out/accuracy 0." in done.stdout
    records = [json.loads(line) for line in (evaluated / "metrics.jsonl").open()]
    scores = {r["step"]: r for r in records if "eval/held_out/accuracy" in r}
    assert sorted(scores) == [3, 4]
    assert "eval/loss" not in scores[3]
    assert "eval/loss" in scores[4]  # one record for a step's evaluations
    assert runs.losses(evaluated) == runs.losses(trained_run)
    model = open_model(evaluated)
    data = load_tasks(model.config, model.tokenizer)
    evaluate = make_evaluation(
        model.config, sharding.make_mesh(model.config), model.tokenizer, data
    )
    assert evaluate(model.params)["eval/held_out/accuracy"] == scores[4]["eval/held_out/accuracy"]


def test_what_is_missing_is_said_before_training(trained_run, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = load_run_config(str(trained_run))
    for fields, message in (
        ({"tasks": "copaa"}, "evaluation.tasks=copaa: .*did you mean 'copa'"),
        ({"tasks": "copa"}, "no data of super_glue.* in --config.evaluation.data_dir"),
        ({"tasks": "copa", "data_dir": "/nowhere"}, "data_dir=/nowhere: no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tasks(with_evaluation(config, **fields), tokenizer)
    short = dataclasses.replace(config.data, seq_len=4)
    config = with_evaluation(dataclasses.replace(config, data=short), tasks="held_out", shots=0)
    with pytest.raises(ValueError, match=r"held_out: .* row 1: .* more than the model's 4"):
        load_tasks(config, tokenizer)


def test_no_train_split_is_scored_and_another_that_stands_in_is_named(
    trained_run, tokenizer, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    wanted = {"tasks": "arc_easy", "data_dir": str(tmp_path), "shots": 0}
    config = with_evaluation(load_run_config(str(trained_run)), **wanted)
    row = json.dumps(RAW["arc_easy"]) + "\n"
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy/train.jsonl").write_text(row)
    with pytest.raises(ValueError, match=r"evaluation.tasks=arc_easy: no data .*ARC-Easy-Test.jso"):
        load_tasks(config, tokenizer)
    (tmp_path / "arc_easy/validation.jsonl").write_text(row)
    caplog.set_level("INFO")
    (data,) = load_tasks(config, tokenizer)
    assert data.split == "validation"
    said = f"({tmp_path}/arc_easy/validation.jsonl), as there is no test split"
    assert f"arc_easy: the validation split is scored {said}" in caplog.text
    caplog.clear()
    (tmp_path / "arc_easy/test.jsonl").write_text(row)
    load_tasks(config, tokenizer)
    assert not caplog.text


@pytest.mark.slow
def test_a_mistake_leaves_with_2_and_no_folder(store, tmp_path):
    refused = runs.train([*small_run(store), "--config.evaluation.tasks=copaa"], tmp_path / "run")
    assert refused.returncode == 2
    assert "did you mean 'copa'" in refused.stderr
    assert not (tmp_path / "run").exists()
