"""benchmark_generate.py on a tiny shape: every row is there. Times are not judged."""

from scripts.benchmark_generate import LASER, PEER, STANDARD, Shape, measure, report

TINY = Shape(layers=1, dim=16, heads=2, vocabulary=64, prompt=3, new=4)


def test_all_rows_are_reported():
    seconds = measure(TINY, batch=2, rounds=2, peers=False)
    assert list(seconds) == [STANDARD, LASER]
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    lines = list(report("tiny", TINY, 2, seconds))
    assert next(line for line in lines if line.startswith(STANDARD)).split()[-1] == "-"


def test_speed_is_tokens_per_second_and_its_ratio_is_within_a_round():
    seconds = {STANDARD: [1.0, 2.0, 4.0], LASER: [2.0, 4.0, 8.0], PEER: [2.0, 5.0, 8.0]}
    lines = list(report("tiny", TINY, 2, seconds))
    row = next(line for line in lines if line.startswith(STANDARD)).split()
    assert row[2:] == ["2.000", "1.000", "4", "2.00"]
    row = next(line for line in lines if line.startswith(LASER)).split()
    assert row[2:] == ["4.000", "2.000", "2", "1.00"]
