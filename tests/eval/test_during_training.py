"""The tasks as an evaluation of a run: the same numbers as from its checkpoint."""

import pytest

from eval import oneshot
from eval.during_training import make_evaluation
from eval.oneshot import Settings
from eval.run import open_model
from eval.tasks import OFFLINE
from laser.training import sharding


def test_metrics_are_those_of_the_checkpoint(trained_run):
    model = open_model(trained_run)
    settings = Settings(shots=0, limit=20)
    mesh = sharding.make_mesh(model.config)
    evaluate = make_evaluation(
        model.config, mesh, model.tokenizer, OFFLINE.name, settings, data_dir=None
    )
    data = oneshot.load_task(OFFLINE, settings, None)
    result = oneshot.evaluate_task(data, settings, model.scorer, model.params, model.tokenizer)
    expected = result["metrics"]["accuracy"]["mean"]
    assert evaluate(model.params) == {"eval/held_out/accuracy": expected}
    assert evaluate(model.params) == {"eval/held_out/accuracy": expected}


def test_what_is_missing_is_said_before_training(trained_run, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    model = open_model(trained_run)
    parts = (model.config, sharding.make_mesh(model.config), model.tokenizer)
    for tasks, message in (("copaa", "did you mean 'copa'"), ("copa", "no data of super_glue")):
        with pytest.raises(ValueError, match=message):
            make_evaluation(*parts, tasks, Settings(), tmp_path)
