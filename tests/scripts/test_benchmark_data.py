"""The benchmark of the data runs, small, and memory does not follow the amount of text.

Speeds are printed and never a test's pass or fail: others may have the cores.
"""

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
        [*command, "--speed_mb=2", "--memory_mb=8,32", "--rounds=1"],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for kind in ("json.gz", "tfrecord", "array_record"):
        assert f"cores, {kind}: " in done.stdout
        peaks = re.findall(rf"MB of {kind}, 1 workers: (\d+) MiB", done.stdout)
        workers = re.findall(rf"MB of {kind}, .* largest worker (\d+) MiB", done.stdout)
        for small, large in (map(int, peaks), map(int, workers)):
            assert large - small < 25  # 24 MB more of text
    consumed = float(re.search(r" times the (\d+) rows/s of 4 chips", done.stdout)[1])
    assert consumed == pytest.approx(383, abs=1)  # 4 * 197e12 / (2.01e9 * 1024)
    assert "would wait for data" in done.stdout
