"""Demonstrations, truncation, and whole tasks with scorers whose answers are known."""

import dataclasses
import random

import pytest

from data.tokenizer import Tokenizer
from eval.likelihood import oneshot
from eval.likelihood.oneshot import FIRST_SEED, Settings, TaskData
from eval.likelihood.scoring import Score, Scorer
from eval.tasks.catalogue import OFFLINE, TASKS, Asking
from eval.tasks.prompts import Example
from eval.tasks.sources import Loaded
from models.config import ModelConfig
from models.families import init_parameters
from tests.real_data import EVALDATA, needs_evaldata

REAL = ("arc_easy", "cb", "copa", "multirc", "record", "rte", "winogrande")


@pytest.fixture(scope="module")
def tokenizer(store):
    return Tokenizer(store / "tokenizer.model")


class StubScorer:
    """Scores by a function of the request in place of a model."""

    def __init__(self, logprob, max_length=10**9):
        self.max_length = max_length
        self._logprob = logprob
        self.seen = []

    def score(self, params, requests, progress=None):
        self.seen += requests
        if progress:
            progress(len(requests), len(requests))
        return [
            Score(self._logprob(r), len(r.continuation), False, r.length > self.max_length)
            for r in requests
        ]


def example(name, gold=0):
    return Example(
        contexts=(f"Q {name}:",) * 2,
        continuations=(" yes", " no"),
        choices=("yes", "no"),
        golds=(gold,),
        shot=f"Q {name}: {('yes', 'no')[gold]}",
    )


def task_data(count=5, pool=None, split="validation", **asking):
    asking = {"normalisation": "sum", **asking}
    examples = [example(f"e{i}") for i in range(count)]
    return TaskData(
        OFFLINE,
        Asking(lambda row: [], split, "train", **asking),
        split,
        Loaded(examples, "here"),
        examples if pool is None else pool,
        pool is None,
    )


POOL = [example(f"p{i}", i % 2) for i in range(20)]


def test_demonstrations_follow_from_the_seed_and_are_joined_by_blank_lines():
    data, settings = task_data(pool=POOL), Settings(shots=2)
    prompts = oneshot.prompted(data, settings, 7)
    assert prompts == oneshot.prompted(data, settings, 7)
    assert prompts != oneshot.prompted(data, settings, 8)
    first, second = prompts[0].shots
    assert first != second
    assert prompts[0].contexts() == [f"{first}\n\n{second}\n\nQ e0:"] * 2
    draw = random.Random(7)
    expected = [tuple(e.shot for e in draw.sample(POOL, 2)) for _ in range(5)]
    assert [prompt.shots for prompt in prompts] == expected
    assert oneshot.prompted(data, Settings(shots=0), 7)[3].contexts() == ["Q e3:"] * 2


def test_an_example_never_demonstrates_itself():
    data = task_data(count=3)
    for seed in range(30):
        for prompt in oneshot.prompted(data, Settings(shots=2), seed):
            assert prompt.example.shot not in prompt.shots
            assert len(prompt.shots) == 2


def test_the_harness_draws_one_more_where_there_is_no_test_split():
    settings = Settings("lm_eval", shots=1)
    draw = random.Random(3)
    expected = [draw.sample(POOL, 2)[0].shot for _ in range(5)]
    prompts = oneshot.prompted(task_data(pool=POOL), settings, 3)
    assert [prompt.shots[0] for prompt in prompts] == expected
    draw = random.Random(3)
    expected = [draw.sample(POOL, 1)[0].shot for _ in range(5)]
    prompts = oneshot.prompted(task_data(pool=POOL, split="test"), settings, 3)
    assert [prompt.shots[0] for prompt in prompts] == expected


