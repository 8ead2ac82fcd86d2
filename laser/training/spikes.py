"""Spikes of the training loss: which steps, how high, which rows.

A step is a spike if its loss lies at least 7 standard deviations above the mean of the last 1,000
steps: OLMo 2's measure (arXiv 2501.00656), from 100 steps on and upwards alone. The paper shows
spikes in its Figure 6 and states no rule.

It is blind early: while the window holds the fall of the loss at the start, that fall is most of
the deviation. On a usual curve, from 10.4 to 4 nats in a few hundred steps, a loss counts at steps
150 to 1,000 only if it is 6 to 15 nats above the present one, as no spike is; at 2,000 steps 0.2
to 1.2 nats. So it says nothing of the initial part of training, on which Figure 6 focuses: look at
the curves themselves there.
"""

from collections import deque
from collections.abc import Iterable

import numpy as np

DEVIATIONS = 7.0
WINDOW, LEAST = 1000, 100  # steps to compare with


class Spikes:
    """Looks at the loss of every step, in order.

    Attributes:
      recent: losses of the last steps. Given to another one, that goes on as this would have.
    """

    def __init__(self, recent: Iterable[float] = ()):
        self.recent: deque[float] = deque(recent, maxlen=WINDOW)

    def height(self, loss: float) -> float | None:
        """By how many standard deviations a step's loss is above the last ones, if it is a spike.

        A loss that is not finite is none: its step is skipped, and recorded as such.
        """
        if not np.isfinite(loss):
            return None
        before = np.array(self.recent)
        self.recent.append(loss)
        if len(before) < LEAST:
            return None
        rounding = np.finfo(np.float32)
        least = max(float(rounding.eps) * abs(loss), float(rounding.tiny))
        deviation = max(float(before.std()), least)
        height = (loss - float(before.mean())) / deviation
        return height if height >= DEVIATIONS else None
