"""Greedy decoding and the word error rate on cases that can be counted by hand."""

import numpy as np
import pytest

from eval.speech import collapse, edit_distance, word_errors


@pytest.mark.parametrize(
    "path, labels",
    [
        ([0, 3, 3, 0, 3, 4, 4], [3, 3, 4]),
        ([3, 3, 4, 0, 0, 5], [3, 4, 5]),
        ([0, 0, 0], []),
        ([], []),
    ],
)
def test_collapse(path, labels):
    assert collapse(np.array(path, int)) == labels


@pytest.mark.parametrize(
    "reference, hypothesis, distance",
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abcd", "abcd", 0),
        ("intention", "execution", 5),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance(reference, hypothesis, distance):
    assert edit_distance(reference, hypothesis) == distance
    assert edit_distance(hypothesis, reference) == distance


def test_word_errors_are_of_the_whole_corpus():
    """And not a mean over its lines."""
    errors = word_errors(["the cat sat on the mat", "yes"], ["the cat sit on mat", "oh no"])
    assert errors == (4, 7)  # a substitution and a deletion; a substitution and an insertion
    assert errors.rate == pytest.approx(4 / 7)
    assert word_errors(["a"], ["b c d"]).rate == 3.0
    assert word_errors([""], ["a"]).rate == 1.0
