"""From a CTC model's logits to words, and from words to the word error rate."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.reading.examples import eval_ids
from data.speech.batches import eval_batches
from data.speech.store import Split
from laser.training import preemption, sharding
from laser.training.config import RunConfig
from laser.training.objectives.speech import greedy_paths
from laser.training.share import over_batch
from laser.training.speech_rows import shape, train_sample
from models.conformer import BLANK
from models.families import Parameters


def collapse(path: np.ndarray) -> list[int]:
    """Labels of a greedy path, (T,) int: of neighbours that are equal one, and no blanks."""
    first = np.diff(path, prepend=BLANK) != 0
    return path[first & (path != BLANK)].tolist()


class Errors(NamedTuple):
    """Insertions, deletions and substitutions, and the words of the references, of a corpus."""

    edits: int
    words: int

    @property
    def rate(self) -> float:
        """The word error rate: above 1 where more is inserted than was said."""
        return self.edits / max(self.words, 1)


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> Errors:
    """Of transcripts, words being what blanks separate."""
    pairs = [(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True)]
    return Errors(sum(edit_distance(*pair) for pair in pairs), sum(len(r) for r, _ in pairs))


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """The least number of insertions, deletions and substitutions (Levenshtein)."""
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, start=1):
        above, row = row, [i]
        for j, other in enumerate(hypothesis):
            row.append(min(above[j] + (word != other), above[j + 1] + 1, row[j] + 1))
    return row[-1]


def make_evaluation(
    config: RunConfig,
    mesh: Mesh,
    validation: Split,
    test: Split | None = None,
    train: Split | None = None,
) -> Callable[..., dict[str, float]]:
    """A function from parameters on `mesh` to {"eval/wer": word error rate} of greedy decoding.

    With further recordings, a test split, also to their rate as "eval/wer/test"; and where it is
    called with `at_end=True`, to that of a fixed sample of `train` as "eval/wer/train".

    All hosts call it, and each has the paths of all rows.

    Args:
      config: of the run, a resolved one.
      mesh: of the run.
      validation, test: what is transcribed; of each so many batches as training.eval_batches says.
      train: of it `train_sample`.
    """

    def paths(params, batch):
        greedy = functools.partial(greedy_paths, config)
        return over_batch(greedy, params, batch, lambda _, rows: rows)

    transcribe = jax.jit(
        sharding.on_mesh(mesh, paths), out_shardings=NamedSharding(mesh, PartitionSpec())
    )

    def rate(params: Parameters, split: Split, limit: int) -> float:
        hypotheses: list[str] = []
        rows = shape(config)
        ids = eval_ids(len(split), rows.rows, limit)
        batches = eval_batches(
            split, rows, sharding=sharding.batch_sharding(mesh), max_batches=limit
        )
        for batch in batches:
            preemption.between_batches()
            found = np.asarray(transcribe(params, batch))
            hypotheses += [split.tokenizer.decode(collapse(path)) for path in found]
        references = [split.text(number) for number in ids]
        # The last batch is filled up.
        return word_errors(references, hypotheses[: len(ids)]).rate

    def evaluate(params: Parameters, at_end: bool = False) -> dict[str, float]:
        limit = config.training.eval_batches
        rates = {"eval/wer": rate(params, validation, limit)}
        if test is not None:
            rates["eval/wer/test"] = rate(params, test, limit)
        if at_end and train is not None:
            rates["eval/wer/train"] = rate(params, train, train_sample(config, len(validation)))
        return rates

    return evaluate
