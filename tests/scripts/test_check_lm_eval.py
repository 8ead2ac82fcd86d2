"""scripts/check_lm_eval.py where the harness is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_IT = """
import runpy, sys
sys.modules["datasets"] = None
runpy.run_path("scripts/check_lm_eval.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "--data_dir"),
        (
            ["--workdir=a", "--data_dir=b"],
            2,
            "no package datasets: pip install -r requirements-eval",
        ),
    ],
)
def test_it_says_what_to_install(arguments, code, words):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_IT, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
