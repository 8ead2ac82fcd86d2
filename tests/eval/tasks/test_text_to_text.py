"""SuperGLUE as text to text, to the byte."""

import pytest

from eval.tasks.catalogue import TASKS
from eval.tasks.prompts import check
from eval.tasks.text_to_text import PROMPTS
from tests.eval.tasks.test_prompts import MARKED, MULTIRC, RAW, RECORD

ROWS = {**RAW, "multirc": MULTIRC, "record": RECORD}
RENDERED = {
    "boolq": "passage: Fire is hot.\nquestion: is fire hot\nboolq: True",
    "cb": "premise: It rained.\nhypothesis: it was wet\ncb: neutral",
    "copa": "choice1: The Grass dried.\nchoice2: The road was wet.\npremise: It rained.\n"
    "question: effect\ncopa: choice2",
    "multirc": "paragraph: It rained.\nquestion: Was it dry?\nanswer: No\nmultirc: True",
    "record": "passage: Ann met Bob.\nThey talked\nIt rained\nentities: Ann, Bob\n"
    "query: @placeholder came first.\nrecord: Bob",
    "wsc": f"text: {MARKED}\npronoun: She\nnoun: Ann\nwsc: True",
}


@pytest.mark.parametrize("name", RENDERED)
def test_what_is_read_and_what_is_wanted(name):
    (row,) = TASKS[name].source.rows(ROWS[name])
    (example,) = PROMPTS[name](row)
    check(example)
    gold = example.golds[0]
    assert example.contexts[gold] + example.continuations[gold] == RENDERED[name] == example.shot


def test_rte_and_wic_have_their_labels_in_the_order_of_the_rows():
    row = {"premise": "A.", "hypothesis": "B.", "gold": 1}
    assert PROMPTS["rte"](row)[0].shot == "premise: A.\nhypothesis: B.\nrte: not_entailment"
    row = {"sentence1": "A run.", "sentence2": "I run.", "word": "run", "gold": 0}
    assert PROMPTS["wic"](row)[0].shot == (
        "sentence1: A run.\nsentence2: I run.\nword: run\nwic: False"
    )
    (row,) = TASKS["cb"].source.rows({**RAW["cb"], "label": "contradiction"})
    assert PROMPTS["cb"](row)[0].shot.endswith("cb: contradiction")


def test_it_is_all_of_superglue():
    assert set(PROMPTS) == {"boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"}


def test_a_label_out_of_range_is_refused():
    with pytest.raises(ValueError, match="label 3 is out of range"):
        PROMPTS["rte"]({"premise": "A.", "hypothesis": "B.", "gold": 3})
