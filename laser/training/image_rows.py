"""The data of a run on images, for the loop: see laser/training/rows.py."""

import hashlib
import logging

import numpy as np
from jax.sharding import Sharding

from data.images import loader, sources
from data.images.loader import Augmentation
from data.preparation.workers import cores
from data.reading.loader import Prefetcher
from data.reading.order import step_places
from laser.training.config import RunConfig
from laser.training.rows import Validation, train_sample

log = logging.getLogger(__name__)


class ImageRows:
    """Images with their classes; a row is an image, and its tokens are its patches."""

    unit = "images"
    tokenizer_path = ""

    def __init__(self, config: RunConfig):
        """Lists the images. Raises ValueError if they and the model do not fit together."""
        assert config.images is not None
        images = config.images
        self._broken = sources.Broken(images.max_broken)
        try:
            self._train, self._validation = sources.open_images(images.source, self._broken)
            self._test = (
                sources.open_test_images(images.test, self._train, self._broken)
                if images.test
                else None
            )
        except sources.TooManyBroken as error:
            raise ValueError(str(error)) from error
        count = len(self._train.classes)
        if count > config.model.num_classes:
            raise ValueError(
                f"model.num_classes={config.model.num_classes}: images.source={images.source} has "
                f"{count}; set it to that"
            )
        self._augmentation = Augmentation(
            config.model.image_size, images.crop, images.operations, images.magnitude, images.mixup
        )
        self._workers = images.workers or cores()
        splits = [x for x in (self._train, self._validation, self._test) if x is not None]
        prints = "".join(split.fingerprint for split in splits)
        self.fingerprint = hashlib.sha256(prints.encode()).hexdigest()
        log.info("images: %s", ", ".join(f"{len(split):,}" for split in splits))

    def row_length(self, config: RunConfig) -> int:
        return config.model.tokens

    def steps_per_epoch(self, config: RunConfig) -> int:
        return max(1, len(self._train) // config.training.batch_size)

    def row_ids(self, config: RunConfig, step: int) -> np.ndarray:
        data, size = config.data, config.training.batch_size
        return step_places(data.shuffle_seed, step, size, len(self._train), data.block_rows).rows

    def epochs(self, config: RunConfig, steps: int) -> dict[str, float]:
        assert config.images is not None
        return {config.images.source: steps * config.training.batch_size / len(self._train)}

    def metrics(self, config: RunConfig, steps: int) -> dict[str, float]:
        del config, steps
        return {"broken_images": len(self._broken.names)} if self._broken.names else {}

    def train_batches(self, config: RunConfig, start_step: int, sharding: Sharding) -> Prefetcher:
        return loader.train_batches(
            self._train,
            self._augmentation,
            self._broken,
            batch_size=config.training.batch_size,
            seed=config.data.shuffle_seed,
            start_step=start_step,
            stop_step=config.training.steps,
            sharding=sharding,
            workers=self._workers,
            prefetch=config.data.prefetch,
            block_rows=config.data.block_rows,
        )

    def validation_parts(self, config: RunConfig, sharding: Sharding) -> list[Validation]:
        """The validation images, and without a share as `test` those of images.test, and at the end
        as `train` a fixed sample of the training images, about as many: AlgoPerf's eval_train."""

        def batches(images, max_batches):
            return loader.eval_batches(
                images,
                self._augmentation,
                self._broken,
                batch_size=config.training.batch_size,
                sharding=sharding,
                workers=self._workers,
                max_batches=max_batches,
            )

        limit = config.training.eval_batches
        parts = [Validation("", 1.0, batches(self._validation, limit))]
        if self._test is not None:
            parts.append(Validation("test", 0.0, batches(self._test, limit)))
        sample = train_sample(config, len(self._validation))
        return [*parts, Validation("train", 0.0, batches(self._train, sample), at_end=True)]
