"""Pairs of prompt and target as rows, one pair each: fine-tuning.

A row is EOS, the prompt, the target, EOS, filled up with padding; only the target and its EOS have
weight 1. Every epoch has each example exactly once, in an order that is a function of the seed and
the epoch (order.py), and the same number of steps: the batch that ends it is filled up with
rows of weight 0. So the batch of a step follows from the seed and the step, as in pretraining.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Sharding

from data.reading.loader import Arrays, Batch, Prefetcher, global_batch
from data.reading.order import shuffled
from data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Pair:
    """What is given, and what is right after it, with the space that separates: the first answer is
    learned, and a prompt leaves room for any of them."""

    prompt: str
    answers: tuple[str, ...]


class Examples:
    """Tokenised pairs, in their order.

    Attributes:
      prompts: as they are read: where a prompt does not fit, its left is gone.
      truncated: number of those.
      max_target: tokens of the longest answer, EOS included.
      longest: tokens of the longest row that are fed, which is all but the last one.
      longest_decoded: the same of the longest prompt with the longest answer, which a model may
        give it though it is another example's.
      fingerprint: SHA-256 over all tokens and weights, as hex digits.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: Tokenizer, max_length: int):
        """Tokenises.

        Args:
          pairs: at least one.
          tokenizer: of the model.
          max_length: tokens that are fed at most. Every prompt leaves room for the longest answer.

        Raises:
          ValueError: an answer leaves no room for a prompt.
        """
        self._eos_id, self._pad_id = tokenizer.eos_id, tokenizer.pad_id
        targets = [
            np.append(ids, tokenizer.eos_id)
            for ids in tokenizer.encode_arrays([pair.answers[0] for pair in pairs])
        ]
        answers = list(dict.fromkeys(answer for pair in pairs for answer in pair.answers))
        lengths = [len(ids) + 1 for ids in tokenizer.encode_arrays(answers)]
        self.max_target = max(lengths)
        room = max_length - self.max_target
        if room < 1:
            longest = answers[int(np.argmax(lengths))]
            raise ValueError(
                f"data.seq_len={max_length}: the answer {longest[:60]!r} has {self.max_target} "
                "tokens with its end and leaves no room for a prompt; use longer rows"
            )
        self.prompts = [_fitted(pair.prompt, tokenizer, room) for pair in pairs]
        self.truncated = sum(p != pair.prompt for p, pair in zip(self.prompts, pairs))
        prompts = tokenizer.encode_arrays(self.prompts)
        self._prompt_lengths = np.array([len(ids) for ids in prompts])
        self._tokens = [
            np.concatenate([[tokenizer.eos_id], prompt, target]).astype(np.int32)
            for prompt, target in zip(prompts, targets)
        ]
        self.longest = max(map(len, self._tokens)) - 1
        self.longest_decoded = int(self._prompt_lengths.max()) + self.max_target
        digest = hashlib.sha256(self._prompt_lengths.astype("<i8").tobytes())
        for tokens in self._tokens:
            digest.update(len(tokens).to_bytes(8, "little") + tokens.astype("<i4").tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._tokens)

    def arrays(self, ids: Sequence[int] | np.ndarray, rows: int, seq_len: int) -> Arrays:
        """The examples `ids` and then rows without any, `rows` in all, as in loader.py."""
        tokens = np.full((rows, seq_len + 1), self._pad_id, np.int32)
        weights = np.zeros((rows, seq_len), np.float32)
        for i, index in enumerate(ids):
            row = self._tokens[index]
            tokens[i, : len(row)] = row
            weights[i, self._prompt_lengths[index] : len(row) - 1] = 1
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        return {"inputs": inputs, "targets": targets, "weights": weights}


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Steps that have each example once; the last one may have fewer than `batch_size`."""
    return -(-num_examples // batch_size)


def example_ids(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Examples of a step, counted from 0: (batch_size,) int64, fewer in the last of an epoch."""
    epoch, step_of_epoch = divmod(step, steps_per_epoch(num_examples, batch_size))
    return _order(seed, epoch, num_examples)[
        step_of_epoch * batch_size : (step_of_epoch + 1) * batch_size
    ]


def eval_ids(num_examples: int, batch_size: int, max_batches: int) -> np.ndarray:
    """Examples that an evaluation reads, one after the other: (n,) int64.

    Args:
      num_examples: of the split.
      batch_size: of the evaluation.
      max_batches: 0 for all examples in their order. Else so many batches of an order at random
        that is always the same: the first examples may all be of one class, or of one speaker.
    """
    if not max_batches:
        return np.arange(num_examples)
    return shuffled(0, 0, num_examples)[: max_batches * batch_size]


def train_example_batches(
    examples: Examples,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    sharding: Sharding | None = None,
    prefetch: int = 2,
) -> Prefetcher:
    """As `loader.train_batches`, of examples; seq_len is at least `examples.longest`."""

    def make_batch(step: int) -> tuple[int, Batch]:
        ids = example_ids(seed, step, batch_size, len(examples))

        def read(start: int, stop: int) -> Arrays:
            return examples.arrays(ids[start:stop], stop - start, seq_len)

        return step, global_batch(read, (batch_size, seq_len), sharding)

    return Prefetcher(make_batch, range(start_step, stop_step), prefetch)


def eval_example_batches(
    examples: Examples,
    *,
    seq_len: int,
    batch_size: int,
    sharding: Sharding | None = None,
    max_batches: int = 0,
) -> Iterator[Batch]:
    """The examples of `eval_ids`; the last batch is filled up with rows of weight 0."""
    chosen = eval_ids(len(examples), batch_size, max_batches)
    for first in range(0, len(chosen), batch_size):

        def read(start: int, stop: int, first: int = first) -> Arrays:
            return examples.arrays(chosen[first + start : first + stop], stop - start, seq_len)

        yield global_batch(read, (batch_size, seq_len), sharding)


def _fitted(prompt: str, tokenizer: Tokenizer, room: int) -> str:
    """The prompt, or as much of its end as has at most `room` tokens when it is read by itself."""
    ids = tokenizer.encode(prompt)
    kept = room
    while len(ids) > room:
        prompt = tokenizer.decode(ids[len(ids) - kept :])
        ids, kept = tokenizer.encode(prompt), kept - 1
    return prompt


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return shuffled(seed, epoch, num_examples)
