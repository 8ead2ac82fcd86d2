"""What the model reads, to the byte, for every task in both protocols, from written rows.

The strings of `lm_eval` are what lm-evaluation-harness 0.4.13 makes of the same rows; where it is
installed, test_lm_eval.py compares with the harness itself.
"""

import pytest

from eval.tasks.catalogue import TASKS

PASSAGE = 'Ann said " no " . She ca n\'t come , as her dog ( Rex ) is ill .'
MULTIRC = {
    "idx": 3,
    "passage": {
        "text": "It rained.",
        "questions": [
            {
                "idx": 7,
                "question": "Was it dry?",
                "answers": [{"text": "No", "label": 1}, {"text": "Yes\\", "label": 0}][:1],
            }
        ],
    },
}
RECORD = {
    "passage": {
        "text": "Ann met Bob.\n@highlight\nThey talked\n@highlight\nIt rained",
        "entities": [{"start": 8, "end": 10}, {"start": 0, "end": 2}],
    },
    "qas": [{"query": "@placeholder came first.", "answers": [{"text": "Bob"}, {"text": "Bob"}]}],
}
RACE = {
    "article": "A cat sat.",
    "questions": ["Who sat?", "It was  _  .", "Why?"],
    "options": [["cat", "dog", "cow", "pig"], ["c1", "c2", "c3", "c4"], ["w", "x", "y", "z"]],
    "answers": ["A", "B", "D"],
}
RAW = {
    "arc_easy": {
        "question": {
            "stem": "What is hot?",
            "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}],
        },
        "answerKey": "2",
    },
    "boolq": {"passage": "Fire is hot.", "question": "is fire hot", "label": True},
    "cb": {"premise": "It rained.", "hypothesis": "it was wet", "label": "neutral"},
    "copa": {
        "premise": "It rained. ",
        "choice1": "The Grass dried.",
        "choice2": "The road was wet.",
        "question": "effect",
        "label": 1,
    },
    "hellaswag": {
        "activity_label": "Baking",
        "ctx": "[header] Mix [title] Flour. he",
        "ctx_a": "[header] Mix [title] Flour.",
        "ctx_b": "he",
        "endings": ["bakes  [substeps] it.", "runs."],
        "label": 1,
    },
    "multirc": MULTIRC,
    "openbookqa": {
        "question": {
            "stem": "Fire is",
            "choices": [{"text": "hot", "label": "A"}, {"text": "cold", "label": "B"}],
        },
        "answerKey": "A",
    },
    "piqa": {"goal": "Cut bread", "sol1": "Use a knife.", "sol2": "Use soap.", "label": 0},
    "race_high": RACE,
    "record": RECORD,
    "rte": {"premise": "It rained.", "hypothesis": "It was wet.", "label": "not_entailment"},
    "storycloze": {
        **{f"InputSentence{i}": f"S{i}." for i in range(1, 5)},
        "RandomFifthSentenceQuiz1": "The end.",
        "RandomFifthSentenceQuiz2": "Again.",
        "AnswerRightEnding": "2",
    },
    "wic": {
        "sentence1": "He runs fast.",
        "sentence2": "A run of luck.",
        "word": "run",
        "start1": 3,
        "end1": 7,
        "label": False,
    },
    "winograd": {
        "text": "The men told Sue that they lost her keys.",
        "pronoun": "they",
        "pronoun_loc": 22,
        "options": ["The men", "Sue"],
        "label": 0,
    },
    "winogrande": {
        "sentence": "Sue thanked Ann as _ helped.",
        "option1": "Sue",
        "option2": "Ann",
        "answer": "2",
    },
    "wsc": {
        "text": PASSAGE,
        "target": {
            "span1_text": "Ann",
            "span2_text": "She",
            "span1_index": 0,
            "span2_index": 6,
        },
        "label": True,
    },
}
RAW["arc_challenge"], RAW["race_middle"] = RAW["arc_easy"], RAW["race_high"]

ARC = ("Question: What is hot?\nAnswer:", [" ice", " fire"], 1)
MARKED = 'Ann said "no". *She* can\'t come, as her dog (Rex) is ill.'
MARKED_THERE = MARKED.replace('said "', 'said"')  # the harness loses a space
RACE_GPT3 = (
    "Article: A cat sat.\n\nQ: Who sat?\n\nA: cat\n\nQ: It was  _  .\n\nA: c2\n\nQ: Why?\n\nA:",
    [" w", " x", " y", " z"],
    3,
)
RACE_LM_EVAL = (
    "Article: A cat sat.\n\nQuestion: Who sat?\nAnswer: cat\nIt was c2\nWhy?",
    [" w", " x", " y", " z"],
    3,
)
HIGHLIGHTS = "Ann met Bob.\n\n  - They talked.\n  - It rained.\n"
CORRECT = "No\nIs the answer correct? "
SAME_WAY = "Is the word '{}' used in the same way in the two sentences above?"
WINOGRANDE = (["Sue thanked Ann as Sue", "Sue thanked Ann as Ann"], [" helped."] * 2, 1)

