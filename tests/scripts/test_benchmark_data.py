"""The benchmark of the data runs, small, and memory does not follow the amount of text.

Speeds are printed and never a test's pass or fail: others may have the cores.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import benchmark_data

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_prints_its_numbers_and_memory_is_bounded():
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_data.py")]
    done = subprocess.run(
        [*command, "--speed_mb=2", "--memory_mb=2,8", "--rounds=1"],
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
            assert large - small < 7  # 6 MB more of text
    consumed = float(re.search(r" times the (\d+) rows/s of 4 chips", done.stdout)[1])
    assert consumed == pytest.approx(383, abs=1)  # 4 * 197e12 / (2.01e9 * 1024)
    assert "would wait for data" in done.stdout


def test_the_requests_of_a_store_far_away_are_counted(capsys):
    assert benchmark_data.main(["--latency_ms=1"]) == 0
    table = capsys.readouterr().out.split("|---|\n")[1]
    found = {}
    for line in table.strip().splitlines():
        _, size, slice_name, hosts, _, needed, *_, memory, requests, _ = line.split("|")
        found[size.strip(), slice_name.strip()] = [*map(float, (hosts, needed, memory, requests))]
    # 1,024 rows a step in blocks of 256, each one request (a few lie in two files), and the step's
    # seconds of docs/plans.md; at most two blocks of 0.52 MB of each lane of a host.
    for key, hosts, seconds in (
        (("301m", "v5e-64"), 16, 0.1699),
        (("2p2b", "v5e-256"), 64, 0.2956),
        (("301m", "v5p-128"), 16, 0.0729),
    ):
        lanes = 1024 / hosts
        count, needed, memory, requests = found[key]
        assert count == hosts
        assert needed == pytest.approx(lanes / seconds, rel=0.02)
        assert 0.52 * lanes < memory < 2.1 * 0.525 * lanes
        assert requests == pytest.approx(1024 / 256 / seconds, rel=0.05)
