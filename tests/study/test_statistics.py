"""Intervals against scipy's own and against a simulation; curves by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from study.statistics import deviation, fit_power_law, mean_interval, step_at


def test_paired_interval_is_scipys():
    draw = np.random.default_rng(0)
    one, other = draw.normal(3.0, 0.1, 10), draw.normal(3.05, 0.1, 10)
    ours = mean_interval(list(one - other))
    theirs = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert deviation(list(one)) == pytest.approx(one.std(ddof=1), rel=1e-12)


@pytest.mark.parametrize("count", [2, 5])
def test_the_interval_holds_the_mean_in_19_cases_of_20(count):
    draw = np.random.default_rng(count)
    cases = 4000
    held = 0
    for values in draw.normal(-0.02, 0.01, (cases, count)):
        estimate = mean_interval(list(values))
        held += estimate.low <= -0.02 <= estimate.high
    assert abs(held / cases - 0.95) < 4 * math.sqrt(0.95 * 0.05 / cases)


def test_a_single_value_has_no_interval():
    assert math.isinf(mean_interval([1.0]).high)
    assert deviation([1.0]) == 0.0


def test_power_law_finds_its_parameters_and_its_intervals_hold_them():
    sizes = np.array([1e6, 4e6, 4e6, 1.2e7])  # two degrees of freedom
    exact = fit_power_law(list(sizes), list(7.0 * sizes**-0.05))
    assert (exact.a.value, exact.b.value) == pytest.approx((7.0, -0.05), rel=1e-9)
    draw = np.random.default_rng(0)
    cases, held = 1500, np.zeros(2)
    for _ in range(cases):
        losses = 7.0 * sizes**-0.05 * np.exp(draw.normal(0, 0.01, sizes.size))
        fit = fit_power_law(list(sizes), list(losses))
        held += [fit.a.low <= 7.0 <= fit.a.high, fit.b.low <= -0.05 <= fit.b.high]
    assert np.all(np.abs(held / cases - 0.95) < 4 * math.sqrt(0.95 * 0.05 / cases))
    assert fit_power_law([1e6, 1e6, 1e6], [3.0, 3.1, 3.0]) is None


def test_the_step_at_a_loss():
    curve = [(100, 4.0), (200, 3.0), (300, 2.0)]
    assert step_at(curve, 2.5) == 250
    assert step_at(curve, 3.0) == 200
    assert step_at(curve, 1.9) is None
    assert step_at(curve, 4.5) == 100
    assert step_at(curve[:1], 4.5) == 100
    assert step_at(curve[:1], 3.5) is None
