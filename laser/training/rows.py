"""The data of a run as rows: packed from a token store, or one example each for fine-tuning.

Either gives the batches of a step as a function of the seed and the step, so that the loop need not
know which one it trains on.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jax.sharding import Sharding

from data.reading import examples, loader, mixture
from data.reading.cache import Cache
from data.reading.examples import Examples
from data.reading.files import path_of
from data.reading.masking import Masking
from data.reading.store import Split, TokenStore
from data.tokenizer import Tokenizer
from laser.training.config import RunConfig

log = logging.getLogger(__name__)

ROW_MULTIPLE = 128  # rows of examples have this length or a multiple: attention kernels want it


class Validation(NamedTuple):
    """The validation split of one source of rows.

    Attributes:
      name: of the source; "" if there is no other.
      share: of the rows of training, and so of the loss; shares add up to 1.
      batches: of it.
      tokens, bytes: targets in the whole split, and its text; 0 where that has no meaning.
      at_end: it is evaluated after the last step alone.
    """

    name: str
    share: float
    batches: Iterator[loader.Batch]
    tokens: int = 0
    bytes: int = 0
    at_end: bool = False


class Rows(Protocol):
    """What the loop needs of its data; configs that methods take are resolved ones.

    Attributes:
      unit: what is counted of it: tokens, or rows as images, recordings or examples.
      tokenizer_path: SentencePiece model; "" of rows that are no text.
      fingerprint: equal for equal rows, as hex digits.
    """

    unit: str
    tokenizer_path: str
    fingerprint: str

    def row_length(self, config: RunConfig) -> int:
        """Tokens of a row, at most data.seq_len."""

    def steps_per_epoch(self, config: RunConfig) -> int:
        """At least 1."""

    def row_ids(self, config: RunConfig, step: int) -> np.ndarray:
        """Rows of the batch that step `step`, counted from 0, reads."""

    def train_batches(
        self, config: RunConfig, start_step: int, sharding: Sharding
    ) -> loader.Prefetcher:
        """Batches of the steps from `start_step` to the end of the run."""

    def epochs(self, config: RunConfig, steps: int) -> dict[str, float]:
        """How often the first `steps` steps go through each source, by its name."""

    def metrics(self, config: RunConfig, steps: int) -> dict[str, float]:
        """What else is logged of the data of the first `steps` steps."""

    def validation_parts(self, config: RunConfig, sharding: Sharding) -> list[Validation]:
        """What is evaluated, by training.eval_batches of it if there are any."""


class StoreRows:
    """Packed rows of a prepared store, or of several, each with its share of them."""

    unit = "tokens"
    _masking: Masking | None = None

    def __init__(self, config: RunConfig):
        """Opens data.store. Raises ValueError if one is no finished store, they do not fit the
        rest, or have different tokenizers."""
        self._parts = mixture.parse(config.data.store)
        for part in self._parts:
            path = path_of(part.path)
            if isinstance(path, Path) and not path.is_dir():
                raise ValueError(
                    f"data.store={part.path!r}: no such folder; see scripts/prepare_data.py"
                )
        cache = _cache(config)
        self._stores = [TokenStore(part.path, cache) for part in self._parts]
        self._store = self._stores[0]
        self.tokenizer_path = self._store.tokenizer_path
        for part, store in zip(self._parts, self._stores, strict=True):
            _check_store(config, part.path, store, self._store)
        self.fingerprint = self._store.fingerprint
        self._splits = [store.split("train") for store in self._stores]
        self._train: Split | mixture.Mixture = self._splits[0]
        if len(self._stores) > 1:
            whole = [(store.fingerprint, str(part.share)) for part, store in self._pairs()]
            self.fingerprint = hashlib.sha256(json.dumps(whole).encode()).hexdigest()
            self._train = mixture.Mixture(self._splits, [part.share for part in self._parts])

    def _pairs(self) -> Iterator[tuple[mixture.Part, TokenStore]]:
        return zip(self._parts, self._stores, strict=True)

    def row_length(self, config: RunConfig) -> int:
        return config.data.seq_len

    def steps_per_epoch(self, config: RunConfig) -> int:
        return max(1, self._train.num_rows(config.data.seq_len) // config.training.batch_size)

    def row_ids(self, config: RunConfig, step: int) -> np.ndarray:
        data = config.data
        return self._train.places(
            data.shuffle_seed, step, config.training.batch_size, data.seq_len, data.block_rows
        ).rows

    def epochs(self, config: RunConfig, steps: int) -> dict[str, float]:
        rows, names = steps * config.training.batch_size, [self._parts[0].path]
        counts = np.array([rows])
        if isinstance(self._train, mixture.Mixture):
            names, counts = mixture.names(self._parts), self._train.counts(rows)
        return {
            name: int(count) / split.num_rows(config.data.seq_len)
            for name, count, split in zip(names, counts, self._splits, strict=True)
        }

    def metrics(self, config: RunConfig, steps: int) -> dict[str, float]:
        if not isinstance(self._train, mixture.Mixture):
            return {}
        rows = steps * config.training.batch_size
        counts = self._train.counts(rows)
        names = mixture.names(self._parts)
        return {f"share/{name}": int(n) / rows for name, n in zip(names, counts, strict=True)}

    def train_batches(
        self, config: RunConfig, start_step: int, sharding: Sharding
    ) -> loader.Prefetcher:
        return loader.train_batches(
            self._train,
            seq_len=config.data.seq_len,
            batch_size=config.training.batch_size,
            seed=config.data.shuffle_seed,
            start_step=start_step,
            stop_step=config.training.steps,
            segment_ids=config.data.segment_ids,
            eos_id=self._store.eos_id,
            sharding=sharding,
            prefetch=config.data.prefetch,
            block_rows=config.data.block_rows,
            read_ahead=config.data.read_ahead,
            requests=config.data.requests,
            masking=self._masking,
        )

    def validation_parts(self, config: RunConfig, sharding: Sharding) -> list[Validation]:
        several = len(self._parts) > 1
        names = mixture.names(self._parts) if several else [""]
        return [
            self._validation(name, float(part.share), store, config, sharding)
            for name, (part, store) in zip(names, self._pairs(), strict=True)
        ]

    def _validation(
        self, name: str, share: float, store: TokenStore, config: RunConfig, sharding: Sharding
    ) -> Validation:
        split = store.split("validation")
        batches = loader.eval_batches(
            split,
            seq_len=config.data.seq_len,
            batch_size=config.training.batch_size,
            segment_ids=config.data.segment_ids,
            eos_id=store.eos_id,
            pad_id=store.pad_id,
            sharding=sharding,
            max_batches=config.training.eval_batches,
            read_ahead=config.data.read_ahead,
            requests=config.data.requests,
            masking=self._masking,
        )
        if self._masking:
            return Validation(name, share, batches)  # targets are parts of texts
        return Validation(name, share, batches, split.num_tokens - 1, split.num_bytes)


def _cache(config: RunConfig) -> Cache | None:
    """For what is read from addresses. Raises ValueError if its folder cannot be made."""
    folder = config.data.cache_dir
    try:
        return Cache(folder, int(config.data.cache_gb * 1e9)) if folder else None
    except OSError as error:
        raise ValueError(f"data.cache_dir={folder}: cannot be made ({error.strerror})") from error


class MaskedRows(StoreRows):
    """The same rows with masked tokens, see data/reading/masking.py."""

    def __init__(self, config: RunConfig):
        """Opens data.store. Raises ValueError as `StoreRows`, or if the tokenizer has no mask."""
        super().__init__(config)
        tokenizer = Tokenizer(self.tokenizer_path)
        self._masking = Masking(
            config.data.shuffle_seed, tokenizer.vocab_size, tokenizer.mask_id(), tokenizer.eos_id
        )


def _check_store(config: RunConfig, path: str, store: TokenStore, first: TokenStore) -> None:
    check_vocabulary(config, store.vocab_size, path)
    if store.tokenizer_sha256 != first.tokenizer_sha256:
        raise ValueError(
            f"data.store={config.data.store}: the tokenizer of {path} is not that of {first.path}, "
            f"so the same ids mean other text; prepare it with --tokenizer={first.tokenizer_path}"
        )
    for name in ("train", "validation"):
        tokens, length = store.split(name).num_tokens, config.data.seq_len
        if tokens <= length:
            raise ValueError(
                f"data.seq_len={length}: the {name} split of {path} has only "
                f"{tokens} tokens; use shorter rows or more text"
            )


class ExampleRows:
    """Padded rows of one example each; the targets alone are learned.

    Attributes:
      train, validation: the examples.
    """

    unit = "examples"

    def __init__(
        self,
        config: RunConfig,
        tokenizer_path: Path,
        train: list[examples.Pair],
        validation: list[examples.Pair],
    ):
        """Tokenises. Raises ValueError if tokenizer, model and examples do not fit together."""
        tokenizer = Tokenizer(tokenizer_path)
        check_vocabulary(config, tokenizer.vocab_size, str(tokenizer_path))
        self.tokenizer_path = str(tokenizer_path)
        self.train = Examples(train, tokenizer, config.data.seq_len)
        self.validation = Examples(validation, tokenizer, config.data.seq_len)
        parts = (tokenizer.sha256, self.train.fingerprint, self.validation.fingerprint)
        self.fingerprint = hashlib.sha256("".join(parts).encode()).hexdigest()
        for name, split in (("train", self.train), ("validation", self.validation)):
            cut = f", {split.truncated} of which lost the left of their prompt"
            log.info("%s: %d examples%s", name, len(split), cut if split.truncated else "")

    def row_length(self, config: RunConfig) -> int:
        longest = max(self.train.longest, self.validation.longest)
        return min(-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE, config.data.seq_len)

    def steps_per_epoch(self, config: RunConfig) -> int:
        return examples.steps_per_epoch(len(self.train), config.training.batch_size)

    def row_ids(self, config: RunConfig, step: int) -> np.ndarray:
        return examples.example_ids(
            config.data.shuffle_seed, step, config.training.batch_size, len(self.train)
        )

    def epochs(self, config: RunConfig, steps: int) -> dict[str, float]:
        return {config.data.tasks: steps / self.steps_per_epoch(config)}

    def metrics(self, config: RunConfig, steps: int) -> dict[str, float]:
        del config, steps
        return {}

    def train_batches(
        self, config: RunConfig, start_step: int, sharding: Sharding
    ) -> loader.Prefetcher:
        return examples.train_example_batches(
            self.train,
            seq_len=config.data.seq_len,
            batch_size=config.training.batch_size,
            seed=config.data.shuffle_seed,
            start_step=start_step,
            stop_step=config.training.steps,
            sharding=sharding,
            prefetch=config.data.prefetch,
        )

    def validation_parts(self, config: RunConfig, sharding: Sharding) -> list[Validation]:
        batches = examples.eval_example_batches(
            self.validation,
            seq_len=config.data.seq_len,
            batch_size=config.training.batch_size,
            sharding=sharding,
            max_batches=config.training.eval_batches,
        )
        return [Validation("", 1.0, batches)]  # targets are parts of texts


def train_sample(config: RunConfig, validation: int) -> int:
    """Of the training set so many batches are evaluated at the end, always of the same rows and
    about as many as the `validation` rows: AlgoPerf's eval_train."""
    size = config.training.batch_size
    return config.training.eval_batches or examples.steps_per_epoch(validation, size)


