"""Files of the tasks in the fields that the data sets on the Hugging Face hub have.

lm-evaluation-harness reads those; this gives it the same data from the original archives. It shares
no reader of rows with eval/tasks/rows.py, so that scripts/check_lm_eval.py compares two ways from
the file to the prompt. Records that have the hub's fields already stay as they are.
"""

import itertools
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.tasks.files import SCHEMAS, read_file

Record = dict[str, Any]


def read(task: str, files: Sequence[Path]) -> list[Record]:
    """Rows of the task's files as the hub has them. Raises KeyError for a task not in ROWS."""
    if files[0].suffix == ".xml":
        return _schemas(files[0])
    return ROWS[task]([raw for file in files for _, raw in read_file(file)])


def _schemas(path: Path) -> list[Record]:
    rows = []
    for schema in list(ElementTree.fromstring(path.read_bytes()))[:SCHEMAS]:
        parts = [schema.findtext(f"text/{tag}") or "" for tag in ("txt1", "pron", "txt2")]
        left, pronoun, right = (" ".join(part.split()) for part in parts)
        options = [" ".join((answer.text or "").split()) for answer in schema.findall(".//answer")]
        rows.append(
            {
                "text": f"{left} {pronoun} {right}".strip(),
                "pronoun": pronoun,
                "pronoun_loc": len(left) + 1 if left else 0,
                "options": options,
                "label": int("B" in (schema.findtext("correctAnswer") or "")),
            }
        )
    return rows


def _arc(records: list[Record]) -> list[Record]:
    rows: list[Record] = []
    choices: Any
    for record in records:
        if "query" in record:
            letters = list("ABCDE"[: len(record["choices"])])
            question = record["query"][len("Question: ") : -len("\nAnswer:")]
            choices, key = {"text": record["choices"], "label": letters}, letters[record["gold"]]
        else:
            question, choices, key = record["question"], record.get("choices"), record["answerKey"]
            if isinstance(question, dict):
                question, choices = question["stem"], _columns(question["choices"])
        rows.append({"question": question, "choices": choices, "answerKey": key})
    return rows


def _columns(choices: list[dict[str, str]]) -> dict[str, list[str]]:
    return {name: [choice[name] for choice in choices] for name in ("text", "label")}


def _openbookqa(records: list[Record]) -> list[Record]:
    return [
        record
        if "question_stem" in record
        else {
            "question_stem": record["question"]["stem"],
            "choices": _columns(record["question"]["choices"]),
            "answerKey": record["answerKey"],
        }
        for record in records
    ]


def _numbered(*names: str) -> Callable[[list[Record]], list[Record]]:
    """With labels as numbers; `names` are the words for 0, 1 and so on."""
    return lambda records: [
        {**r, "label": names.index(r["label"]) if r["label"] in names else int(r["label"])}
        for r in records
    ]


def _boolq(records: list[Record]) -> list[Record]:
    return [
        {
            "passage": record["passage"],
            "question": record["question"],
            "label": int(record["answer"] if "answer" in record else record["label"]),
        }
        for record in records
    ]


def _hellaswag(records: list[Record]) -> list[Record]:
    names = ("ctx_a", "ctx_b", "activity_label", "endings")
    return [{**{n: r[n] for n in names}, "label": str(r["label"])} for r in records]


def _multirc(records: list[Record]) -> list[Record]:
    if "passage" not in records[0]:
        return records
    return [
        {
            "paragraph": record["passage"]["text"],
            "question": question["question"],
            "answer": answer["text"],
            "label": answer["label"],
        }
        for record in records
        for question in record["passage"]["questions"]
        for answer in question["answers"]
    ]


def _race(records: list[Record]) -> list[Record]:
    if "problems" in records[0]:
        return records
    rows = []
    if "question" in records[0]:
        for (_, article), group in itertools.groupby(
            records, key=lambda r: (r.get("example_id"), r["article"])
        ):
            names = ("question", "answer", "options")
            problems = [{name: record[name] for name in names} for record in group]
            rows.append({"article": article, "problems": str(problems)})
        return rows
    for record in records:
        columns = zip(record["questions"], record["answers"], record["options"])
        problems = [{"question": q, "answer": a, "options": o} for q, a, o in columns]
        rows.append({"article": record["article"], "problems": str(problems)})
    return rows


def _record(records: list[Record]) -> list[Record]:
    if isinstance(records[0]["passage"], str):
        names = ("passage", "query", "entities", "answers")
        return [{name: record[name] for name in names} for record in records]
    return [
        {
            "passage": record["passage"]["text"],
            "query": question["query"],
            "entities": [
                record["passage"]["text"][span["start"] : span["end"] + 1]
                for span in record["passage"]["entities"]
            ],
            "answers": [answer["text"] for answer in question["answers"]],
        }
        for record in records
        for question in record["qas"]
    ]


def _storycloze(records: list[Record]) -> list[Record]:
    if "InputSentence1" not in records[0]:
        return [{**r, "answer_right_ending": int(r["answer_right_ending"])} for r in records]
    names = {f"InputSentence{i}": f"input_sentence_{i}" for i in range(1, 5)}
    names |= {f"RandomFifthSentenceQuiz{i}": f"sentence_quiz{i}" for i in (1, 2)}
    return [
        {
            **{new: record[old] for old, new in names.items()},
            "answer_right_ending": int(record["AnswerRightEnding"]),
        }
        for record in records
    ]


def _wsc(records: list[Record]) -> list[Record]:
    """Of super_glue/wsc.fixed: spans take the text's case, and lose a period and line breaks."""
    rows = []
    for record in records:
        row = {"text": record["text"], **record.get("target", record)}
        for span in ("span1", "span2"):
            words, text = row["text"].split(), row[f"{span}_text"]
            if text not in row["text"] and text and row[f"{span}_index"] < len(words):
                lower = words[row[f"{span}_index"]][0].islower()
                text = (text[0].lower() if lower else text[0].upper()) + text[1:]
                text = text.rstrip(".").replace("\n", " ")
                if text in row["text"]:
                    row[f"{span}_text"] = text
        names = ("text", "span1_text", "span2_text", "span1_index", "span2_index")
        rows.append({**{name: row[name] for name in names}, "label": int(record["label"])})
    return rows


def _fields(*names: str) -> Callable[[list[Record]], list[Record]]:
    return lambda records: [{name: record[name] for name in names} for record in records]


ROWS: dict[str, Callable[[list[Record]], list[Record]]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "boolq": _boolq,
    "cb": _numbered("entailment", "contradiction", "neutral"),
    "copa": _fields("premise", "choice1", "choice2", "question", "label"),
    "hellaswag": _hellaswag,
    "multirc": _multirc,
    "openbookqa": _openbookqa,
    "piqa": _fields("goal", "sol1", "sol2", "label"),
    "race_high": _race,
    "record": _record,
    "rte": _numbered("entailment", "not_entailment"),
    "storycloze": _storycloze,
    "wic": _numbered("false", "true"),
    "winograd": _fields("text", "pronoun", "pronoun_loc", "options", "label"),
    "winogrande": _fields("sentence", "option1", "option2", "answer"),
    "wsc": _wsc,
}
