"""Evaluates a run's checkpoint on the paper's one-shot tasks, from the run's folder alone.

    python scripts/evaluate.py --workdir=runs/quickstart-laser --data_dir=DATA
    python scripts/evaluate.py --workdir=runs/quickstart-laser --last=5     mean and deviation

Prints a table and writes JSON into RUN/eval (see eval/results.py). Data are read from --data_dir,
unpacked as they were downloaded, or from TensorFlow Datasets that are prepared already; a task
without data is reported with how to get them. Started again, it leaves out what is finished.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from laser.training.console import end_on_ctrl_c
from laser.training.hardware import tune_cpu

if __name__ == "__main__":
    end_on_ctrl_c("stopped; what is finished is kept, and the same command goes on")
    tune_cpu()  # before anything imports jax

from tqdm import tqdm

from eval import oneshot, paper, results
from eval.oneshot import Settings, TaskData
from eval.results import ResultsFolder
from eval.run import TrainedModel, open_model, saved_steps
from eval.sources import MissingData
from eval.tasks import KNOWN, PROTOCOLS, Task, choose_tasks
from laser.training.checkpoint import CheckpointError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, or no task had data."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        return _evaluate(arguments)
    except (ValueError, CheckpointError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--step", default="last", help="checkpoint: a number, several as 100,200, last or all"
    )
    parser.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints")
    parser.add_argument("--tasks", default="all", help=f"all, or some of {', '.join(KNOWN)}")
    parser.add_argument("--protocol", default="gpt3", choices=PROTOCOLS)
    parser.add_argument("--shots", type=int, default=1, help="demonstrations in each prompt")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the demonstrations")
    parser.add_argument("--limit", type=int, help="examples of each task, the first ones")
    parser.add_argument("--data_dir", type=Path, help="where the tasks' data are")
    parser.add_argument("--records", action="store_true", help="also write every example's scores")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="only print N prompts of each task"
    )
    return parser


def _evaluate(arguments: argparse.Namespace) -> int:
    tasks = choose_tasks(arguments.tasks)
    settings = Settings(arguments.protocol, arguments.shots, arguments.seeds, arguments.limit)
    if arguments.data_dir and not arguments.data_dir.is_dir():
        raise ValueError(f"data_dir={arguments.data_dir}: no such folder")
    steps = choose_steps(arguments.step, arguments.last, saved_steps(arguments.workdir))
    data, missing, broken = _load(tasks, settings, arguments.data_dir)
    if not data:
        pass  # why is said below
    elif arguments.show:
        for task_data in data:
            print("\n".join(shown(task_data, settings, arguments.show)))
    else:
        _score(arguments, steps, settings, data, missing)
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    for name, reason in broken.items():
        print(f"evaluate.py: error: {name}: {reason}", file=sys.stderr)
    return 2 if broken or not data else 0


def choose_steps(wanted: str, newest: int | None, saved: Sequence[int]) -> list[int]:
    """`last`, `all` or numbers, all of which must be there, or the `newest` so many in place of
    them. Raises ValueError."""
    if newest is not None:
        if wanted != "last":
            raise ValueError(f"step={wanted}, last={newest}: give one of the two")
        if not 1 <= newest <= len(saved):
            raise ValueError(f"last={newest}: there are {len(saved)} checkpoints: {list(saved)}")
        return list(saved)[-newest:]
    if wanted in ("last", "all"):
        return list(saved) if wanted == "all" else [saved[-1]]
    if not all(part.isdigit() for part in wanted.split(",")):
        raise ValueError(f"step={wanted}: must be a number, several as 100,200, last or all")
    steps = sorted({int(part) for part in wanted.split(",")})
    absent = [step for step in steps if step not in saved]
    if absent:
        raise ValueError(f"step={wanted}: there is no checkpoint {absent[0]}, only {list(saved)}")
    return steps


def _load(tasks: Sequence[Task], settings: Settings, data_dir: Path | None):
    """Data of the tasks that have them, and for the others why not: missing, or broken."""
    data: list[TaskData] = []
    missing: dict[str, str] = {}
    broken: dict[str, str] = {}
    for task in tasks:
        try:
            data.append(oneshot.load_task(task, settings, data_dir))
        except MissingData as error:
            missing[task.name] = str(error)
        except ValueError as error:
            broken[task.name] = str(error)
    return data, missing, broken


def shown(data: TaskData, settings: Settings, count: int) -> list[str]:
    """The first prompts as the model reads them, with the candidates; * marks the right ones."""
    lines = []
    for index, prompt in enumerate(oneshot.prompted(data, settings, oneshot.FIRST_SEED)[:count]):
        lines.append(f"{'=' * 20} {data.task.name} {index} {'=' * 20}")
        contexts, example = prompt.contexts(), prompt.example
        if len(set(contexts)) == 1:
            lines.append(contexts[0])
        for i, (context, text) in enumerate(zip(contexts, example.continuations)):
            mark = "*" if i in example.golds else " "
            before = "" if len(set(contexts)) == 1 else f"{context!r} + "
            lines.append(f"  {mark} {before}{text!r}")
    return lines


def _score(
    arguments: argparse.Namespace,
    steps: Sequence[int],
    settings: Settings,
    data: Sequence[TaskData],
    missing: dict[str, str],
) -> None:
    by_step = {}
    for step in steps:
        folder = ResultsFolder(arguments.workdir / "eval", step, settings)
        by_step[step] = _score_step(arguments, step, settings, data, folder)
        path = folder.save_all(missing)
        figures = paper.figures(_model_config(arguments.workdir))
        print(f"\nstep {step}, {results.describe(settings)}, in percent")
        print(results.table(by_step[step], figures))
        lines = [results.legend("seeds"), *results.remarks(by_step[step]), f"written: {path}"]
        print("\n".join(lines))
    if len(steps) > 1:
        merged = [results.over_checkpoints(group) for group in zip(*by_step.values())]
        path = results.save_over_checkpoints(arguments.workdir / "eval", settings, steps, merged)
        print(f"\nover the checkpoints {', '.join(map(str, steps))}: mean and deviation")
        print(results.table(merged, figures, "checkpoints"))
        print(f"{results.legend('checkpoints')}\nwritten: {path}")


def _model_config(workdir: Path):
    from laser.training.run_folder import load_run_config

    return load_run_config(str(workdir)).model


def _score_step(
    arguments: argparse.Namespace,
    step: int,
    settings: Settings,
    data: Sequence[TaskData],
    folder: ResultsFolder,
) -> list[results.Result]:
    """Results of all tasks at one checkpoint; the model is loaded if one is still to do."""
    finished, model = [], None
    for task_data in data:
        name = task_data.task.name
        result = folder.finished(name, arguments.records)
        if result is None:
            model = model or open_model(arguments.workdir, step)
            try:
                result = _score_task(task_data, settings, model, folder, arguments.records)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            folder.save(result)
        score = result["metrics"][result["metric"]]["mean"]
        print(f"{name}: {result['metric']} {100 * score:.2f} % of {result['n']}", flush=True)
        finished.append(result)
    return finished


def _score_task(
    data: TaskData, settings: Settings, model: TrainedModel, folder: ResultsFolder, records: bool
) -> results.Result:
    with tqdm(desc=data.task.name, unit=" candidates", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model_parts = (model.scorer, model.params, model.tokenizer, progress)
        if not records:
            return oneshot.evaluate_task(data, settings, *model_parts)
        with folder.record_writer(data.task.name) as write:
            return oneshot.evaluate_task(data, settings, *model_parts, write)


if __name__ == "__main__":
    sys.exit(main())
