"""The one-shot tasks as one more evaluation of a training run.

Data are read and prompts compiled once; then a function of the parameters gives the metrics that
the run writes beside its loss. Parameters stay where training has them.
"""

from collections.abc import Callable
from pathlib import Path

import jax

from data.tokenizer import Tokenizer
from eval import oneshot
from eval.oneshot import Settings
from eval.scoring import Scorer
from eval.tasks import choose_tasks
from laser.training.config import RunConfig
from models.decoder import Parameters


def make_evaluation(
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    tasks: str,
    settings: Settings,
    data_dir: Path | None,
) -> Callable[[Parameters], dict[str, float]]:
    """A function from parameters on `mesh` to {"eval/TASK/METRIC": fraction}.

    Args:
      config: of the run; prompts are cut to its data.seq_len.
      mesh: of the run.
      tokenizer: of its store.
      tasks: names with commas between them, as for scripts/evaluate.py.
      settings: the same each time, so that the numbers of a run can be compared.
      data_dir: where the tasks' data are.

    Raises:
      ValueError: unknown tasks, or data that are missing or can't be used; before training starts.
    """
    data = [oneshot.load_task(task, settings, data_dir) for task in choose_tasks(tasks)]
    scorer = Scorer(config.model, config.data.seq_len, mesh)

    def evaluate(params: Parameters) -> dict[str, float]:
        metrics = {}
        for task_data in data:
            result = oneshot.evaluate_task(task_data, settings, scorer, params, tokenizer)
            for name, values in result["metrics"].items():
                metrics[f"eval/{task_data.task.name}/{name}"] = values["mean"]
        return metrics

    return evaluate
