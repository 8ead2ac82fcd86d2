"""Rows of the tasks' data, from each of the layouts that they are handed around in, to one form.

The layouts: the original archives (SuperGLUE's jsonl, ARC's nested question, RACE's file per
article, ...), the flattened rows of TFDS and of the Hugging Face hub, and for two training pools
a pre-rendered query. A reader takes one record and gives back the rows in it as plain dictionaries,
whose fields the prompts (prompts.py) name. Readers take what is there as it is; what can't be
read raises ValueError, KeyError, IndexError or TypeError, and sources.py adds the place. A label
that is hidden, as in the test split of a competition, raises HiddenLabel.
"""

import ast
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Raw = Mapping[str, Any]
Row = dict[str, Any]

LETTERS = "ABCDE"


class HiddenLabel(ValueError):
    """A row whose label is not given out, which is no fault of the row."""

    def __init__(self) -> None:
        super().__init__("no label: it is hidden; use a split that has labels")


def arc(raw: Raw) -> list[Row]:
    """question, choices, gold. Letters and numbers both serve as keys of the answers."""
    if "query" in raw:
        question = raw["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        return [{"question": question, "choices": list(raw["choices"]), "gold": raw["gold"]}]
    question, choices = raw["question"], raw.get("choices")
    if isinstance(question, Mapping):
        question, choices = question["stem"], question["choices"]
    texts, labels = _texts_and_labels(choices)
    gold = labels.index(_label(raw, "answerKey"))
    return [{"question": question, "choices": texts, "gold": gold}]


def openbookqa(raw: Raw) -> list[Row]:
    """stem, choices, gold."""
    question = raw.get("question")
    if isinstance(question, Mapping) and "choice_A" in question:  # TFDS
        choices = [question[f"choice_{letter}"] for letter in "ABCD"]
        return [{"stem": question["stem"], "choices": choices, "gold": _label(raw, "answerKey")}]
    if isinstance(question, Mapping):
        stem, choices = question["stem"], question["choices"]
    else:
        stem, choices = raw["question_stem"], raw["choices"]
    texts, labels = _texts_and_labels(choices)
    gold = _label(raw, "answerKey")
    return [{"stem": stem, "choices": texts, "gold": labels.index(gold.lstrip())}]


def _texts_and_labels(choices: Any) -> tuple[list[str], list[Any]]:
    """The texts and the labels of a list of {text, label} or of {text: list, label: list}."""
    if isinstance(choices, Mapping):
        return list(choices["text"]), list(choices["label"])
    return [choice["text"] for choice in choices], [choice["label"] for choice in choices]


def boolq(raw: Raw) -> list[Row]:
    """passage, question, gold (1: yes). BoolQ's own archive calls the label answer."""
    gold = _truth(_label(raw, "answer" if "answer" in raw else "label"))
    return [{"passage": raw["passage"], "question": raw["question"], "gold": gold}]


def cb(raw: Raw) -> list[Row]:
    """premise, hypothesis, gold (entailment, contradiction, neutral)."""
    return [_pair(raw, ("entailment", "contradiction", "neutral"))]


def rte(raw: Raw) -> list[Row]:
    """premise, hypothesis, gold (entailment, not_entailment)."""
    return [_pair(raw, ("entailment", "not_entailment"))]


def _pair(raw: Raw, names: Sequence[str]) -> Row:
    premise, hypothesis = raw["premise"], raw["hypothesis"]
    return {"premise": premise, "hypothesis": hypothesis, "gold": _index(_label(raw), names)}


def copa(raw: Raw) -> list[Row]:
    """premise, choice1, choice2, question (cause or effect), gold."""
    row = {name: raw[name] for name in ("premise", "choice1", "choice2", "question")}
    return [{**row, "gold": _label(raw)}]


def hellaswag(raw: Raw) -> list[Row]:
    """activity, ctx, ctx_a, ctx_b, endings, gold.

    TFDS has the context in one piece. In the captions of videos the second part is the fragment
    after the last sentence; elsewhere it is empty.
    """
    ctx = raw["context"] if "context" in raw else raw["ctx"]
    if "ctx_a" in raw:
        ctx_a, ctx_b = raw["ctx_a"], raw["ctx_b"]
    elif raw.get("source_id", "").startswith("activitynet") and ". " in ctx:
        start, _, ctx_b = ctx.rpartition(". ")
        ctx_a = f"{start}."
    else:
        ctx_a, ctx_b = ctx, ""
    activity, endings = raw["activity_label"], list(raw["endings"])
    gold = int(_label(raw))
    contexts = {"ctx": ctx, "ctx_a": ctx_a, "ctx_b": ctx_b}
    return [{"activity": activity, **contexts, "endings": endings, "gold": gold}]


def multirc(raw: Raw) -> list[Row]:
    """paragraph, question, answer, group (the question it belongs to), gold (1: it is right)."""
    if "passage" not in raw:
        group = f"{raw['idx']['paragraph']}-{raw['idx']['question']}"
        row = {name: raw[name] for name in ("paragraph", "question", "answer")}
        return [{**row, "group": group, "gold": _truth(_label(raw))}]
    return [
        {
            "paragraph": raw["passage"]["text"],
            "question": question["question"],
            "answer": answer["text"],
            "group": f"{raw['idx']}-{question['idx']}",
            "gold": _truth(_label(answer)),
        }
        for question in raw["passage"]["questions"]
        for answer in question["answers"]
    ]


def piqa(raw: Raw) -> list[Row]:
    """goal, sol1, sol2, gold."""
    return [{**{name: raw[name] for name in ("goal", "sol1", "sol2")}, "gold": int(_label(raw))}]


def race_articles(records: Iterable[tuple[str, Raw]]) -> Iterator[tuple[str, Raw]]:
    """Rows with a question each, as the hub has them, but those on one article as one record.
    Raises ValueError that names the place of a row without a field."""

    def article(pair: tuple[str, Raw]) -> Any:
        place, raw = pair
        single = "question" in raw and "article" in raw
        return (raw.get("example_id"), raw["article"]) if single else place

    for key, group in itertools.groupby(records, key=article):
        pairs = list(group)
        place, first = pairs[0]
        if isinstance(key, tuple):
            yield place, {"article": first["article"], "problems": [_problem(*p) for p in pairs]}
        else:
            yield place, first


def _problem(place: str, raw: Raw) -> Row:
    """Names the place itself: its reader will know that of the article's first row alone."""
    for name in ("question", "options", "answer"):
        if name not in raw:
            raise ValueError(f"{place}: the field {name!r} is missing")
    return {name: raw[name] for name in ("question", "options", "answer")}


def race(raw: Raw) -> list[Row]:
    """article, problems: a list of question, options, gold."""
    if "problems" in raw:
        problems = raw["problems"]
        problems = ast.literal_eval(problems) if isinstance(problems, str) else problems
    else:
        columns = zip(raw["questions"], raw["options"], raw["answers"], strict=True)
        problems = [{"question": q, "options": o, "answer": a} for q, o, a in columns]
    cleaned = [
        {
            "question": problem["question"],
            "options": list(problem["options"]),
            "gold": LETTERS.index(problem["answer"]),
        }
        for problem in problems
    ]
    if not cleaned:
        raise ValueError("an article without questions")
    return [{"article": raw["article"], "problems": cleaned}]


def record(raw: Raw) -> list[Row]:
    """passage, query, entities (sorted, each once), answers (likewise)."""
    if isinstance(raw["passage"], str):
        names = {name: sorted(set(raw[name])) for name in ("entities", "answers")}
        return [{"passage": raw["passage"], "query": raw["query"], **names}]
    text = raw["passage"]["text"]
    spans = raw["passage"]["entities"]
    entities = sorted({text[span["start"] : span["end"] + 1] for span in spans})
    return [
        {
            "passage": text,
            "query": question["query"],
            "entities": entities,
            "answers": sorted({answer["text"] for answer in question["answers"]}),
        }
        for question in raw["qas"]
    ]


def storycloze(raw: Raw) -> list[Row]:
    """context (four sentences), endings, gold. Labels are 1 and 2 in every layout."""
    if "context" in raw:
        label, context, endings = raw["label"], raw["context"], list(raw["endings"])
    elif "InputSentence1" in raw:
        label = raw.get("AnswerRightEnding")
        context = " ".join(raw[f"InputSentence{i}"] for i in range(1, 5))
        endings = [raw[f"RandomFifthSentenceQuiz{i}"] for i in (1, 2)]
    else:
        label = raw.get("answer_right_ending")
        context = " ".join(raw[f"input_sentence_{i}"] for i in range(1, 5))
        endings = [raw[f"sentence_quiz{i}"] for i in (1, 2)]
    if label is None or int(label) == -1:
        raise HiddenLabel
    return [{"context": context, "endings": endings, "gold": int(label) - 1}]


def wic(raw: Raw) -> list[Row]:
    """sentence1, sentence2, word, start1, end1, gold (1: the same sense)."""
    row = {name: raw[name] for name in ("sentence1", "sentence2", "word", "start1", "end1")}
    return [{**row, "gold": _truth(_label(raw))}]


def winogrande(raw: Raw) -> list[Row]:
    """sentence with one _, option1, option2, gold. The answers of the archive, which has them in
    files of labels as well, count from 1; TFDS's labels from 0."""
    row = {name: raw[name] for name in ("sentence", "option1", "option2")}
    if "_" not in row["sentence"]:
        raise ValueError(f"sentence={row['sentence']!r}: there is no _ in it")
    gold = int(_label(raw, "answer")) - 1 if "answer" in raw else _label(raw)
    return [{**row, "gold": gold}]


def wsc(raw: Raw) -> list[Row]:
    """text, span1_text, span2_text, span1_index, span2_index (words), gold (1: refers to it)."""
    flat = {**raw, **raw.get("target", {})}
    names = ("text", "span1_text", "span2_text", "span1_index", "span2_index")
    row = {name: flat[name] for name in names}
    for span in ("span1", "span2"):
        row[f"{span}_text"] = _mended_span(row["text"], row[f"{span}_text"], row[f"{span}_index"])
    return [{**row, "gold": _truth(_label(raw))}]


def _mended_span(text: str, span: str, index: int) -> str:
    """The archive has spans that differ from the text in case, a final period or a line break."""
    words = text.split()
    if span in text or not span or not 0 <= index < len(words):
        return span
    first = span[0].lower() if words[index][0].islower() else span[0].upper()
    mended = (first + span[1:]).rstrip(".").replace("\n", " ")
    return mended if mended in text else span


def winograd(raw: Raw) -> list[Row]:
    """text, pronoun, start (character of the pronoun), options as in the source, gold.

    The text is the hub's, with a space behind the pronoun that TFDS leaves out before a period.
    """
    text = raw["text"]
    if "pronoun_start" in raw:
        end = raw["pronoun_end"]
        text = f"{text[:end]} {text[end:].lstrip()}"
        row = {"pronoun": raw["pronoun_text"], "start": raw["pronoun_start"]}
        options = [raw["option1"], raw["option2"]]
    else:
        row = {"pronoun": raw["pronoun"], "start": raw["pronoun_loc"]}
        options = list(raw["options"])
    return [{"text": text, **row, "options": options, "gold": _label(raw)}]


def _label(raw: Raw, name: str = "label") -> Any:
    label = raw.get(name)
    if label is None or label in (-1, ""):
        raise HiddenLabel
    return label


def _index(label: Any, names: Sequence[str]) -> int:
    if isinstance(label, str) and label not in names:
        raise ValueError(f"label={label!r}: must be one of {', '.join(names)}")
    return names.index(label) if isinstance(label, str) else label


def _truth(label: Any) -> int:
    """0 for false and 1 for true, which may be booleans, numbers or words; -1 for anything else."""
    if isinstance(label, str):
        return {"false": 0, "true": 1}.get(label.lower(), -1)
    return int(label) if label in (0, 1) else -1
