"""Fine-tuning's two ends: examples of SuperGLUE as pairs of text, and their decoding accuracy.

The paper's Table 3 scores what a model writes: a greedy continuation counts if it equals the label,
spaces around it aside. What was written is kept in the run's folder, for anyone to count again:

    generations/step_N.jsonl    {"task", "index", "prompt", "answers", "generated", "correct"}
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from data.reading.examples import Examples, Pair
from data.tokenizer import Tokenizer
from eval.generation.generator import Generator
from eval.likelihood.during_training import task_data
from eval.tasks import sources
from eval.tasks.catalogue import TASKS
from eval.tasks.prompts import Example
from eval.tasks.text_to_text import PROMPTS
from laser.training.config import RunConfig
from laser.training.fields import nearest
from laser.training.folders import write_atomically
from models.families import Parameters

GENERATIONS = "generations"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A task's examples by split, in the order of their source."""

    name: str
    splits: dict[str, list[Example]]


def load_tasks(names: str, data_dir: str) -> list[TextTask]:
    """The tasks of the config's data.tasks; no device is touched.

    Args:
      names: with commas between them; "" is none.
      data_dir: folder with their data in the original formats; "" for TFDS's.

    Raises:
      ValueError: an unknown task, or data that are missing or can't be used.
    """
    with task_data("data.tasks", names, "data.tasks_dir", data_dir) as folder:
        return [load_task(name, folder) for name in dict.fromkeys(names.split(",")) if names]


def load_task(name: str, folder: Path | None) -> TextTask:
    """One task. Raises ValueError for an unknown one, MissingData, or ValueError for its rows."""
    if name not in PROMPTS:
        hint = nearest(name, PROMPTS) or f"; known: {', '.join(PROMPTS)}"
        raise ValueError(f"unknown task {name!r}{hint}")

    def examples(split: str) -> list[Example]:
        return sources.load(TASKS[name].source, split, PROMPTS[name], folder).examples

    return TextTask(name, {split: examples(split) for split in SPLITS})


def pairs(tasks: Sequence[TextTask], split: str) -> list[Pair]:
    """Prompt and answers of every example, task after task."""
    return [
        Pair(example.contexts[0], answers(example))
        for task in tasks
        for example in task.splits[split]
    ]


def answers(example: Example) -> tuple[str, ...]:
    """The texts that count as right, with the space before them: one label, or ReCoRD's gold
    entities."""
    labels = [example.continuations[gold] for gold in example.golds]
    return tuple(dict.fromkeys([*labels, *(f" {text}" for text in example.answers)]))


def make_evaluation(
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    tasks: Sequence[TextTask],
    validation: Examples,
    workdir: Path,
) -> Callable[[Parameters, int], dict[str, float]]:
    """A function from parameters on `mesh` and the steps done to decoding accuracies.

    It returns {"eval/TASK/decoding_accuracy": fraction} and "eval/decoding_accuracy", the mean over
    tasks. All hosts call it, and process 0 writes what the model wrote.

    Args:
      config: of the run.
      mesh: of the run.
      tokenizer: of the run.
      tasks: of `load_tasks`.
      validation: their validation splits, in the order of `pairs`.
      workdir: of the run.
    """
    generator = Generator(config.model, tokenizer, mesh, max_length=validation.longest_decoded)

    def evaluate(params: Parameters, step: int) -> dict[str, float]:
        generated = generator.generate(
            params, validation.prompts, max_new_tokens=validation.max_target
        )
        records, metrics = judge(tasks, validation.prompts, generated)
        if jax.process_index() == 0:
            path = workdir / GENERATIONS / f"step_{step}.jsonl"
            path.parent.mkdir(exist_ok=True)
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            write_atomically(path, "".join(lines))
        return metrics

    return evaluate


def judge(
    tasks: Sequence[TextTask], prompts: Sequence[str], generated: Sequence[str]
) -> tuple[list[dict], dict[str, float]]:
    """A record of each example of the validation splits, and the accuracies."""
    written = iter(zip(prompts, generated, strict=True))
    records, metrics = [], {}
    for task in tasks:
        hits = []
        for index, example in enumerate(task.splits["validation"]):
            prompt, text = next(written)
            right = [answer.strip() for answer in answers(example)]
            hits.append(text.strip() in right)
            record = {"task": task.name, "index": index, "prompt": prompt, "answers": right}
            records.append(record | {"generated": text, "correct": hits[-1]})
        metrics[f"eval/{task.name}/decoding_accuracy"] = statistics.fmean(hits)
    return records, metrics | {"eval/decoding_accuracy": statistics.fmean(metrics.values())}