def test_more_demonstrations_than_examples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shots=300: held_out has only 300 to draw from"):
        oneshot.load_task(OFFLINE, Settings(shots=300), tmp_path)
    for wrong in ({"shots": -1}, {"seeds": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            Settings(**wrong)


def test_prompts_that_are_too_long_lose_demonstrations_for_all_candidates_alike(tokenizer):
    data = task_data(pool=POOL)
    lengths = {}
    for shots in (0, 1, 2):
        prompt = oneshot.prompted(data, Settings(shots=shots), FIRST_SEED)[0]
        lengths[shots] = max(r.length for r in oneshot.encode_prompts([prompt], tokenizer)[0])
    assert lengths[0] < lengths[1] < lengths[2]

    def run(limit, protocol="gpt3"):
        scorer = StubScorer(lambda r: 0.0, limit)
        settings = Settings(protocol, shots=2, limit=1)
        result = oneshot.evaluate_task(data, settings, scorer, {}, tokenizer)
        return result, scorer.seen

    result, seen = run(lengths[2])
    assert (result["shots_dropped"], result["truncated"]) == (0, 0)
    result, seen = run(lengths[2] - 1)
    assert (result["shots_dropped"], result["truncated"]) == (1, 0)
    text = tokenizer.decode(seen[0].context)
    last = oneshot.prompted(data, Settings(shots=2), FIRST_SEED)[0].shots[1]
    assert text == f"{last}\n\nQ e0:"  # the first one is gone
    assert seen[0].context == seen[1].context
    result, seen = run(lengths[0] - 1)
    assert (result["shots_dropped"], result["truncated"]) == (1, 1)
    assert tokenizer.decode(seen[0].context) == "Q e0:"
    result, seen = run(lengths[2] - 1, "lm_eval")  # the scorer cuts, as the harness does
    assert (result["shots_dropped"], result["truncated"]) == (0, 1)


def test_unconditional_scores_are_subtracted(tokenizer):
    data = task_data(1, normalisation="unconditional", unconditional="Answer:", also=("sum",))
    yes, no = (tuple(tokenizer.encode(f"Q e0:{t}"))[-1:] for t in (" yes", " no"))
    assert yes != no
    start = (tokenizer.eos_id, *tokenizer.encode("Answer:"))
    conditional = {yes: -4.0, no: -3.0}  # "no" is likelier, and much likelier without a question

    def logprob(request):
        table = {yes: -6.0, no: -1.0} if request.context == start else conditional
        return table[request.continuation[-1:]]

    scorer = StubScorer(logprob)
    records = []
    result = oneshot.evaluate_task(
        data, Settings(shots=0), scorer, {}, tokenizer, on_record=records.append
    )
    assert {k: v["mean"] for k, v in result["metrics"].items()} == {
        "accuracy": 1.0,
        "accuracy_sum": 0.0,
    }
    assert [c["unconditional"] for c in records[0]["candidates"]] == [-6.0, -1.0]
    assert records[0]["choice"] == 0


def test_mean_and_deviation_over_seeds(tokenizer):
    data = task_data(pool=POOL)
    answers = iter([-1, -2] * 5 + [-2, -1] * 3 + [-1, -2] * 2)  # all right, then 2 of 5
    scorer = StubScorer(lambda r: next(answers))
    records = []
    settings = Settings(shots=1, seeds=2)
    result = oneshot.evaluate_task(data, settings, scorer, {}, tokenizer, on_record=records.append)
    accuracy = result["metrics"]["accuracy"]
    assert accuracy["values"] == [1.0, 0.4]
    assert accuracy["mean"] == pytest.approx(0.7)
    assert accuracy["std"] == pytest.approx(0.6 / 2**0.5)
    assert [record["seed"] for record in records] == [FIRST_SEED] * 5 + [FIRST_SEED + 1] * 5
    assert result["chance"] == 0.5
    single = oneshot.evaluate_task(
        data, Settings(shots=0, seeds=2), StubScorer(lambda r: 0.0), {}, tokenizer
    )
    assert single["metrics"]["accuracy"] == {"mean": 1.0, "std": None, "values": [1.0]}


def load_real(name, protocol, shots=1, limit=None):
    settings = Settings(protocol, shots=shots, limit=limit)
    return settings, oneshot.load_task(TASKS[name], settings, EVALDATA)


@needs_evaldata
@pytest.mark.parametrize("protocol", ["gpt3", "lm_eval"])
@pytest.mark.parametrize("name", REAL)
def test_a_model_that_prefers_the_gold_scores_everything(name, protocol, tokenizer):
    settings, data = load_real(name, protocol, limit=400)
    prompts = oneshot.prompted(data, settings, FIRST_SEED)
    golds = {
        request
        for prompt, group in zip(prompts, oneshot.encode_prompts(prompts, tokenizer))
        for i, request in enumerate(group)
        if i in prompt.example.golds
    }
    scorer = StubScorer(lambda r: 0.0 if r in golds else -50.0 * len(r.continuation))
    if data.asking.normalisation == "unconditional":
        scorer = StubScorer(lambda r: 0.0 if r in golds else -50.0)
    result = oneshot.evaluate_task(data, settings, scorer, {}, tokenizer)
    main = [value["mean"] for name, value in result["metrics"].items() if "_" not in name]
    assert main == [1.0] * len(main)


@needs_evaldata
@pytest.mark.parametrize("name", REAL)
def test_a_random_model_scores_at_chance(name, tokenizer):
    """Scores by lot, in the unit that the task compares, so that length does not matter."""
    settings, data = load_real(name, "gpt3", shots=0)
    draw = random.Random(0)
    per_token = data.asking.normalisation == "token"

    def logprob(request):
        return -draw.random() * (len(request.continuation) if per_token else 1)

    result = oneshot.evaluate_task(data, settings, StubScorer(logprob), {}, tokenizer)
    metric = "em" if name == "record" else "accuracy"
    chance = result["chance"]
    error = (chance * (1 - chance) / result["n"]) ** 0.5
    assert abs(result["metrics"][metric]["mean"] - chance) < 3 * error


def test_settings_are_part_of_the_result(tokenizer):
    settings = Settings(shots=1, seeds=2, limit=3)
    result = oneshot.evaluate_task(
        task_data(pool=POOL), settings, StubScorer(lambda r: 0.0), {}, tokenizer
    )
    assert {**result, **dataclasses.asdict(settings)} == result
    assert (result["n"], result["split"], result["origin"]) == (3, "validation", "here")


@pytest.mark.slow
@needs_evaldata
@pytest.mark.parametrize("name", ["arc_easy", "copa", "rte", "winogrande"])
def test_a_model_before_training_scores_at_chance(name, tokenizer):
    """A real one, on tasks whose candidates it can't tell apart by what they have in common."""
    config = ModelConfig(
        vocab_size=400, num_layers=1, model_dim=32, mlp_dim=32, num_heads=2, head_dim=16
    )
    params = init_parameters(config, 0)
    settings, data = load_real(name, "lm_eval", shots=0)
    scorer = Scorer(config, 256, row_tokens=2**15)
    result = oneshot.evaluate_task(data, settings, scorer, params, tokenizer)
    chance = result["chance"]
    error = (chance * (1 - chance) / result["n"]) ** 0.5
    assert abs(result["metrics"]["accuracy"]["mean"] - chance) < 3 * error
