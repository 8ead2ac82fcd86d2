"""The pages on extending the code, followed to the letter in a copy of it, with small runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, apply_change, blocks

PARTS = ("configs", "data", "eval", "export", "laser", "models", "scripts", "study", "train.py")
TESTS = ("conftest.py", "once.py", "quick.py")

# The pages train the model of the quickstart; here a smaller one for a few steps.
TINY = {
    "model.num_layers": 1, "model.model_dim": 32, "model.mlp_dim": 32, "model.num_heads": 2,
    "model.head_dim": 16, "data.seq_len": 128, "training.steps": 3, "training.batch_size": 8,
    "training.eval_batches": 1, "optimizer.warmup_steps": 1, "mesh.data": 8,
}  # fmt: skip


@pytest.fixture
def follow(tmp_path, store):
    """Does what a page says in a copy, command blocks one after the other; returns their output."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, ignore=ignore)
        else:
            shutil.copy(source, copy / part)
    (copy / "tests/attention").mkdir(parents=True)
    for name in TESTS:
        shutil.copy(ROOT / "tests" / name, copy / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "stores").mkdir()
    (copy / "stores/bible").symlink_to(store)

    # `python` as the pages call it: runs are small, and of the Bibles a part is prepared already.
    tiny = " ".join(f"--config.{name}={value}" for name, value in TINY.items())
    ours = f'exec {sys.executable} "$@"'
    shim = tmp_path / "bin/python"
    shim.parent.mkdir()
    shim.write_text(
        '#!/bin/sh\ncase "$*" in\n*--source=bible*) ;;\n'
        f"train.py*vocab_size*) {ours} {tiny} ;;\n"
        f"train.py*) {ours} {tiny} --config.model.vocab_size=400 ;;\n"
        f"*) {ours} ;;\nesac\n"
    )
    shim.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PATH"] = f"{shim.parent}:{environment['PATH']}"

    def run(page: str) -> tuple[Path, list[str]]:
        outputs = []
        for block in blocks(ROOT / "docs" / page):
            if block.language == "diff":
                apply_change(copy, block.text)
            elif block.note.startswith("file="):
                (copy / block.note.removeprefix("file=")).write_text(block.text)
            elif (block.language, block.note) == ("bash", "run"):
                result = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", block.text],
                    cwd=copy, env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert not result.returncode, f"{block.place}\n{result.stdout}\n{result.stderr}"
                outputs.append(result.stdout)
        return copy, outputs

    return run


@pytest.mark.slow
def test_an_attention_of_your_own(follow):
    copy, (tested, trained, generated) = follow("extend-attention.md")
    assert "2 passed" in tested
    assert _metrics(copy / "runs/sigmoid")[-1]["step"] == TINY["training.steps"]
    config = json.loads((copy / "runs/sigmoid/config.json").read_text())["config"]
    assert config["attention"]["kind"] == "sigmoid"
    assert generated.startswith("In the beginning")
    del trained


@pytest.mark.slow
def test_a_source_an_optimizer_and_a_task_of_your_own(follow):
    copy, (prepared, _, _, shown) = follow("extend.md")
    manifest = json.loads((copy / "stores/notes/manifest.json").read_text())
    assert manifest["request"]["source"]["kind"] == "SQLite"
    assert _metrics(copy / "runs/lion")[-1]["step"] == TINY["training.steps"]
    assert "The capital of" in shown
    del prepared


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def test_what_the_pages_say_of_export_and_of_a_task_without_data():
    from eval.tasks.sources import MissingData, Source, available_split
    from export.layouts import choose_layout
    from models.config import AttentionConfig, ModelConfig

    sizes = dict.fromkeys(
        ("vocab_size", "num_layers", "model_dim", "mlp_dim", "num_heads", "head_dim"), 2
    )
    config = ModelConfig(**sizes, attention=AttentionConfig(kind="sigmoid"))
    with pytest.raises(ValueError) as refused:
        choose_layout(config)
    assert "attention.kind=sigmoid" in str(refused.value)
    source = Source(files={"validation": ("capitals.jsonl",)}, get="write capitals.jsonl")
    with pytest.raises(MissingData) as missing:
        available_split(source, "validation", None)
    assert str(missing.value) == "no data; no --data_dir was given: write capitals.jsonl"
