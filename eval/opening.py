"""A run to train, and what is evaluated in it besides its loss: that follows from its rows."""

import json
from collections.abc import Sequence

from data.tokenizer import Tokenizer
from eval import speech
from eval.generation import finetuning
from eval.likelihood import during_training
from eval.likelihood.oneshot import TaskData
from laser.training import hosts, loop
from laser.training.config import RunConfig
from laser.training.evaluation import Evaluation
from laser.training.folders import folder_of
from laser.training.loop import Run
from laser.training.open_rows import open_rows
from laser.training.rows import ExampleRows, Rows
from laser.training.speech_rows import SpeechRows
from laser.training.step import TrainState


def open_run(
    config: RunConfig, workdir: str, allow_config_change: bool
) -> tuple[Run, list[Evaluation]]:
    """The run in a folder, new or old, with its evaluations.

    Raises:
      ValueError: config, data and folder do not fit together; nothing is written then.
    """
    with hosts.together("open the data"):
        texts = finetuning.load_tasks(config.data.tasks, config.data.tasks_dir)
        rows: Rows
        if texts:
            pairs = [finetuning.pairs(texts, split) for split in finetuning.SPLITS]
            rows = ExampleRows(config, folder_of(config.init_from) / "tokenizer.model", *pairs)
        else:
            rows = open_rows(config)
        tasks = []
        if config.evaluation.tasks:
            tasks = during_training.load_tasks(config, Tokenizer(rows.tokenizer_path))
    check_tasks_agree(tasks)
    run = loop.open_run(config, rows, workdir, allow_config_change)
    evaluations = []
    if tasks:
        tokenizer = Tokenizer(rows.tokenizer_path)
        score = during_training.make_evaluation(config, run.program.mesh, tokenizer, tasks)
        evaluations.append(
            Evaluation(run.config.evaluation.every, lambda state: score(state.params))
        )
    return run, evaluations + _of_rows(run, rows, texts)


def check_tasks_agree(tasks: Sequence[TaskData]) -> None:
    """Raises ValueError, on all hosts, if one has read other data of a task than host 0: they would
    score other rows together, or wait for a batch that another does not have."""
    own = json.dumps({data.task.name: data.fingerprint for data in tasks})
    first, *others = map(json.loads, hosts.exchange("compare the tasks' data", own))
    for i, theirs in enumerate(others, 1):
        other = [name for name, value in theirs.items() if first.get(name, value) != value]
        if other:
            raise ValueError(
                f"{hosts.name(i)} has other data of {', '.join(other)} than host 0: "
                "evaluation.data_dir must be one folder for all hosts, or copies of it"
            )


def _of_rows(run: Run, rows: Rows, texts: Sequence) -> list[Evaluation]:
    """Those that go with a kind of rows."""
    config, mesh = run.config, run.program.mesh
    if isinstance(rows, ExampleRows):
        tokenizer = Tokenizer(rows.tokenizer_path)
        decode = finetuning.make_evaluation(
            config, mesh, tokenizer, texts, rows.validation, run.workdir
        )
        every = rows.steps_per_epoch(config)
        return [Evaluation(every, lambda state: decode(state.params, int(state.step)))]
    if isinstance(rows, SpeechRows):
        store = rows.store
        splits = (store.validation, store.test, store.train)
        transcribe = speech.make_evaluation(config, mesh, *splits)

        def rates(state: TrainState) -> dict[str, float]:
            return transcribe(state.params, at_end=int(state.step) >= config.training.steps)

        return [Evaluation(config.evaluation.every, rates)]
    return []
