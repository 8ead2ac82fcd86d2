"""SuperGLUE as text to text, for fine-tuning: fields by name, then the task's name, then the label.

    premise: It rained.
    hypothesis: It was wet.
    rte: entailment

Names of fields and labels are T5's (arXiv 1910.10683, appendix D). Two things differ. A decoder
reads the answer after the prompt, so the task's name, which T5 writes first, stands last and asks
for it; long passages come first, because the left is cut where a prompt does not fit. And WSC asks
for true or false in all of its rows, where T5 spells out the noun in the true ones alone: the
paper's two scores are multiples of 1/104, the size of the whole validation split.
"""

from collections.abc import Mapping, Sequence

from eval.tasks.prompts import Example, Prompt, ask, marked
from eval.tasks.rows import Row

LABELS = {
    "cb": ("entailment", "contradiction", "neutral"),
    "rte": ("entailment", "not_entailment"),
    "copa": ("choice1", "choice2"),
}
TRUTH = ("False", "True")


def _rendered(fields: Mapping[str, str], task: str) -> str:
    return "".join(f"{name}: {text.strip()}\n" for name, text in fields.items()) + f"{task}:"


def _by_name(task: str, names: Sequence[str], labels: Sequence[str]) -> Prompt:
    """A prompt of some of the row's fields under their own names; `gold` is the label's index."""

    def prompt(row: Row) -> list[Example]:
        return ask(_rendered({name: row[name] for name in names}, task), labels, row["gold"])

    return prompt


def multirc(row: Row) -> list[Example]:
    """One candidate answer; `group` is its question."""
    fields = {name: row[name] for name in ("paragraph", "question", "answer")}
    return ask(_rendered(fields, "multirc"), TRUTH, row["gold"], group=row["group"])


def wsc(row: Row) -> list[Example]:
    """The pronoun stands between asterisks."""
    fields = {"text": marked(row), "pronoun": row["span2_text"], "noun": row["span1_text"]}
    return ask(_rendered(fields, "wsc"), TRUTH, row["gold"])


def record(row: Row) -> list[Example]:
    """The first of the gold entities is the target; any of them counts as right."""
    entities = row["entities"]
    golds = tuple(i for i, name in enumerate(entities) if name in row["answers"])
    if not golds:
        raise ValueError("none of the answers is among the entities, or the labels are hidden")
    passage = row["passage"].replace("\n@highlight\n", "\n")
    fields = {"passage": passage, "entities": ", ".join(entities), "query": row["query"]}
    context = _rendered(fields, "record")
    return [
        Example(
            contexts=(context,) * len(entities),
            continuations=tuple(f" {name}" for name in entities),
            choices=tuple(entities),
            golds=golds,
            shot=f"{context} {entities[golds[0]]}",
            answers=tuple(row["answers"]),
        )
    ]


PROMPTS: dict[str, Prompt] = {
    "boolq": _by_name("boolq", ("passage", "question"), TRUTH),
    "cb": _by_name("cb", ("premise", "hypothesis"), LABELS["cb"]),
    "copa": _by_name("copa", ("choice1", "choice2", "premise", "question"), LABELS["copa"]),
    "multirc": multirc,
    "record": record,
    "rte": _by_name("rte", ("premise", "hypothesis"), LABELS["rte"]),
    "wic": _by_name("wic", ("sentence1", "sentence2", "word"), TRUTH),
    "wsc": wsc,
}
