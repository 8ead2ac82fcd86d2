"""Intervals: of a mean difference over pairs, and of a power law fitted to losses."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, from `count` observations; the interval is infinite for one."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class PowerLaw:
    """loss = a · n^b, with intervals of both."""

    a: Estimate
    b: Estimate

    def size_at(self, loss: float) -> float | None:
        """The n of this loss; None if the loss does not fall with n."""
        return (loss / self.a.value) ** (1 / self.b.value) if self.b.value < 0 else None


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean with Student's t interval; of differences of pairs that is the paired interval.

    Args:
      values: at least one, independent of each other.
      level: the share of such intervals that hold the true mean, for normal values.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    from scipy import stats

    half = stats.t.ppf((1 + level) / 2, count - 1) * deviation(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (n - 1), 0 for a single value."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def fit_power_law(
    sizes: Sequence[float], losses: Sequence[float], level: float = LEVEL
) -> PowerLaw | None:
    """Least squares on log loss over log size, one point a run; None below three points or two
    sizes. The intervals are those of a linear regression with equal, normal errors of log loss."""
    if len(losses) < 3 or len(set(sizes)) < 2:
        return None
    from scipy import stats

    fit = stats.linregress([math.log(n) for n in sizes], [math.log(loss) for loss in losses])
    t = stats.t.ppf((1 + level) / 2, len(losses) - 2)
    count = len(losses)
    b = Estimate(fit.slope, fit.slope - t * fit.stderr, fit.slope + t * fit.stderr, count)
    half = t * fit.intercept_stderr
    a, low, high = (math.exp(fit.intercept + sign * half) for sign in (0, -1, 1))
    return PowerLaw(Estimate(a, low, high, count), b)


def step_at(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """The first step at which a curve of (step, loss) is down at `loss`, between its points by a
    straight line; None if it never is. Its first point is the earliest that can be told."""
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return None
