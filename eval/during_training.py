"""The one-shot tasks as one more evaluation of a training run.

Data are read and checked once, before training starts; then a function of the parameters gives the
metrics that the run writes beside its loss. Parameters stay where training has them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from data.tokenizer import Tokenizer
from eval import oneshot
from eval.oneshot import Settings, TaskData
from eval.scoring import Scorer
from eval.tasks import choose_tasks
from laser.training.config import EvaluationConfig, RunConfig
from models.decoder import Parameters


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
    try:
        folder = data_folder(wanted.data_dir)
        data = [oneshot.load_task(task, settings, folder) for task in choose_tasks(wanted.tasks)]
        for task_data in data:
            oneshot.check_lengths(task_data, settings, tokenizer, config.data.seq_len)
    except ValueError as error:
        raise ValueError(f"evaluation: {error}") from error
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
        for task_data in data:
            result = oneshot.evaluate_task(task_data, settings, scorer, params, tokenizer)
            for name, values in result["metrics"].items():
                metrics[f"eval/{task_data.task.name}/{name}"] = values["mean"]
        return metrics

    return evaluate


def data_folder(path: str) -> Path | None:
    """A folder of the config, None if it is unset. Raises ValueError where there is none."""
    if path and not Path(path).is_dir():
        raise ValueError(f"data_dir={path}: no such folder")
    return Path(path) if path else None


def _settings(config: EvaluationConfig) -> Settings:
    return Settings(config.protocol, config.shots, seeds=1, limit=config.limit or None)
