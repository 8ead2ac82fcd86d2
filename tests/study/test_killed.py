"""A study of real runs that is killed twice on its way to the report."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from study.plan import Plan
from study.results import read
from tests.training.runs import QUICK_TO_COMPILE, ROOT, train

STUDY = """
from configs import quickstart
from configs.study import Comparison, Stage, Study

def get_config(arguments=""):
    config = quickstart.get_config(arguments)
    fields = {fields}
    for name, value in fields.items():
        section, field = name.split(".")
        config[section][field] = value
    return config

def get_study():
    stages = [
        Stage("main", {{"attention": ("standard", "laser")}}, measures=("domains",)),
        Stage("wild", {{"optimizer.learning_rate": (1e38,)}}, {{"training.max_skipped_steps": 1}}),
    ]
    compare = Comparison("main", {{"attention": "laser"}}, {{"attention": "standard"}})
    return Study(stages, [compare], held_out={held_out!r})
"""


def _wait_for(path, process):
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def study(tmp_path, module_arguments):
    """The file of a study, of tiny runs."""
    pairs = [flag.removeprefix("--config.").split("=") for flag in module_arguments[1:]]
    fields = {name: value if "store" in name else json.loads(value) for name, value in pairs}
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    text = json.dumps({"text": "In the beginning God created the heaven and the earth. " * 9})
    (held_out / "genesis.jsonl").write_text(text)
    file = tmp_path / "tiny.py"
    file.write_text(STUDY.format(fields=fields | {"checkpoint.every": 5}, held_out=str(held_out)))
    return file


def test_killed_twice_on_the_way_to_its_report(study, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "scripts/study.py", f"--study={study}", f"--output={output}"]

    def start():
        environment = {**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE}  # one device, as in `train`
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )

    standard, laser = (output / "main" / f"attention={arm}" for arm in ("standard", "laser"))
    first = start()
    _wait_for(standard / "metrics.jsonl", first)
    first.kill()
    first.communicate()
    second = start()
    _wait_for(laser / "metrics.jsonl", second)
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=300)
    assert second.returncode in (75, 0)  # 0: it was fast
    last = start()
    said = last.communicate(timeout=600)[0]
    assert last.returncode == 0, said

    results = [read(folder) for folder in (standard, laser, output / "wild/learning_rate=1e+38")]
    assert [result["status"] for result in results] == ["done", "done", "failed"]
    assert "non-finite" in results[2]["reason"]
    assert 1 < results[0]["domains"]["genesis"] < 8
    report = (output / "report.md").read_text()
    assert f"{results[1]['eval_loss']:.4f}" in report
    assert "a single pair tells nothing" in report

    plan = Plan(str(study))
    cell = plan.cells(plan.study.stages[0], lambda cell: None)[1]
    assert train(cell.flags(), tmp_path / "again").returncode == 0
    lines = (tmp_path / "again/metrics.jsonl").read_text().splitlines()
    (loss,) = [line["eval/loss"] for line in map(json.loads, lines) if "eval/loss" in line]
    assert loss == results[1]["eval_loss"]
