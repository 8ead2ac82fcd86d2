"""The benchmark of the data runs, small, and memory does not follow the amount of text."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_prints_its_numbers_and_memory_is_bounded():
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_data.py")]
    done = subprocess.run(
        [*command, "--speed_mb=5", "--memory_mb=5,40", "--consumed=100"],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "preparation, 1 of" in done.stdout
    peaks = [int(peak) for peak in re.findall(r"workers: (\d+) MiB", done.stdout)]
    workers = [int(peak) for peak in re.findall(r"largest worker (\d+) MiB", done.stdout)]
    assert len(peaks) == 4
    assert len(workers) == 2
    assert max(peaks[0::2]) - min(peaks[0::2]) < 15  # 35 MB more of text
    assert max(workers) - min(workers) < 15
    multiple = int(re.search(r"loader: .*, (\d+) times 100 rows/s", done.stdout)[1])
    assert multiple >= 20
