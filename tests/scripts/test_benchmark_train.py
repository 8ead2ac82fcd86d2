"""benchmark_train.py on a tiny shape: every row is there. Times are not judged."""

import os

from scripts import benchmark_train
from scripts.benchmark_train import LASER, PRODUCTS, STANDARD, Result, Shape, measure, report

TINY = Shape(layers=2, dim=16, heads=2, vocabulary=64, length=16, batch=2)


def test_all_rows_are_reported():
    result = measure(TINY, steps=2, peers=False)
    assert list(result.seconds) == [STANDARD, LASER, PRODUCTS]
    assert all(len(times) == 2 and min(times) > 0 for times in result.seconds.values())
    assert result.peak > 0
    # 6 FLOPs per token and weight, and the causal half of two products per layer.
    assert result.flops == 32 * 6 * (2 * 12 * 16**2 + 64 * 16 + 2 * 2 * 16 * 16 / 2)

    text = "\n\n".join(report(TINY, {"tuned": result}))
    for name in (STANDARD, LASER, PRODUCTS):
        assert sum(line.startswith(name) for line in text.splitlines()) == 1
    assert "LASER / standard: " in text


def test_ratios_are_taken_within_a_round():
    seconds = {STANDARD: [1.0, 2.0, 4.0], LASER: [1.5, 2.5, 5.0], PRODUCTS: [0.5, 1.0, 2.0]}
    text = "\n".join(report(TINY, {"tuned": Result(seconds, peak=4e9, flops=2e9)}))
    assert "LASER / standard: 1.250" in text
    row = next(line for line in text.splitlines() if line.startswith(STANDARD)).split()
    assert row[2:] == ["2.000", "1.000", "1.500", "2.00", "-", "25%", "16"]


def test_no_other_device_is_sought(monkeypatch, capsys):
    """Where libtpu is installed for planning, jax would print that it found no chip."""
    sought = []

    def measure(*_):
        sought.append(os.environ.get("JAX_PLATFORMS"))
        seconds = {name: [1.0, 1.0] for name in (STANDARD, LASER, PRODUCTS)}
        return Result(seconds, peak=4e9, flops=2e9)

    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(benchmark_train, "measure", measure)
    assert benchmark_train.main(["--setting=plain"]) == 0
    assert sought == ["cpu"]
    assert STANDARD in capsys.readouterr().out