def progress(config: RunConfig, rows: Rows, steps: int) -> dict[str, float]:
    """What is logged of the data of the first `steps` steps of a resolved config."""
    found = rows.metrics(config, steps)
    if rows.unit == "tokens":
        found["tokens"] = steps * config.training.batch_size * config.data.seq_len
    epochs = rows.epochs(config, steps)
    several = len(epochs) > 1
    return found | {f"epoch/{name}" if several else "epoch": x for name, x in epochs.items()}


def resolved(config: RunConfig, rows: Rows) -> RunConfig:
    """Numbers for what a config leaves to its data: epochs as steps, a rhythm of 0 as once an
    epoch, rows no longer than they need be. Raises ValueError as RunConfig."""
    per_epoch = rows.steps_per_epoch(config)
    training, evaluation, checkpoint = config.training, config.evaluation, config.checkpoint
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_len=rows.row_length(config)),
        training=dataclasses.replace(
            training,
            steps=training.steps or training.epochs * per_epoch,
            epochs=0,
            eval_every=training.eval_every or per_epoch,
        ),
        evaluation=dataclasses.replace(evaluation, every=evaluation.every or per_epoch),
        checkpoint=dataclasses.replace(checkpoint, every=checkpoint.every or per_epoch),
    )


def check_vocabulary(config: RunConfig, entries: int, where: str) -> None:
    """Raises ValueError if the model has no room for all entries of the tokenizer of `where`."""
    if config.model.vocab_size < entries:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer of {where} has {entries} "
            "entries; set it to that or more"
        )