EXPECTED = {
    ("arc_easy", "gpt3"): ARC,
    ("arc_easy", "lm_eval"): ARC,
    ("arc_challenge", "gpt3"): ARC,
    ("arc_challenge", "lm_eval"): ARC,
    ("boolq", "gpt3"): ("Fire is hot.\nquestion: is fire hot?\nanswer:", [" yes", " no"], 0),
    ("boolq", "lm_eval"): ("Fire is hot.\nQuestion: is fire hot?\nAnswer:", [" no", " yes"], 1),
    ("cb", "gpt3"): (
        "It rained.\nquestion: it was wet. true, false, or neither?\nanswer:",
        [" true", " false", " neither"],
        2,
    ),
    ("cb", "lm_eval"): (
        "It rained.\nQuestion: it was wet. True, False, or Neither?\nAnswer:",
        [" True", " False", " Neither"],
        2,
    ),
    ("copa", "gpt3"): (
        "It rained therefore",
        [" the Grass dried.", " the road was wet."],
        1,
    ),
    ("copa", "lm_eval"): (
        "It rained therefore",
        ["  the Grass dried.", "  the road was wet."],
        1,
    ),
    ("hellaswag", "gpt3"): (
        "Baking: [header] Mix [title] Flour. he",
        [" bakes  [substeps] it.", " runs."],
        1,
    ),
    ("hellaswag", "lm_eval"): ("Baking: Mix. Flour. He", [" bakes  it.", " runs."], 1),
    ("multirc", "gpt3"): ("It rained.\n\nWas it dry?\n-", [" [False] No", " [True] No"], 1),
    ("multirc", "lm_eval"): (
        "It rained.\nQuestion: Was it dry?\nAnswer:",
        [f" {CORRECT}yes", f" {CORRECT}no"],
        0,
    ),
    ("openbookqa", "gpt3"): ("Fire is", [" hot", " cold"], 0),
    ("openbookqa", "lm_eval"): ("Fire is", [" hot", " cold"], 0),
    ("piqa", "gpt3"): ("Cut bread", [" Use a knife.", " Use soap."], 0),
    ("piqa", "lm_eval"): ("Question: Cut bread\nAnswer:", [" Use a knife.", " Use soap."], 0),
    ("race_middle", "gpt3"): RACE_GPT3,
    ("race_high", "gpt3"): RACE_GPT3,
    ("race_middle", "lm_eval"): RACE_LM_EVAL,
    ("race_high", "lm_eval"): RACE_LM_EVAL,
    ("record", "gpt3"): (HIGHLIGHTS, ["  - Ann came first.", "  - Bob came first."], 1),
    ("record", "lm_eval"): (HIGHLIGHTS, ["   - Ann came first.", "   - Bob came first."], 1),
    ("rte", "gpt3"): (
        "It rained.\nquestion: It was wet. True or False?\nanswer:",
        [" True", " False"],
        1,
    ),
    ("rte", "lm_eval"): (
        "It rained.\nQuestion: It was wet. True or False?\nAnswer:",
        [" True", " False"],
        1,
    ),
    ("storycloze", "gpt3"): ("S1. S2. S3. S4.", [" The end.", " Again."], 1),
    ("storycloze", "lm_eval"): ("S1. S2. S3. S4.", [" The end.", " Again."], 1),
    ("wic", "gpt3"): (
        f"He runs fast.\nA run of luck.\nquestion: {SAME_WAY.format('run')}\nanswer:",
        [" yes", " no"],
        1,
    ),
    ("wic", "lm_eval"): (
        "Sentence 1: He runs fast.\nSentence 2: A run of luck.\n"
        f"Question: {SAME_WAY.format('runs')}\nAnswer:",
        [" no", " yes"],
        0,
    ),
    ("winograd", "gpt3"): (
        ["The men told Sue that the men", "The men told Sue that Sue"],
        [" lost her keys."] * 2,
        0,
    ),
    ("winograd", "lm_eval"): (
        ["The men told Sue that the men", "The men told Sue that Sue"],
        ["  lost her keys."] * 2,
        0,
    ),
    ("winogrande", "gpt3"): WINOGRANDE,
    ("winogrande", "lm_eval"): WINOGRANDE,
    ("wsc", "gpt3"): (
        f'{MARKED}\nquestion: does the pronoun "*She*" refer to "Ann"?\nanswer:',
        [" yes", " no"],
        0,
    ),
    ("wsc", "lm_eval"): (
        f"Passage: {MARKED_THERE}\nQuestion: In the passage above, does the pronoun "
        '"*She*" refer to "*Ann*"?\nAnswer:',
        [" no", " yes"],
        1,
    ),
}


