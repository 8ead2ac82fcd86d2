"""The tasks in SeqIO's registry, for its Evaluator: one example for each candidate.

    register("lm_eval", shots=1, data_dir=DATA, tokenizer_path=MODEL)
    seqio.get_mixture_or_task("copa_lm_eval_1shot")

    register_text_to_text(data_dir=DATA, tokenizer_path=MODEL)      SuperGLUE for fine-tuning
    seqio.get_mixture_or_task("super_glue_text_to_text")

"inputs" is the context, "targets" the candidate, and the model's scores of the targets are grouped
by document. SeqIO has one score for a candidate and no demonstrations of its own, so they are
rendered before, with the first seed, and the normalisations are those that the score and the texts
give: sum, partial, characters. Tasks that need more (per token, unconditional) are registered with
the sum, and say so by their metric's name. Importing this imports TensorFlow.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from eval.generation import finetuning
from eval.likelihood import oneshot
from eval.likelihood.metrics import METRICS, Candidate, Judged, choose
from eval.likelihood.oneshot import Settings, TaskData
from eval.tasks.catalogue import KNOWN, Protocol
from eval.tasks.sources import MissingData
from eval.tasks.text_to_text import PROMPTS

tf.config.set_visible_devices([], "GPU")  # or TensorFlow takes all of its memory

MIXTURE = "super_glue_text_to_text"
BY_SCORE_ALONE = ("sum", "partial", "character")


def register(
    protocol: Protocol, shots: int, data_dir: Path | None, tokenizer_path: str | Path
) -> tuple[list[str], dict[str, str]]:
    """Registers every task that has data.

    Args:
      protocol, shots, data_dir: as for scripts/evaluate.py.
      tokenizer_path: SentencePiece model of the run.

    Returns:
      Names in the registry (TASK_PROTOCOL_Nshot), and for the others why their data are missing.

    Raises:
      ValueError: a name is taken, or data can't be used.
    """
    settings = Settings(protocol, shots)
    names, missing = [], {}
    for task in KNOWN.values():
        try:
            data = oneshot.load_task(task, settings, data_dir)
        except MissingData as error:
            missing[task.name] = str(error)
            continue
        name = f"{task.name}_{protocol}_{shots}shot"
        seqio.TaskRegistry.add_provider(name, make_task(name, data, settings, tokenizer_path))
        names.append(name)
    return names, missing


def register_text_to_text(
    data_dir: Path | None, tokenizer_path: str | Path
) -> tuple[list[str], dict[str, str]]:
    """Registers SuperGLUE as train.py fine-tunes on it (eval/tasks/text_to_text.py).

    The mixture MIXTURE has all tasks that have data, each in proportion to its examples.

    Returns:
      Names of the tasks (TASK_text_to_text), and for the others why their data are missing.

    Raises:
      ValueError: a name is taken, or data can't be used.
    """
    names, missing = [], {}
    for task_name in PROMPTS:
        try:
            task = finetuning.load_task(task_name, data_dir)
        except MissingData as error:
            missing[task_name] = str(error)
            continue
        names.append(f"{task_name}_text_to_text")
        provider = make_text_to_text_task(names[-1], task, tokenizer_path)
        seqio.TaskRegistry.add_provider(names[-1], provider)
    if names:
        seqio.MixtureRegistry.add(MIXTURE, names, default_rate=seqio.mixing_rate_num_examples)
    return names, missing


def make_text_to_text_task(
    name: str, task: finetuning.TextTask, tokenizer_path: str | Path
) -> seqio.Task:
    """One task with the splits train and validation; its metric is decoding accuracy."""
    columns = {
        split: {
            "inputs": [example.contexts[0] for example in examples],
            "targets": [finetuning.answers(example)[0] for example in examples],
            "document": list(range(len(examples))),
        }
        for split, examples in task.splits.items()
    }
    vocabulary = seqio.SentencePieceVocabulary(str(tokenizer_path))

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None):
        del shuffle_files, seed  # SeqIO shuffles examples itself
        return tf.data.Dataset.from_tensor_slices(columns[split])

    def answer_or_text(text: str, example: Mapping[str, Any], is_target: bool = False) -> Any:
        if not is_target:
            return text.strip()
        right = finetuning.answers(task.splits["validation"][int(example["document"])])
        return [answer.strip() for answer in right]

    def decoding_accuracy(targets: Sequence[list[str]], predictions: Sequence[str]):
        hits = [text in right for text, right in zip(predictions, targets)]
        return {"decoding_accuracy": sum(hits) / len(hits)}

    return seqio.Task(
        name,
        source=seqio.FunctionDataSource(
            dataset,
            splits=tuple(columns),
            num_input_examples={split: len(rows) for split, rows in task.splits.items()},
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=False),
            "targets": seqio.Feature(vocabulary, add_eos=True),
        },
        postprocess_fn=answer_or_text,
        metric_fns=[decoding_accuracy],
    )


def make_task(
    name: str, data: TaskData, settings: Settings, tokenizer_path: str | Path
) -> seqio.Task:
    """One task; its split is the one that is evaluated."""
    prompts = oneshot.prompted(data, settings, oneshot.FIRST_SEED)
    columns: dict[str, list[Any]] = {"inputs": [], "targets": [], "document": [], "candidate": []}
    for document, prompt in enumerate(prompts):
        for i, context in enumerate(prompt.contexts()):
            row = (context, prompt.example.continuations[i], document, i)
            for column, value in zip(columns.values(), row):
                column.append(value)
    vocabulary = seqio.SentencePieceVocabulary(str(tokenizer_path))
    feature = seqio.Feature(vocabulary, add_eos=False)

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None):
        del split, shuffle_files, seed  # there is one split, in one order
        return tf.data.Dataset.from_tensor_slices(columns)

    return seqio.Task(
        name,
        source=seqio.FunctionDataSource(dataset, splits=[data.split]),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=_place,
        metric_fns=[_metric(data, [prompt.example for prompt in prompts])],
    )


def _place(target: Any, example: Mapping[str, Any], is_target: bool = False) -> tuple[int, int]:
    """SeqIO hands these to the metric in place of the target's text."""
    del target, is_target
    return int(example["document"]), int(example["candidate"])


def _metric(data: TaskData, examples: Sequence[Any]):
    """A function of places and scores, as SeqIO's score metrics are."""
    wanted = data.asking.normalisation
    normalisation = wanted if wanted in BY_SCORE_ALONE else "sum"
    suffix = "" if normalisation == wanted else "_by_sum"

    def metric(targets: Sequence[tuple[int, int]], scores: Sequence[float]) -> dict[str, float]:
        groups: dict[int, dict[int, float]] = defaultdict(dict)
        for (document, candidate), score in zip(targets, scores):
            groups[document][candidate] = float(score)
        judged = []
        for document, group in sorted(groups.items()):
            example = examples[document]
            candidates = [
                Candidate(group[i], 1, len(choice)) for i, choice in enumerate(example.choices)
            ]
            judged.append(Judged(example, choose(candidates, normalisation)))
        return {f"{name}{suffix}": METRICS[name](judged) for name in data.asking.metrics}

    return metric
