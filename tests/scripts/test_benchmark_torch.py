"""The benchmark of PyTorch's attentions runs, where torch is installed."""

import re

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: requirements-peers.txt")

from scripts import benchmark_torch


def test_benchmark_prints_both_and_their_ratio(monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["benchmark_torch.py", "--length=32", "--repeats=2"])
    benchmark_torch.main()
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines[1:]:
        assert re.search(r"standard [\d.]+ ms, laser [\d.]+ ms, ratio [\d.]+$", line)
