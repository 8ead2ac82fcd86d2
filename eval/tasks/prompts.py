"""How a row of a task is put to the model, in two protocols.

`gpt3` follows the prompts of GPT-3 and GLaM, whose list of tasks the paper takes over. `lm_eval`
gives, byte for byte, what lm-evaluation-harness 0.4.13 gives, its slips included: COPA's and
wsc273's doubled space, MultiRC's demonstrations with the wrong answer. Each function takes a row of
rows.py and returns the examples in it: one, but for RACE, where `gpt3` asks every question of
an article.
"""

import ast
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from eval.tasks.rows import HiddenLabel, Row


@dataclasses.dataclass(frozen=True)
class Example:
    """One document, rendered: log P(continuations[i] | contexts[i]) are to be compared.

    Attributes:
      contexts: before each candidate; equal where only the continuations differ.
      continuations: what is scored, with the space that separates it.
      choices: the candidates as the data have them; their characters are what scores are divided
        by.
      golds: indices of the right ones: one, several for ReCoRD.
      shot: the whole example with its answer, as it is shown before another one.
      positive: where examples are judged true or false (MultiRC), the candidate that says true.
      group: examples of one group are also judged together (MultiRC's questions).
      answers: ReCoRD's gold entities.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    golds: tuple[int, ...]
    shot: str
    positive: int = 0
    group: str = ""
    answers: tuple[str, ...] = ()


Prompt = Callable[[Row], list[Example]]


def check(example: Example) -> None:
    """Raises ValueError for an example that can't be scored."""
    count = len(example.choices)
    for gold in example.golds:
        _check_gold(gold, count)
    for i, text in enumerate(example.continuations):
        if not text.strip():
            raise ValueError(f"candidate {i} is empty: {list(example.choices)}")
    try:
        "".join({*example.contexts, *example.continuations, example.shot}).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a character (a surrogate) in the text: {error}") from error
    if count < 2:
        raise ValueError(f"{count} candidates: at least 2 are needed")


def _check_gold(gold: int, count: int) -> None:
    if not 0 <= gold < count:
        raise ValueError(f"label {gold} is out of range: there are {count} candidates")


def ask(context: str, choices: Sequence[str], gold: int, **rest: Any) -> list[Example]:
    """One context, then a space and a choice."""
    _check_gold(gold, len(choices))
    contexts = (context,) * len(choices)
    continuations = tuple(f" {choice}" for choice in choices)
    shot = context + continuations[gold]
    return [Example(contexts, continuations, tuple(choices), (gold,), shot, **rest)]


def _fill(contexts: Sequence[str], ending: str, choices: Sequence[str], gold: int) -> list[Example]:
    """A context for each choice, and one ending that all have in common."""
    _check_gold(gold, len(contexts))
    endings = (ending,) * len(contexts)
    shot = contexts[gold] + ending
    return [Example(tuple(contexts), endings, tuple(choices), (gold,), shot)]


def question_answer(row: Row) -> list[Example]:
    """ARC, both protocols."""
    return ask(f"Question: {row['question']}\nAnswer:", row["choices"], row["gold"])


def boolq_gpt3(row: Row) -> list[Example]:
    context = f"{row['passage']}\nquestion: {row['question']}?\nanswer:"
    return ask(context, ("yes", "no"), _swapped(row["gold"]))


def boolq_lm_eval(row: Row) -> list[Example]:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return ask(context, ("no", "yes"), row["gold"])


def _swapped(gold: int) -> int:
    """The gold of two candidates in the other order; what is out of range stays out of range."""
    return {0: 1, 1: 0}.get(gold, gold)


def cb_gpt3(row: Row) -> list[Example]:
    question = f"question: {row['hypothesis']}. true, false, or neither?\nanswer:"
    return ask(f"{row['premise']}\n{question}", ("true", "false", "neither"), row["gold"])


def cb_lm_eval(row: Row) -> list[Example]:
    question = f"Question: {row['hypothesis']}. True, False, or Neither?\nAnswer:"
    return ask(f"{row['premise']}\n{question}", ("True", "False", "Neither"), row["gold"])


def rte_gpt3(row: Row) -> list[Example]:
    question = f"question: {row['hypothesis']} True or False?\nanswer:"
    return ask(f"{row['premise']}\n{question}", ("True", "False"), row["gold"])


def rte_lm_eval(row: Row) -> list[Example]:
    question = f"Question: {row['hypothesis']} True or False?\nAnswer:"
    return ask(f"{row['premise']}\n{question}", ("True", "False"), row["gold"])


