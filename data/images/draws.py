"""Random numbers that follow from integers: the same on any machine and with any library.

splitmix64 (Steele, Lea, Flood 2014) as a counter: number n of a stream is a mix of its key and n.
"""

MASK = 2**64 - 1
STEP = 0x9E3779B97F4A7C15


def mixed(x: int) -> int:
    """The finaliser of splitmix64: every bit of the input moves half of those of the output."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


class Draws:
    """A stream of numbers; streams of other keys are independent of it.

    Args:
      key: integers, as a seed and a step.
    """

    def __init__(self, *key: int):
        self._state = 0
        for part in key:
            self._state = mixed(self._state + STEP + mixed(part + STEP))

    def bits(self) -> int:
        """The next one, 64 bits."""
        self._state = (self._state + STEP) & MASK
        return mixed(self._state)

    def below(self, count: int) -> int:
        """At least 0, below `count`, all alike but for 2⁻⁶⁴ · count."""
        return self.bits() * count >> 64

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """At least `low`, below `high`."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def sign(self) -> int:
        """1 or -1."""
        return 1 if self.bits() >> 63 else -1

    def beta(self, alpha: float) -> float:
        """A number from the distribution Beta(alpha, alpha), alpha up to 1 (Jöhnk's method)."""
        while True:
            x, y = self.uniform() ** (1 / alpha), self.uniform() ** (1 / alpha)
            if 0 < x + y <= 1:
                return x / (x + y)
