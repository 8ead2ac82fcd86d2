"""The one-shot tasks as one more evaluation of a training run.

Data are read and checked once, before training starts; then a function of the parameters gives the
metrics that the run writes beside its loss. Parameters stay where training has them.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from data.addresses import told_as_os_errors
from data.tokenizer import Tokenizer
from eval.likelihood import oneshot
from eval.likelihood.oneshot import Settings, TaskData
from eval.likelihood.scoring import Scorer
from eval.tasks.catalogue import choose_tasks
from laser.training.config import EvaluationConfig, RunConfig
from laser.training.folders import folder_of
from models.families import Parameters

log = logging.getLogger(__name__)

STAND_INS = ("validation",)  # scores of a train split would be taken for those of held-out rows


def load_tasks(config: RunConfig, tokenizer: Tokenizer) -> list[TaskData]:
    """The tasks of the section `evaluation`; no device is touched.

    Args:
      config: of the run.
      tokenizer: of its data.

    Raises:
      ValueError: unknown tasks, data that are missing or can't be used, or a candidate that is
        longer than the rows that the model is trained on.
    """
    wanted, settings = config.evaluation, _settings(config.evaluation)
    if not wanted.tasks:
        return []
    keys = ("evaluation.tasks", wanted.tasks, "evaluation.data_dir", wanted.data_dir)
    with task_data(*keys) as folder:
        tasks = choose_tasks(wanted.tasks)
        data = [oneshot.load_task(task, settings, folder, STAND_INS) for task in tasks]
        for loaded in data:
            oneshot.check_lengths(loaded, settings, tokenizer, config.data.seq_len)
            if loaded.split != loaded.asking.split:
                log.info(
                    "%s: the %s split is scored (%s), as there is no %s split",
                    loaded.task.name, loaded.split, loaded.loaded.origin, loaded.asking.split,
                )  # fmt: skip
    return data


def make_evaluation(
    config: RunConfig, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, data: Sequence[TaskData]
) -> Callable[[Parameters], dict[str, float]]:
    """A function from parameters on `mesh` to {"eval/TASK/METRIC": fraction}.

    Args:
      config: of the run; prompts are cut to its data.seq_len.
      mesh: of the run.
      tokenizer: of its data.
      data: of `load_tasks`.
    """
    settings = _settings(config.evaluation)
    scorer = Scorer(config.model, config.data.seq_len, mesh)

    def evaluate(params: Parameters) -> dict[str, float]:
        metrics = {}
        for loaded in data:
            result = oneshot.evaluate_task(loaded, settings, scorer, params, tokenizer)
            for name, values in result["metrics"].items():
                metrics[f"eval/{loaded.task.name}/{name}"] = values["mean"]
        return metrics

    return evaluate


@contextlib.contextmanager
def task_data(tasks_key: str, tasks: str, folder_key: str, folder: str) -> Iterator[Path | None]:
    """The folder for reading the tasks of a config, None if it is unset. What goes wrong while they
    are read is a ValueError in the terms of the config."""
    try:
        place = folder_of(folder) if folder else None
        if place and not place.is_dir():
            raise ValueError(f"{folder_key}={folder}: no such folder")
        with told_as_os_errors(folder):
            yield place
    except OSError as error:
        raise ValueError(f"{folder_key}={folder}: cannot be read ({error})") from error
    except ValueError as error:
        words = str(error).replace("--data_dir", f"--config.{folder_key}")
        raise ValueError(f"{tasks_key}={tasks}: {words}") from error


def _settings(config: EvaluationConfig) -> Settings:
    return Settings(config.protocol, config.shots, seeds=1, limit=config.limit or None)
