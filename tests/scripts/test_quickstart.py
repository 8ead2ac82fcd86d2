"""The quickstart from end to end, with a model that is too small to learn much."""

import os
import subprocess
import sys
from pathlib import Path

from tests.quick import QUICK_TO_COMPILE

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = {
    "training.steps": 6,
    "training.eval_every": 6,
    "training.batch_size": 8,
    "training.eval_batches": 0,
    "optimizer.warmup_steps": 2,
    "model.num_layers": 1,
    "model.model_dim": 32,
    "model.mlp_dim": 32,
    "model.num_heads": 2,
    "model.head_dim": 16,
}
WORDS = (
    "validation loss",
    "bits per byte",
    "xz -9e",
    "tokens/s",
    "(0 shots), by chance 25 %",
    "metrics.jsonl",
    "In the beginning",
    "--attention=standard",
    "compare_runs.py",
)


def test_quickstart_ends_with_a_summary_and_resumes(tmp_path):
    command = [sys.executable, "scripts/quickstart.py", f"--workdir={tmp_path / 'run'}", "--"]
    command += [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    for expected in ("starting a new run", "nothing left to do after step 6"):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE},  # one device, as a user has
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        summary = done.stdout.partition("Quickstart, step 6")[2]
        for word in WORDS:
            assert word in summary, word


def test_it_explains_itself():
    command = [sys.executable, "scripts/quickstart.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "--attention" in shown.stdout
    assert "--workdir" in shown.stdout


def test_a_mistake_in_an_override_ends_it(tmp_path):
    command = [sys.executable, "scripts/quickstart.py", f"--workdir={tmp_path / 'run'}", "--"]
    done = subprocess.run(
        [*command, "--config.training.stepz=6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "did you mean 'training.steps'" in done.stderr
    assert not (tmp_path / "run").exists()
