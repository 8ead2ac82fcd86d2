"""Evaluates a model on a task: demonstrations, scores, choices, metrics over several seeds.

Everything that is random is a function of the seed and of the examples' order in the source, as in
lm-evaluation-harness (its default seed is FIRST_SEED), never of batches or devices. Where a prompt
does not fit, `gpt3` leaves out whole demonstrations before it cuts the context from the left;
`lm_eval` cuts from the left at once, as the harness does. Both are counted.
"""

import dataclasses
import functools
import hashlib
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from eval.likelihood.metrics import METRICS, Candidate, Judged, accuracy, chance, choose
from eval.likelihood.scoring import Progress, Request, Score, Scorer, encode_pairs
from eval.tasks import sources
from eval.tasks.catalogue import Asking, Protocol, Task
from eval.tasks.prompts import Example
from eval.tasks.sources import Loaded
from models.families import Parameters

FIRST_SEED = 1234
SEEDS = {"gpt3": 5, "lm_eval": 1}  # unless asked: the harness draws demonstrations once
BETWEEN_SHOTS = "\n\n"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an evaluation does: protocol, demonstrations, how many seeds, and at most how many
    examples of each task (None: all)."""

    protocol: Protocol = "gpt3"
    shots: int = 1
    seeds: int = 1
    limit: int | None = None

    def __post_init__(self):
        for name, minimum in (("shots", 0), ("seeds", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name}={value}: must be at least {minimum}")


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's examples, ready to be put to any model.

    Attributes:
      loaded: what is evaluated.
      pool: what demonstrations are drawn from; empty if there are none to draw.
      own_pool: the pool is the set itself, so an example is never its own demonstration.
    """

    task: Task
    asking: Asking
    split: str
    loaded: Loaded
    pool: Sequence[Example]
    own_pool: bool

    @functools.cached_property
    def fingerprint(self) -> str:
        """Stands for all rows that were read, as they are asked and judged, wherever they lie."""
        asking = dataclasses.asdict(self.asking)
        del asking["prompt"]  # what it makes of the rows is in the examples
        digest = hashlib.sha256(repr(asking).encode())
        for example in self.loaded.examples:
            # ReCoRD's candidates share a long passage.
            same = len(set(example.contexts)) == 1
            contexts = example.contexts[:1] if same else example.contexts
            digest.update(repr(dataclasses.replace(example, contexts=contexts)).encode())
        for example in () if self.own_pool else self.pool:
            digest.update(repr(example.shot).encode())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Prompted:
    """An example with its demonstrations, in order."""

    example: Example
    shots: tuple[str, ...]

    def contexts(self) -> list[str]:
        """What the model reads before each candidate."""
        before = "".join(shot + BETWEEN_SHOTS for shot in self.shots)
        return [before + context for context in self.example.contexts]


def load_task(
    task: Task,
    settings: Settings,
    data_dir: Path | None,
    stand_ins: Sequence[str] = sources.STAND_INS,
) -> TaskData:
    """Reads a task's data; one of `stand_ins` is evaluated where the protocol's split is not there.

    Raises:
      sources.MissingData: they are not there; the message says how to get them.
      ValueError: a row can't be used, or there are fewer examples than demonstrations.
    """
    asking = task.protocols[settings.protocol]
    split = sources.available_split(task.source, asking.split, data_dir, stand_ins)
    loaded = sources.load(task.source, split, asking.prompt, data_dir)
    pool, own_pool = loaded.examples, asking.shots == split
    if settings.shots and not own_pool:
        pool = sources.load(task.source, asking.shots, asking.prompt, data_dir).examples
    if len(pool) <= settings.shots:
        raise ValueError(f"shots={settings.shots}: {task.name} has only {len(pool)} to draw from")
    return TaskData(task, asking, split, loaded, pool, own_pool)


