"""A study of real runs that is killed twice on its way to the report, and what looks at a run."""

import json
import math
import os
import time

import numpy as np
import pytest

from laser.training import versions
from scripts import evaluate, inspect_attention
from study import measure
from study.plan import Plan
from study.results import read
from tests import forked
from tests.eval.tasks.test_prompts import RAW
from tests.quick import QUICK_TO_COMPILE
from tests.training.runs import train

STUDY = """
from configs import quickstart
from configs.study import Comparison, Stage, Study

def get_config(arguments=""):
    config = quickstart.get_config(arguments)
    for name, value in {fields}.items():
        section, field = name.split(".")
        config[section][field] = value
    return config

def get_study():
    stages = [
        Stage("main", {{"attention": ("standard", "laser")}}),
        Stage("wild", {{"optimizer.learning_rate": (1e38,)}}, {{"training.max_skipped_steps": 1}}),
    ]
    compare = Comparison("main", {{"attention": "laser"}}, {{"attention": "standard"}})
    return Study(stages, [compare])
"""
# The study's own process, forked; those that it starts have Pythons of their own.
SCRIPT = """
import runpy, sys
from study import run
run.POLL = 0.1
sys.argv[0] = "scripts/study.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FIRST, SECOND = "main/attention=standard", "main/attention=laser"


@pytest.fixture(scope="module")
def study(tmp_path_factory, module_arguments):
    """The file of a study of tiny runs."""
    pairs = [flag.removeprefix("--config.").split("=") for flag in module_arguments[1:]]
    fields = {name: value if "store" in name else json.loads(value) for name, value in pairs}
    file = tmp_path_factory.mktemp("study") / "tiny.py"
    file.write_text(STUDY.format(fields=fields | {"checkpoint.every": 5, "checkpoint.keep": 2}))
    return file


@pytest.fixture(scope="module")
def alone(study, tmp_path_factory):
    """The second run of the study, trained by its command without the study."""
    plan = Plan(str(study))
    cell = plan.cells(plan.study.stages[0], lambda cell: None)[1]
    assert cell.key == SECOND
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train(cell.flags(), folder).returncode == 0
    return folder


def _wait_for(path, process):
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.exitcode is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _final_loss(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["eval/loss"] for line in lines if "eval/loss" in line][-1]


def test_killed_twice_on_the_way_to_its_report(study, alone, tmp_path):
    output = tmp_path / "out"
    said = tmp_path / "said"

    def start():
        environment = {**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE}  # one device, as in `train`
        arguments = [f"--study={study}", f"--output={output}"]
        return forked.start(SCRIPT, arguments, environment, said, said)

    first = start()
    _wait_for(output / FIRST / "metrics.jsonl", first)
    first.kill()
    first.join()
    second = start()
    _wait_for(output / SECOND / "metrics.jsonl", second)
    second.terminate()
    second.join(300)
    assert second.exitcode == 75
    last = start()
    last.join(600)
    assert last.exitcode == 0, said.read_text()

    results = {path.parent.name: read(path.parent) for path in output.glob("*/*/result.json")}
    failed = results.pop("learning_rate=1e+38")
    assert failed["status"] == "failed"
    assert "not finite" in failed["reason"]
    assert str(output) not in failed["reason"]
    assert [result["status"] for result in results.values()] == ["done"] * 2
    laser = results["attention=laser"]["eval_loss"]
    assert laser == _final_loss(alone)
    report = (output / "report.md").read_text()
    difference = laser - results["attention=standard"]["eval_loss"]
    assert f"| 1 | {difference:+.4f} | – |" in report
    assert failed["reason"] in report


def test_a_run_says_what_it_was_trained_by(alone):
    said = json.loads((alone / "versions.json").read_text())
    assert (said["machine"], said["devices"]) == (versions.machine(), "1 cpu")
    assert said["packages"] == versions.packages()
    assert said["commit"]


def test_bits_per_byte_of_held_out_text(alone, tmp_path):
    held_out = "In the beginning God created the heaven and the earth. "
    for name, times in (("once", 1), ("often", 9)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": held_out * times}))
    assert measure.main([f"--run={alone}", f"--held_out={tmp_path}", "domains"]) == 0
    measured = json.loads((alone / "measured.json").read_text())["domains"]
    assert list(measured) == ["often", "once"]
    assert 1 < measured["often"] < 8
    # A text of one row, by the logits of the model itself.
    import jax
    from flax import nnx

    from eval.run import open_model
    from models.families import structure

    trained = open_model(alone)
    ids = trained.tokenizer.encode(held_out)
    tokens = np.array([[trained.tokenizer.eos_id, *ids, trained.tokenizer.eos_id]])
    model = nnx.merge(structure(trained.config.model), trained.params)
    log_probs = jax.nn.log_softmax(model.logits(model(tokens[:, :-1])[0]))
    nats = -np.take_along_axis(np.asarray(log_probs), tokens[:, 1:, None], -1).sum()
    assert tokens.shape[1] - 1 <= trained.config.data.seq_len
    bits = nats / math.log(2) / len(held_out.encode())
    assert measured["once"] == pytest.approx(bits, rel=1e-5)


def test_one_shot_accuracy_is_that_of_evaluate(alone, tmp_path, capsys, monkeypatch):
    for folder, name in (("COPA", "copa"), ("CB", "cb")):
        (tmp_path / folder).mkdir()
        for split in ("train", "val"):
            lines = [json.dumps({**RAW[name], "premise": f"{split} {i}."}) for i in range(3)]
            (tmp_path / folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    arguments = [f"--run={alone}", "--tasks=copa,cb", f"--data_dir={tmp_path}", "oneshot"]
    assert measure.main(arguments) == 0
    measured = json.loads((alone / "measured.json").read_text())["oneshot"]
    step = max(int(path.name) for path in (alone / "checkpoints").iterdir() if path.name.isdigit())
    evaluating = [f"--workdir={alone}", "--tasks=copa,cb", f"--data_dir={tmp_path}"]
    elsewhere = tmp_path / "elsewhere"
    assert evaluate.main([*evaluating, f"--output={elsewhere}"]) == 0  # anew
    written = json.loads((elsewhere / f"{step}/gpt3-1shot-5seeds/results.json").read_text())
    scores = {
        task: written["tasks"][task]["metrics"]["accuracy"]["mean"] for task in ("copa", "cb")
    }
    assert measured["tasks"] == scores
    assert measured["mean"] == sum(scores.values()) / 2
    capsys.readouterr()
    assert evaluate.main(evaluating) == 0
    assert capsys.readouterr().out.count("reused: the same rows and checkpoint") == 2
    monkeypatch.setattr(evaluate.oneshot, "evaluate_task", None)  # and the other way round
    assert measure.main(arguments) == 0
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    assert measure.main([*arguments[:2], "oneshot"]) == 2
    assert "no data of super_glue/copa" in capsys.readouterr().err


def test_inspection_is_of_one_row_and_layer_at_a_time(alone):
    """The errors are those of each row by itself, and their mean and deviation over all."""
    from eval.run import open_model
    from study import inspection

    trained = open_model(alone)
    model, params = trained.config.model, trained.params
    tokens = np.arange(3 * 32).reshape(3, 32) % 100
    captured = list(inspection.capture(model, params, tokens))
    assert len(captured) == model.num_layers * 3
    assert all(x.shape[:2] == (1, 32) for maps in captured for arrays in maps for x in arrays)
    errors = inspection.reconstruction(model, captured)
    for name, (mean, deviation) in errors.items():
        each = [inspection.reconstruction(model, [maps])[name][0] for maps in captured]
        assert mean == pytest.approx(np.mean(each))
        assert deviation == pytest.approx(np.std(each))
        assert deviation > 0
    # Rows do not depend on each other, and follow each other within a layer.
    alone_of_it = list(inspection.capture(model, params, tokens[2:]))
    for layer in range(model.num_layers):
        for one, other in zip(captured[3 * layer + 2], alone_of_it[layer], strict=True):
            for x, y in zip(one, other, strict=True):
                np.testing.assert_array_equal(x, y)


def test_inspecting_attention(alone, capsys):
    assert inspect_attention.main([str(alone), "--rows=8"]) == 0
    said = capsys.readouterr().out
    assert "laser, this repository" in said
    found = json.loads((alone / "inspection.json").read_text())
    shares = found["probabilities"]
    assert shares["pairs"] == 2 * 2 * 8 * 32 * 33 / 2  # layers, heads, rows, pairs of 32 positions
    assert sum(shares["histogram"]["a"]) == pytest.approx(1)
    assert 0 <= shares["a"]["1e-07"] <= shares["a"]["0.001"] <= shares["a (1 - a)"]["0.001"] <= 1
    errors = {name: mean for name, (mean, _) in found["reconstruction"].items()}
    assert all(1e-4 < error < 0.05 for error in errors.values())
    assert "mean (deviation) over rows and layers" in said
    norms = found["gradients"]["20"]
    assert list(found["gradients"]) == ["15", "20"]
    parts = [value for values in norms["layers"].values() for value in values]
    assert 0 < np.linalg.norm(parts) < norms["all"]
    assert (alone / "inspection.png").read_bytes().startswith(b"\x89PNG")
    assert inspect_attention.main([str(alone), "--rows=100000"]) == 2
    assert "take at most" in capsys.readouterr().err