def copa_gpt3(row: Row) -> list[Example]:
    premise = row["premise"].strip().removesuffix(".")
    return ask(f"{premise} {_connector(row)}", _copa_choices(row), row["gold"])


def copa_lm_eval(row: Row) -> list[Example]:
    """The choices begin with a space there, and the delimiter adds another."""
    choices = [f" {choice}" for choice in _copa_choices(row)]
    return ask(f"{row['premise'].strip()[:-1]} {_connector(row)}", choices, row["gold"])


def _connector(row: Row) -> str:
    return {"cause": "because"}.get(row["question"], "therefore")


def _copa_choices(row: Row) -> list[str]:
    return [choice[:1].lower() + choice[1:] for choice in (row["choice1"], row["choice2"])]


def hellaswag_gpt3(row: Row) -> list[Example]:
    return ask(f"{row['activity']}: {row['ctx'].strip()}", row["endings"], row["gold"])


def hellaswag_lm_eval(row: Row) -> list[Example]:
    context = f"{row['activity']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return ask(_cleaned(context), [_cleaned(ending) for ending in row["endings"]], row["gold"])


def _cleaned(text: str) -> str:
    """Without WikiHow's marks in brackets."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def multirc_gpt3(row: Row) -> list[Example]:
    context = f"{row['paragraph']}\n\n{row['question']}\n-"
    choices = [f"[{truth}] {row['answer']}" for truth in (False, True)]
    return ask(context, choices, row["gold"], positive=1, group=row["group"])


def multirc_lm_eval(row: Row) -> list[Example]:
    """0.4.13 takes the label (1: right) as an index into (yes, no), so its demonstrations show the
    wrong word, as this one does; the gold here is the right one, and accuracy is 1 - its own."""
    context = f"{row['paragraph']}\nQuestion: {row['question']}\nAnswer:"
    # The harness reads the two choices as Python literals.
    answer = ast.literal_eval(f"'''{row['answer']}\\nIs the answer correct? '''")
    choices = (f"{answer}yes", f"{answer}no")
    example = ask(context, choices, _swapped(row["gold"]), group=row["group"])[0]
    return [dataclasses.replace(example, shot=context + example.continuations[row["gold"]])]


def openbookqa(row: Row) -> list[Example]:
    return ask(row["stem"], row["choices"], row["gold"])


def piqa_gpt3(row: Row) -> list[Example]:
    return ask(row["goal"], (row["sol1"], row["sol2"]), row["gold"])


def piqa_lm_eval(row: Row) -> list[Example]:
    context = f"Question: {row['goal']}\nAnswer:"
    return ask(context, (row["sol1"], row["sol2"]), row["gold"])


def race_gpt3(row: Row) -> list[Example]:
    """Every question of the article, after the earlier ones and their answers."""
    examples = []
    context = f"Article: {row['article']}"
    for problem in row["problems"]:
        context += f"\n\nQ: {problem['question']}\n\nA:"
        examples += ask(context, problem["options"], problem["gold"])
        context = examples[-1].shot
    return examples


def race_lm_eval(row: Row) -> list[Example]:
    """The last question alone; those before it are shown with their answers."""
    *earlier, last = row["problems"]
    context = f"Article: {row['article']}\n\n"
    for problem in earlier:
        question, answer = problem["question"], problem["options"][problem["gold"]]
        if question.endswith("  _  ."):
            context += f"{question[:-5]}{answer}\n"
        else:
            context += f"Question: {question}\nAnswer: {answer}\n"
    return ask(context + last["question"], last["options"], last["gold"])


def record_gpt3(row: Row) -> list[Example]:
    return _record(row, "")


def record_lm_eval(row: Row) -> list[Example]:
    """The delimiter's space makes the candidates' bullets stand one column further in."""
    return _record(row, " ")


def _record(row: Row, delimiter: str) -> list[Example]:
    text, *highlights = row["passage"].strip().split("\n@highlight\n")
    context = f"{text}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)
    filled = [f"  - {row['query']}".replace("@placeholder", name) for name in row["entities"]]
    golds = tuple(i for i, name in enumerate(row["entities"]) if name in row["answers"])
    if not row["answers"]:
        raise HiddenLabel
    shown = f"  - {row['query']}".replace("@placeholder", row["answers"][0])
    return [
        Example(
            contexts=(context,) * len(filled),
            continuations=tuple(delimiter + text for text in filled),
            choices=tuple(row["entities"]),
            golds=golds,
            shot=context + delimiter + shown,
            answers=tuple(row["answers"]),
        )
    ]


def storycloze(row: Row) -> list[Example]:
    return ask(row["context"], row["endings"], row["gold"])


def wic_gpt3(row: Row) -> list[Example]:
    question = (
        f"question: Is the word '{row['word']}' used in the same way in the two sentences above?"
    )
    context = f"{row['sentence1']}\n{row['sentence2']}\n{question}\nanswer:"
    return ask(context, ("yes", "no"), _swapped(row["gold"]))


def wic_lm_eval(row: Row) -> list[Example]:
    word = row["sentence1"][row["start1"] : row["end1"]]
    context = (
        f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\n"
        f"Question: Is the word '{word}' used in the same way in the two sentences above?\nAnswer:"
    )
    return ask(context, ("no", "yes"), row["gold"])


def winograd_gpt3(row: Row) -> list[Example]:
    """The noun takes the pronoun's place, with the pronoun's case and its possessive."""
    start, pronoun = row["start"], row["pronoun"]
    options = [_in_place_of(pronoun, option) for option in row["options"]]
    contexts = [row["text"][:start] + option for option in options]
    rest = re.sub(r"^ (?=[.,;:!?])", "", row["text"][start + len(pronoun) :])
    return _fill(contexts, rest, options, row["gold"])


def _in_place_of(pronoun: str, option: str) -> str:
    if pronoun.lower() in POSSESSIVES and not option.endswith("'s"):
        option += "'s"
    first, space, rest = option.partition(" ")
    if pronoun[:1].islower() and first in CAPITALISED:
        first = first.lower()
    elif pronoun[:1].isupper():
        first = first[:1].upper() + first[1:]
    return first + space + rest


def winograd_lm_eval(row: Row) -> list[Example]:
    text, start, pronoun = row["text"].replace("  ", " "), row["start"], row["pronoun"]
    options = []
    for option in row["options"]:
        if pronoun.lower() in POSSESSIVES:
            option += "'s"
        first = (option.split() or [""])[0]
        if text[start - 2 : start - 1] != "." and first in CAPITALISED:
            option = option.replace(first, first.lower())
        options.append(option)
    contexts = [text[:start] + option for option in options]
    return _fill(contexts, f" {text[start + len(pronoun) :]}", options, row["gold"])


POSSESSIVES = ("my", "his", "her", "our", "their")
CAPITALISED = ("A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their")


def winogrande(row: Row) -> list[Example]:
    before, _, after = row["sentence"].partition("_")
    options = [row["option1"], row["option2"]]
    contexts = [before + option for option in options]
    return _fill(contexts, f" {after.strip()}", options, row["gold"])


def wsc_gpt3(row: Row) -> list[Example]:
    pronoun, noun = row["span2_text"], row["span1_text"]
    question = f'question: does the pronoun "*{pronoun}*" refer to "{noun}"?'
    context = f"{marked(row)}\n{question}\nanswer:"
    return ask(context, ("yes", "no"), _swapped(row["gold"]))


def wsc_lm_eval(row: Row) -> list[Example]:
    """Marked as in 0.4.13: its spaces around quotation marks are lost on both sides."""
    pronoun, noun = row["span2_text"], row["span1_text"]
    before = " ".join(row["text"].split()[: row["span2_index"]])
    after = row["text"][len(before) + len(pronoun) + 1 :]
    text = f"{before} *{pronoun}*{after}"
    for old, new in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        text = text.replace(old, new)
    text = re.sub(r" (['.,])", r"\1", text)
    context = (
        f"Passage: {text}\nQuestion: In the passage above, does the pronoun "
        f'"*{pronoun}*" refer to "*{noun}*"?\nAnswer:'
    )
    return ask(context, ("no", "yes"), row["gold"])


def marked(row: Row) -> str:
    """The passage with asterisks around the pronoun, and without the spaces that its tokenisation
    put before punctuation and inside of brackets and quotation marks."""
    words, pronoun = row["text"].split(), row["span2_text"]
    rest = " ".join(words[row["span2_index"] :])
    start = max(rest.find(pronoun), 0)
    rest = f"{rest[:start]}*{pronoun}*{rest[start + len(pronoun) :]}"
    text = " ".join([*words[: row["span2_index"]], rest])
    for old, new in ((" n't", "n't"), (" )", ")"), ("( ", "(")):
        text = text.replace(old, new)
    pieces = text.split('"')  # every second one is quoted
    if len(pieces) % 2:
        pieces = [piece.strip() if i % 2 else piece for i, piece in enumerate(pieces)]
    return re.sub(r" ('(?:s|m|d|re|ve|ll)\b|[.,;:!?])", r"\1", '"'.join(pieces))


def held_out(row: Row) -> list[Example]:
    """The offline task: a passage goes on in one of four ways."""
    return ask(row["context"], row["endings"], row["gold"])