def examples(name, protocol, raw=None):
    source, asking = TASKS[name].source, TASKS[name].protocols[protocol]
    return [e for row in source.rows(raw or RAW[name]) for e in asking.prompt(row)]


def test_every_task_of_the_paper_is_there_in_both_protocols():
    assert len(TASKS) == 18
    assert EXPECTED.keys() == {(name, p) for name in TASKS for p in ("gpt3", "lm_eval")}


@pytest.mark.parametrize("name, protocol", EXPECTED)
def test_prompts_to_the_byte(name, protocol):
    contexts, continuations, gold = EXPECTED[name, protocol]
    example = examples(name, protocol)[-1]
    if isinstance(contexts, str):
        contexts = [contexts] * len(continuations)
    assert list(example.contexts) == contexts
    assert list(example.continuations) == continuations
    assert example.golds == (gold,)
    shown = gold
    if (name, protocol) == ("multirc", "lm_eval"):
        shown = 1 - gold  # the harness demonstrates the wrong answer
    assert example.shot == contexts[shown] + continuations[shown]


def test_race_asks_every_question_of_the_article_in_one_protocol():
    first, second, third = examples("race_middle", "gpt3")
    assert first.contexts[0] == "Article: A cat sat.\n\nQ: Who sat?\n\nA:"
    assert second.contexts[0] == f"{first.shot}\n\nQ: It was  _  .\n\nA:"
    assert [e.golds for e in (first, second, third)] == [(0,), (1,), (3,)]
    assert len(examples("race_middle", "lm_eval")) == 1


def test_record_demonstrates_one_gold_and_takes_all():
    raw = {
        **RECORD,
        "qas": [{"query": "@placeholder", "answers": [{"text": t} for t in ("Bob", "Ann")]}],
    }
    example = examples("record", "gpt3", raw)[0]
    assert example.golds == (0, 1)
    assert example.answers == ("Ann", "Bob")
    assert example.shot == f"{HIGHLIGHTS}  - Ann"


def test_the_noun_takes_the_case_and_the_possessive_of_the_pronoun():
    raw = {"text": "My dog barks.", "pronoun": "My", "pronoun_loc": 0, "label": 0}
    example = examples("winograd", "gpt3", {**raw, "options": ["the boy", "Ann"]})[0]
    assert example.contexts == ("The boy's", "Ann's")
    assert example.continuations == (" dog barks.",) * 2


def test_a_noun_that_has_its_possessive_keeps_one():
    raw = {"text": "Her mother died.", "pronoun": "Her", "pronoun_loc": 0, "label": 0}
    example = examples("winograd", "gpt3", {**raw, "options": ["Emma's", "Ann"]})[0]
    assert example.contexts == ("Emma's", "Ann's")
    harness = examples("winograd", "lm_eval", {**raw, "options": ["Emma's", "Ann"]})[0]
    assert harness.contexts == ("Emma's's", "Ann's")


@pytest.mark.parametrize(
    "text, index, shown",
    [
        ('It was " it " , he said .', 3, 'It was "*it*", he said.'),
        ('It was "it", he said.', 3, 'It was "it", *he* said.'),
        ("Ann 's dog said 'no' : it ran !", 6, "Ann's dog said 'no': *it* ran!"),
        ('"It ran" and it  fell', 3, '"It ran" and *it* fell'),
        ('A 5" dog as it ran', 4, 'A 5" dog as *it* ran'),
    ],
)
def test_the_passage_of_wsc_keeps_its_quotation_marks_apart(text, index, shown):
    pronoun = "he" if "*he*" in shown else "it"
    target = {"span1_text": "A", "span1_index": 0, "span2_text": pronoun, "span2_index": index}
    example = examples("wsc", "gpt3", {"text": text, "target": target, "label": False})[0]
    assert example.contexts[0].split("\n")[0] == shown


def test_a_span_that_differs_from_the_text_is_mended():
    target = {"span1_text": "The Dog.", "span1_index": 2, "span2_text": "It", "span2_index": 5}
    raw = {"text": "Ann saw the Dog when it ran", "target": target, "label": False}
    example = examples("wsc", "gpt3", raw)[0]
    assert 'the pronoun "*it*" refer to "the Dog"?' in example.contexts[0]


def test_hellaswags_context_in_one_piece_is_taken_apart():
    raw = {"context": "A man stands. he", "activity_label": "X", "endings": ["a", "b"], "label": 0}
    video = examples("hellaswag", "lm_eval", {**raw, "source_id": "activitynet~v_1"})[0]
    assert video.contexts[0] == "X: A man stands. He"
    other = examples("hellaswag", "lm_eval", {**raw, "source_id": "wikihow~1"})[0]
    assert other.contexts[0] == "X: A man stands. he"
