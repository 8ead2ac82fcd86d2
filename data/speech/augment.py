"""SpecAugment (arXiv 1904.08779) in AlgoPerf's form: blocks of bins and of frames set to 0.

What is drawn follows from the seed, the step and the row of the batch alone, so that a run goes on
with the same masks on any number of hosts. 0 is the mean of normalised features.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """How much is masked; counts of 0 mask nothing.

    Attributes:
      bin_masks: blocks of neighbouring bins, over all frames.
      max_bins: a block has fewer.
      time_masks: blocks of neighbouring frames, over all bins.
      max_time_ratio: of the recording's frames; a block has a smaller share of them.
    """

    bin_masks: int
    max_bins: int
    time_masks: int
    max_time_ratio: float

    def mask(self, features: np.ndarray, draws: np.random.Generator) -> None:
        """Masks (frames, bins) in place."""
        frames, bins = features.shape
        lengths = (draws.random(self.time_masks) * self.max_time_ratio * frames).astype(int)
        for start, length in _blocks(frames, lengths, draws):
            features[start : start + length] = 0
        widths = (draws.random(self.bin_masks) * min(self.max_bins, bins)).astype(int)
        for start, width in _blocks(bins, widths, draws):
            features[:, start : start + width] = 0


def _blocks(size: int, lengths: np.ndarray, draws: np.random.Generator):
    starts = (draws.random(len(lengths)) * (size - lengths + 1)).astype(int)
    return zip(starts.tolist(), lengths.tolist())


def draws_of_row(seed: int, step: int, row: int) -> np.random.Generator:
    """Random numbers of a row of the batch of a step, both counted from 0."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, step, row))))
