"""Evaluates a run's checkpoint on the paper's one-shot tasks, from the run's folder alone.

    python scripts/evaluate.py --workdir=runs/quickstart-laser --data_dir=DATA
    python scripts/evaluate.py --workdir=runs/quickstart-laser --last=3     mean and deviation

Prints a table and writes JSON into RUN/eval, or into --output where the run is not to be written
(see eval/likelihood/results.py). Data are read from --data_dir, unpacked as they were downloaded,
or from TensorFlow Datasets that are prepared already; a task without data is reported with how to
get them. Started again, it scores only what is new: other tasks, settings, rows or checkpoints.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.addresses import told_as_os_errors
from laser.training.console import end_on_ctrl_c
from laser.training.folders import folder_of
from laser.training.hardware import tune_cpu

if __name__ == "__main__":
    end_on_ctrl_c("stopped; what is finished is kept, and the same command goes on")
    tune_cpu()  # before anything imports jax

from tqdm import tqdm

from data.tokenizer import Tokenizer
from eval.likelihood import oneshot, paper, results
from eval.likelihood.oneshot import Settings, TaskData
from eval.likelihood.results import ResultsFolder
from eval.run import TrainedModel, fingerprint, load_decoder_config, open_model, saved_steps
from eval.tasks.catalogue import KNOWN, PROTOCOLS, Task, choose_tasks
from eval.tasks.sources import MissingData
from laser.training.checkpoint import CheckpointError
from laser.training.config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a task could not be scored, and the others were; 2 bad input: flags, a
    task's rows, no task had data, or a folder cannot be read or written."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        with told_as_os_errors(arguments.output or arguments.workdir):
            return _evaluate(arguments)
    except (OSError, ValueError, CheckpointError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=files_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=folder_of, required=True, help="folder of the run")
    parser.add_argument(
        "--step", default="last", help="checkpoint: a number, several as 100,200, last or all"
    )
    parser.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints")
    parser.add_argument("--tasks", default="all", help=f"all, or some of {', '.join(KNOWN)}")
    parser.add_argument("--protocol", default="gpt3", choices=PROTOCOLS)
    parser.add_argument("--shots", type=int, default=1, help="demonstrations in each prompt")
    parser.add_argument(
        "--seeds", type=int, help="draws of the demonstrations; default: 5, for lm_eval 1, as there"
    )
    parser.add_argument("--limit", type=int, help="examples of each task, the first ones")
    parser.add_argument("--data_dir", type=folder_of, help="where the tasks' data are")
    parser.add_argument(
        "--output", type=folder_of, help="folder for the results; default: eval in the run's"
    )
    parser.add_argument("--records", action="store_true", help="also write every example's scores")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="only print N prompts of each task"
    )
    return parser


def files_table() -> str:
    """Of each task the files that are looked for in --data_dir, and where to get them."""
    rows = [("task", "files in --data_dir", "from")]
    for task in KNOWN.values():
        splits = dict.fromkeys(
            split for asking in task.protocols.values() for split in (asking.shots, asking.split)
        )
        names = [task.source.files[split][0] for split in splits if split in task.source.files]
        name, where = task.name, task.source.where or "the embedded corpus"
        for file in names or [""]:
            rows.append((name, file, where))
            name = where = ""
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    return "\n".join(
        [
            "the tasks' data, demonstrations first:",
            *lines,
            "or TASK/*SPLIT*.jsonl or .parquet, as on the Hugging Face hub, with train, val, dev",
            "or test for SPLIT, such as boolq/validation-00000-of-00001.parquet",
        ]
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    tasks = choose_tasks(arguments.tasks)
    seeds = oneshot.SEEDS[arguments.protocol] if arguments.seeds is None else arguments.seeds
    settings = Settings(arguments.protocol, arguments.shots, seeds, arguments.limit)
    steps = choose_steps(arguments.step, arguments.last, saved_steps(arguments.workdir))
    with told_as_os_errors(arguments.data_dir or ""):
        if arguments.data_dir and not arguments.data_dir.is_dir():
            raise ValueError(f"data_dir={arguments.data_dir}: no such folder")
        data, missing, broken = _load(tasks, settings, arguments.data_dir)
    failed: dict[str, str] = {}
    if arguments.show:
        for task_data in data:
            print("\n".join(shown(task_data, settings, arguments.show)))
    elif data:
        failed = _score(arguments, steps, settings, data, missing, broken)
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    for name, reason in {**broken, **failed}.items():
        print(f"evaluate.py: error: {name}: {reason}", file=sys.stderr)
    return 2 if broken or not data else 1 if failed else 0


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
    missing: Mapping[str, str],
    broken: Mapping[str, str],
) -> dict[str, str]:
    """Scores the tasks at all steps and prints their tables. Returns why some could not be."""
    config = load_decoder_config(arguments.workdir, steps[-1])
    failed = _too_long(config, arguments.workdir / "tokenizer.model", settings, data)
    output = arguments.output or arguments.workdir / "eval"
    by_step: list[dict[str, results.Result]] = []
    for step in steps:
        folder = ResultsFolder(output, step, settings)
        checkpoint = fingerprint(arguments.workdir, step)
        scored = _score_step(arguments, step, checkpoint, settings, data, folder, failed)
        by_step.append(scored)
        path = folder.save_all(checkpoint, missing, {**broken, **failed})
        if scored:
            found = list(scored.values())
            print(f"\nstep {step}, {results.describe(settings)}, in percent")
            print(results.table(found, paper.figures_beside(config, step)))
            print("\n".join([results.legend("seeds"), *results.remarks(found), f"written: {path}"]))
    everywhere = [name for name in by_step[0] if all(name in scored for scored in by_step)]
    if len(steps) > 1 and everywhere:
        merged = [results.over_checkpoints([s[name] for s in by_step]) for name in everywhere]
        path = results.save_over_checkpoints(output, settings, steps, merged)
        print(f"\nover the checkpoints {', '.join(map(str, steps))}: mean and deviation")
        # The paper's mean over checkpoints (Table 10) is of the last ones, too.
        figures = paper.figures_beside(config, steps[-1])
        print(results.table(merged, figures, "checkpoints"))
        print(f"{results.legend('checkpoints')}\nwritten: {path}")
    return failed


def _too_long(
    config: RunConfig, tokenizer_path: Path, settings: Settings, data: Sequence[TaskData]
) -> dict[str, str]:
    """Tasks with a candidate that the model can't score, and which."""
    tokenizer, reasons = Tokenizer(tokenizer_path), {}
    for task_data in data:
        try:
            oneshot.check_lengths(task_data, settings, tokenizer, config.data.seq_len)
        except ValueError as error:
            reasons[task_data.task.name] = str(error).removeprefix(f"{task_data.task.name}: ")
    return reasons


