"""Masked tokens for BERT (arXiv 1810.04805, section 3.1), drawn anew for every step.

Of the tokens that are no padding and no EOS each is chosen with probability 0.15. Of the chosen, 80
% become the mask, 10 % any token, 10 % stay; they alone have weight. What is drawn for a row
follows from the seed, the step and the row's place in the global batch, so neither hosts nor
resuming change it; a validation row's follows from its number alone, the same at every evaluation
of runs of any seed. Padding becomes a segment of its own, 0, so that no token sees it.
"""

import dataclasses

import numpy as np

CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens are masked.

    Attributes:
      seed: of the draws of training.
      vocab_size: of the tokenizer; a token at random is any below it.
      mask_id: in the place of a masked token.
      eos_id: of the tokenizer.
    """

    seed: int
    vocab_size: int
    mask_id: int
    eos_id: int

    def __call__(self, arrays: Arrays, step: int | None, places: np.ndarray) -> Arrays:
        """The batch to fill in, from one of data/reading/loader.py with segment ids.

        Args:
          arrays: of rows.
          step: of training; None for validation.
          places: of the rows in the global batch, or in the validation split.
        """
        tokens, there = arrays["inputs"], arrays["weights"] > 0
        draws = [self._draw(step, int(place), tokens.shape[1]) for place in places]
        choice, what, others = (np.stack(parts) for parts in zip(*draws, strict=True))
        chosen = (choice < CHOSEN) & there & (tokens != self.eos_id)
        inputs = np.where(chosen & (what < MASKED), self.mask_id, tokens)
        inputs = np.where(chosen & (what >= 1 - RANDOM), others, inputs)
        return {
            "inputs": inputs.astype(np.int32),
            "targets": tokens,
            "weights": chosen.astype(np.float32),
            "segment_ids": np.where(there, arrays["segment_ids"], 0).astype(np.int32),
        }

    def _draw(self, step: int | None, place: int, length: int) -> tuple[np.ndarray, ...]:
        """Two of [0, 1) and a token for every position of a row."""
        is_validation = step is None
        counter = [0, place, step or 0, is_validation]  # the first counts the draws
        key = 0 if is_validation else self.seed
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        choice, what = generator.random((2, length), np.float32)
        return choice, what, generator.integers(self.vocab_size, size=length, dtype=np.int32)
