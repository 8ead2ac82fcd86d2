"""The data of a run on speech, for the loop: see laser/training/rows.py."""

import numpy as np
from jax.sharding import Sharding

from data.reading.examples import example_ids, steps_per_epoch
from data.reading.loader import Prefetcher
from data.speech import batches
from data.speech.augment import SpecAugment
from data.speech.batches import Shape
from data.speech.features import MEL_BINS, num_frames
from data.speech.store import SpeechStore, Split
from laser.training.config import RunConfig
from laser.training.rows import Validation, check_vocabulary, train_sample
from models.config import ConformerConfig
from models.conformer import num_positions

FRAMES_MULTIPLE = 128  # rows have so many frames or a multiple of it, but for the longest allowed


class SpeechRows:
    """Recordings with their transcripts, each in a row; its tokens are its frames.

    Attributes:
      store: of the recordings.
    """

    unit = "recordings"

    def __init__(self, config: RunConfig):
        """Opens data.store. Raises ValueError if it is none, or does not fit the rest."""
        assert isinstance(config.model, ConformerConfig)
        self.store = SpeechStore(config.data.store)
        self.tokenizer_path = self.store.tokenizer_path
        self.fingerprint = self.store.fingerprint
        check_vocabulary(config, self.store.tokenizer.vocab_size, config.data.store)
        if config.model.mel_bins != MEL_BINS:
            raise ValueError(f"model.mel_bins={config.model.mel_bins}: speech has {MEL_BINS}")
        splits = (self.store.train, self.store.validation, self.store.test)
        self._longest = max(num_frames(split.longest[0]) for split in splits if split is not None)
        if config.data.seq_len < self._longest:
            raise ValueError(
                f"data.seq_len={config.data.seq_len}: a recording of {config.data.store} has "
                f"{self._longest} frames of 10 ms; set it to that or more"
            )
        model = config.model
        self._augment = SpecAugment(
            model.bin_masks, model.max_masked_bins, model.time_masks, model.max_masked_time
        )

    def row_length(self, config: RunConfig) -> int:
        rounded = -(-self._longest // FRAMES_MULTIPLE) * FRAMES_MULTIPLE
        return min(rounded, config.data.seq_len)

    def steps_per_epoch(self, config: RunConfig) -> int:
        return steps_per_epoch(len(self.store.train), config.training.batch_size)

    def row_ids(self, config: RunConfig, step: int) -> np.ndarray:
        data, count = config.data, len(self.store.train)
        return example_ids(data.shuffle_seed, step, config.training.batch_size, count)

    def epochs(self, config: RunConfig, steps: int) -> dict[str, float]:
        return {config.data.store: steps / self.steps_per_epoch(config)}

    def metrics(self, config: RunConfig, steps: int) -> dict[str, float]:
        del config, steps
        return {}

    def train_batches(self, config: RunConfig, start_step: int, sharding: Sharding) -> Prefetcher:
        return batches.train_batches(
            self.store.train,
            shape(config),
            self._augment,
            seed=config.data.shuffle_seed,
            start_step=start_step,
            stop_step=config.training.steps,
            sharding=sharding,
            prefetch=config.data.prefetch,
        )

    def validation_parts(self, config: RunConfig, sharding: Sharding) -> list[Validation]:
        """The validation split, and without a share as `test` the store's split of this name, and
        at the end as `train` the recordings of `train_sample`."""

        def part(name: str, share: float, split: Split, limit: int) -> Validation:
            rows = shape(config)
            return Validation(
                name, share, batches.eval_batches(split, rows, sharding=sharding, max_batches=limit)
            )

        limit = config.training.eval_batches
        parts = [part("", 1.0, self.store.validation, limit)]
        if self.store.test is not None:
            parts.append(part("test", 0.0, self.store.test, limit))
        size = train_sample(config, len(self.store.validation))
        sample = part("train", 0.0, self.store.train, size)
        return [*parts, sample._replace(at_end=True)]


def shape(config: RunConfig) -> Shape:
    """Of a batch. CTC has no room for more labels than positions."""
    frames = config.data.seq_len
    return Shape(config.training.batch_size, frames, num_positions(frames))
