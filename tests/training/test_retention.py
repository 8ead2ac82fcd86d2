"""Which of two scores is the better one."""

import math

import pytest

from laser.training.retention import score


@pytest.mark.parametrize(
    ("best", "is_lower_better"),
    [("loss", True), ("error", True), ("wer", True), ("decoding_accuracy", False)],
)
def test_the_better_score_is_the_larger(best, is_lower_better):
    low, high = (score(best, {f"eval/{best}": value}) for value in (0.1, 0.2))
    assert (low > high) == is_lower_better
    for metrics in ({}, {f"eval/{best}": math.nan}):
        assert score(best, metrics) == -math.inf
