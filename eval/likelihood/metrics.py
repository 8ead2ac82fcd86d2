"""From the candidates' scores to a choice, and from the choices to the numbers that are reported.

Choices: the candidate with the largest normalised score; of equal ones the first, as in
lm-evaluation-harness. Metrics are fractions between 0 and 1.
"""

import collections
import dataclasses
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from eval.tasks.prompts import Example


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is known of one candidate: log-probability in nats, tokens, characters of the choice,
    and its log-probability after the unconditional context, where the task has one."""

    logprob: float
    tokens: int
    characters: int
    unconditional: float = 0.0


NORMALISATIONS: dict[str, Callable[[Candidate], float]] = {
    "sum": lambda c: c.logprob,
    "token": lambda c: c.logprob / c.tokens,
    "character": lambda c: c.logprob / max(c.characters, 1),
    "unconditional": lambda c: c.logprob - c.unconditional,
    # log P(rest | context with option i): the rest is one text, so its sum is comparable.
    "partial": lambda c: c.logprob,
}


def choose(candidates: Sequence[Candidate], normalisation: str) -> int:
    """Index of the best candidate, the first of equal ones."""
    return int(np.argmax([NORMALISATIONS[normalisation](c) for c in candidates]))


@dataclasses.dataclass(frozen=True)
class Judged:
    """An example and the index that was chosen."""

    example: Example
    choice: int

    @property
    def correct(self) -> bool:
        return self.choice in self.example.golds


def accuracy(judged: Sequence[Judged]) -> float:
    """Share of examples whose choice is one of the golds."""
    return _mean([j.correct for j in judged])


def macro_f1(judged: Sequence[Judged]) -> float:
    """F1 of each class against the others, averaged over the classes; a class without any: 0."""
    return _mean([_f1(judged, positive=i) for i in range(len(judged[0].example.choices))])


def answer_f1(judged: Sequence[Judged]) -> float:
    """MultiRC's F1a: F1 of the answers said to be right, over all answers of all questions."""
    return _f1(judged, positive=judged[0].example.positive)


def question_exact(judged: Sequence[Judged]) -> float:
    """MultiRC's exact match: share of questions with all of their answers judged well."""
    groups: dict[str, list[bool]] = collections.defaultdict(list)
    for j in judged:
        groups[j.example.group].append(j.correct)
    return _mean([all(group) for group in groups.values()])


def entity_exact(judged: Sequence[Judged]) -> float:
    """ReCoRD's exact match: the chosen entity is one of the gold ones, normalised as in SQuAD."""
    return _mean([_best(j, lambda a, b: float(_plain(a) == _plain(b))) for j in judged])


def entity_f1(judged: Sequence[Judged]) -> float:
    """ReCoRD's F1: words of the chosen entity against the gold one that fits best."""
    return _mean([_best(j, word_f1) for j in judged])


METRICS: dict[str, Callable[[Sequence[Judged]], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "f1a": answer_f1,
    "question_exact": question_exact,
    "em": entity_exact,
    "f1": entity_f1,
}


def word_f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall over normalised words, counted with repetitions."""
    predicted, wanted = _plain(prediction).split(), _plain(gold).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def chance(examples: Sequence[Example]) -> float:
    """Expected accuracy of a choice by lot."""
    return _mean([len(e.golds) / len(e.choices) for e in examples])


def _best(judged: Judged, score: Callable[[str, str], float]) -> float:
    chosen = judged.example.choices[judged.choice]
    return max(score(chosen, answer) for answer in judged.example.answers)


def _f1(judged: Sequence[Judged], positive: int) -> float:
    """2 TP / (2 TP + FP + FN), 0 where there is nothing to find and nothing was found."""
    hits = sum(j.choice == positive and positive in j.example.golds for j in judged)
    said = sum(j.choice == positive for j in judged)
    there = sum(positive in j.example.golds for j in judged)
    return 2 * hits / (said + there) if said + there else 0.0


def _plain(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation and articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