def _score_step(
    arguments: argparse.Namespace,
    step: int,
    checkpoint: str,
    settings: Settings,
    data: Sequence[TaskData],
    folder: ResultsFolder,
    failed: dict[str, str],
) -> dict[str, results.Result]:
    """Results of all tasks at one checkpoint but those in `failed`, which is added to; the model is
    loaded if one is still to do."""
    scored: dict[str, results.Result] = {}
    model: TrainedModel | None = None
    for task_data in data:
        name = task_data.task.name
        if name in failed:
            continue
        fingerprints = {"rows": task_data.fingerprint, "checkpoint": checkpoint}
        result, how = folder.finished(name), ", reused: the same rows and checkpoint, scored before"
        same = result is not None and result.get("fingerprints") == fingerprints
        if result is None or not same or (arguments.records and not folder.has_records(name)):
            if result is not None and not same:
                print(f"{name}: {_what_differs(result, fingerprints)}", flush=True)
            model = model or open_model(arguments.workdir, step)
            try:
                result = _score_task(task_data, settings, model, folder, arguments.records)
            except ValueError as error:
                failed[name] = f"step {step}: {error}"
                continue
            result["fingerprints"], how = fingerprints, ""
            folder.save(result, arguments.records)
        score = result["metrics"][result["metric"]]["mean"]
        print(f"{name}: {result['metric']} {100 * score:.2f} % of {result['n']}{how}", flush=True)
        scored[name] = result
    return scored


def _what_differs(earlier: results.Result, fingerprints: Mapping[str, str]) -> str:
    known = earlier.get("fingerprints", {})
    what = " and ".join(
        f"another {k}" if k == "checkpoint" else f"other {k}"
        for k, value in fingerprints.items()
        if known.get(k) != value
    )
    return f"the result that was there is of {what} ({earlier['origin']}): scored anew"


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
