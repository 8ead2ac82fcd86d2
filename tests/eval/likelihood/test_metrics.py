"""Every normalisation and metric on cases small enough to count on paper."""

import math

import pytest

from eval.likelihood import metrics
from eval.likelihood.metrics import Candidate, Judged, choose
from eval.tasks.prompts import Example


def example(golds=(0,), choices=("a", "b"), **rest):
    texts = tuple(f" {choice}" for choice in choices)
    return Example(("",) * len(choices), texts, tuple(choices), tuple(golds), "", **rest)


def judged(*pairs, **rest):
    """(choice, gold) pairs of examples with three candidates."""
    return [Judged(example((gold,), ("x", "y", "z"), **rest), choice) for choice, gold in pairs]


# Three candidates, of which each normalisation prefers another one.
CANDIDATES = [
    Candidate(logprob=-6.0, tokens=1, characters=4, unconditional=-5.0),  # sum: the largest
    Candidate(logprob=-8.0, tokens=4, characters=5, unconditional=-6.5),  # -2 a token: the largest
    Candidate(logprob=-9.0, tokens=3, characters=20, unconditional=-9.5),  # -0.45 a character
]


@pytest.mark.parametrize(
    "normalisation, chosen",
    [("sum", 0), ("partial", 0), ("token", 1), ("character", 2), ("unconditional", 2)],
)
def test_each_normalisation_chooses_by_its_own_number(normalisation, chosen):
    assert choose(CANDIDATES, normalisation) == chosen


@pytest.mark.parametrize(
    "normalisation, values",
    [
        ("sum", [-6, -8, -9]),
        ("partial", [-6, -8, -9]),
        ("token", [-6, -2, -3]),
        ("character", [-1.5, -1.6, -0.45]),
        ("unconditional", [-1, -1.5, 0.5]),
    ],
)
def test_values_of_the_normalisations(normalisation, values):
    assert [metrics.NORMALISATIONS[normalisation](c) for c in CANDIDATES] == pytest.approx(values)


def test_of_equal_scores_the_first_is_chosen():
    same = Candidate(-3.0, 2, 5)
    assert choose([Candidate(-4.0, 2, 5), same, same], "sum") == 1
    assert choose([Candidate(-4.0, 2, 8), Candidate(-2.0, 1, 4)], "token") == 0


def test_accuracy_takes_any_of_several_golds():
    of_two = Judged(example((0, 2), ("a", "b", "c")), 2)
    assert metrics.accuracy([of_two, *judged((1, 1), (0, 1), (2, 0))]) == 0.5


def test_macro_f1_by_hand():
    # Class 0: 2 said, 3 there, 2 hits: 4/5. Class 1: 3 said, 2 there, 2 hits: 4/5. Class 2: 0.
    answers = judged((0, 0), (0, 0), (1, 0), (1, 1), (1, 1))
    assert metrics.macro_f1(answers) == pytest.approx((0.8 + 0.8 + 0) / 3)


@pytest.mark.parametrize("positive", [0, 1])
def test_f1a_counts_answers_said_to_be_right(positive):
    other = 1 - positive
    pairs = [(positive, positive)] * 3 + [(positive, other)] * 2 + [(other, positive)] * 1
    pairs += [(other, other)] * 4
    # Precision 3/5, recall 3/4: 2 * 0.45 / 1.35.
    assert metrics.answer_f1(judged(*pairs, positive=positive)) == pytest.approx(2 / 3)


def test_f1a_is_zero_where_nothing_was_found():
    assert metrics.answer_f1(judged((1, 0), (1, 0), positive=0)) == 0


def test_a_question_is_exact_if_all_of_its_answers_are():
    answers = judged((0, 0), (1, 1), group="first") + judged((0, 0), (1, 0), group="second")
    answers += judged((1, 1), group="third")
    assert metrics.question_exact(answers) == pytest.approx(2 / 3)


def entities(choice, answers=("Barack Obama", "the White House")):
    choices = ("Obama", "White House", "Barack Obama Jr.", "Putin")
    return Judged(example((), choices, answers=answers), choice)


@pytest.mark.parametrize(
    "choice, em, f1",
    [
        (0, 0, 2 / 3),  # one of one word, one of two
        (1, 1, 1),  # an article makes no difference
        (2, 0, 0.8),  # two of three words, two of two
        (3, 0, 0),
    ],
)
def test_entities_are_compared_with_the_best_of_several_golds(choice, em, f1):
    assert metrics.entity_exact([entities(choice)]) == em
    assert metrics.entity_f1([entities(choice)]) == pytest.approx(f1)


def test_entity_metrics_are_means_over_queries():
    assert metrics.entity_exact([entities(1), entities(3)]) == 0.5
    assert metrics.entity_f1([entities(1), entities(3), entities(0)]) == pytest.approx(5 / 9)


def test_word_f1_counts_repetitions():
    assert metrics.word_f1("New New York", "new new york, Times!") == pytest.approx(6 / 7)
    assert metrics.word_f1("the", "The") == 1  # nothing is left of either
    assert metrics.word_f1("the", "York") == 0


def test_chance_is_the_mean_share_of_golds():
    examples = [example((0,)), example((1, 2), ("a", "b", "c", "d")), example((0,), "abc")]
    assert math.isclose(metrics.chance(examples), (1 / 2 + 2 / 4 + 1 / 3) / 3)