def prompted(data: TaskData, settings: Settings, seed: int) -> list[Prompted]:
    """The examples with their demonstrations, in the order of the source."""
    examples = data.loaded.examples[: settings.limit]
    if not settings.shots:
        return [Prompted(example, ()) for example in examples]
    draw = random.Random(seed)
    # The harness draws one more, to have one left if it drew the example itself, for all tasks
    # that have no test split of their own, and never for the others.
    harness = settings.protocol == "lm_eval"
    spare = data.asking.split == "validation" if harness else data.own_pool
    result = []
    for example in examples:
        excluded = example if spare and data.own_pool else None
        shots = _draw(draw, data.pool, settings.shots, spare, excluded)
        result.append(Prompted(example, tuple(shot.shot for shot in shots)))
    return result


def _draw(
    draw: random.Random,
    pool: Sequence[Example],
    count: int,
    spare: bool,
    excluded: Example | None,
) -> list[Example]:
    """`count` of the pool, none of them equal to `excluded`; with `spare` one more is drawn."""
    drawn = [example for example in draw.sample(pool, count + spare) if example != excluded]
    if len(drawn) < count:  # the pool has several copies of it
        drawn = draw.sample([example for example in pool if example != excluded], count)
    return drawn[:count]


def evaluate_task(
    data: TaskData,
    settings: Settings,
    scorer: Scorer,
    params: Parameters,
    tokenizer: Tokenizer,
    progress: Progress | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Scores a task and reports it.

    Args:
      data: of `load_task`.
      settings: the same.
      scorer, params, tokenizer: the model.
      progress: called with requests done and in all, over all seeds.
      on_record: called with a record of every example and seed: prompt, scores, choice.

    Returns:
      What is written as JSON: the task and its settings, n, `metrics` (name → mean, deviation
      over seeds or None, the value of each seed), `chance`, and how many prompts were cut.
    """
    started = time.perf_counter()
    seeds = range(FIRST_SEED, FIRST_SEED + (settings.seeds if settings.shots else 1))
    examples = data.loaded.examples[: settings.limit]
    cut = {"shots_dropped": 0, "truncated": 0}
    per_seed: list[dict[str, float]] = []
    unconditional = _unconditional(data.asking, examples, scorer, params, tokenizer)
    for number, seed in enumerate(seeds):
        prompts = prompted(data, settings, seed)
        requests = encode_prompts(prompts, tokenizer)
        if settings.protocol == "gpt3":
            cut["shots_dropped"] += _drop_shots(prompts, requests, tokenizer, scorer.max_length)
        scores = score_grouped(scorer, params, requests, _part_of(progress, number, len(seeds)))
        cut["truncated"] += sum(any(s.truncated for s in group) for group in scores)
        candidates = [
            _candidates(prompt.example, group, unconditional)
            for prompt, group in zip(prompts, scores)
        ]
        per_seed.append(_metrics(data.asking, examples, candidates))
        if on_record:
            for index, (prompt, group) in enumerate(zip(prompts, candidates)):
                on_record(_record(index, seed, prompt, group, data.asking.normalisation))
    return {
        "task": data.task.name,
        **dataclasses.asdict(settings),
        "split": data.split,
        "origin": data.loaded.origin,
        "unusable_rows": data.loaded.hidden,
        "n": len(examples),
        "metric": data.asking.metrics[0],
        "metrics": {name: spread([values[name] for values in per_seed]) for name in per_seed[0]},
        "chance": chance(examples),
        **cut,
        "seconds": time.perf_counter() - started,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample deviation (None for a single value) and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def encode_prompts(prompts: Sequence[Prompted], tokenizer: Tokenizer) -> list[list[Request]]:
    """A request for each candidate of each prompt."""
    contexts = [context for prompt in prompts for context in prompt.contexts()]
    endings = [text for prompt in prompts for text in prompt.example.continuations]
    requests = iter(encode_pairs(tokenizer, contexts, endings))
    return [[next(requests) for _ in prompt.example.continuations] for prompt in prompts]


def score_grouped(
    scorer: Scorer,
    params: Parameters,
    groups: Sequence[Sequence[Request]],
    progress: Progress | None = None,
) -> list[list[Score]]:
    """Scores of groups of requests, all in the same batches."""
    scores = iter(scorer.score(params, [r for group in groups for r in group], progress))
    return [[next(scores) for _ in group] for group in groups]


def check_lengths(
    data: TaskData, settings: Settings, tokenizer: Tokenizer, max_length: int
) -> None:
    """Raises ValueError that names the row of a candidate that a model of `max_length` tokens
    can't score."""
    zero_shot = dataclasses.replace(settings, shots=0)  # what is shown before changes no candidate
    prompts = prompted(data, zero_shot, FIRST_SEED)
    long = [i for i, prompt in enumerate(prompts) if _longest(prompt.example) >= max_length]
    for i, group in zip(long, encode_prompts([prompts[i] for i in long], tokenizer)):
        for request in group:
            if len(request.continuation) > max_length:
                raise ValueError(
                    f"{data.task.name}: {data.loaded.place(i)}: the candidate "
                    f"{tokenizer.decode(request.continuation)[:60]!r} has "
                    f"{len(request.continuation)} tokens, more than the model's {max_length}"
                )


def _longest(example: Example) -> int:
    """Bytes of the longest candidate, with the space that may go over from its context: as many
    tokens at most."""
    return max(
        len((context[len(context.rstrip()) :] + text).encode())
        for context, text in zip(example.contexts, example.continuations)
    )


def _drop_shots(
    prompts: list[Prompted], requests: list[list[Request]], tokenizer: Tokenizer, max_length: int
) -> int:
    """Leaves out demonstrations, the first one first, from prompts that are too long, for all
    candidates alike. Changes both lists; returns how many prompts lost any."""
    changed: set[int] = set()
    while True:
        long = [
            i
            for i, group in enumerate(requests)
            if prompts[i].shots and any(request.length > max_length for request in group)
        ]
        if not long:
            return len(changed)
        for i in long:
            prompts[i] = Prompted(prompts[i].example, prompts[i].shots[1:])
        for i, group in zip(long, encode_prompts([prompts[i] for i in long], tokenizer)):
            requests[i] = group
        changed.update(long)


def _unconditional(
    asking: Asking,
    examples: Iterable[Example],
    scorer: Scorer,
    params: Parameters,
    tokenizer: Tokenizer,
) -> dict[str, float]:
    """Log-probability of each continuation after the unconditional context."""
    if asking.normalisation != "unconditional":
        return {}
    texts = list(dict.fromkeys(text for example in examples for text in example.continuations))
    requests = encode_pairs(tokenizer, [asking.unconditional] * len(texts), texts)
    return {text: s.logprob for text, s in zip(texts, scorer.score(params, requests))}


def _candidates(
    example: Example, scores: Sequence[Score], unconditional: dict[str, float]
) -> list[Candidate]:
    return [
        Candidate(score.logprob, score.tokens, len(choice), unconditional.get(text, 0.0))
        for score, choice, text in zip(scores, example.choices, example.continuations)
    ]


def _metrics(
    asking: Asking, examples: Sequence[Example], candidates: Sequence[Sequence[Candidate]]
) -> dict[str, float]:
    def judged(normalisation):
        return [Judged(e, choose(group, normalisation)) for e, group in zip(examples, candidates)]

    main = judged(asking.normalisation)
    metrics = {name: METRICS[name](main) for name in asking.metrics}
    for normalisation in asking.also:
        name = "acc_norm" if normalisation == "character" else f"accuracy_{normalisation}"
        metrics[name] = accuracy(judged(normalisation))  # the harness's name, where it has one
    return metrics


def _record(
    index: int, seed: int, prompt: Prompted, group: Sequence[Candidate], normalisation: str
) -> dict[str, Any]:
    contexts = prompt.contexts()
    return {
        "index": index,
        "seed": seed,
        "context": contexts[0] if len(set(contexts)) == 1 else contexts,
        "continuations": prompt.example.continuations,
        "golds": prompt.example.golds,
        "choice": choose(group, normalisation),
        "candidates": [dataclasses.asdict(candidate) for candidate in group],
    }


def _part_of(progress: Progress | None, number: int, parts: int) -> Progress | None:
    """Progress of one of several equal parts."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, parts * total)
