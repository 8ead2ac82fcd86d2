"""Results on disk and as a table.

    RUN/eval/STEP/SETTINGS/TASK.json           one finished task, written at once
                           TASK.records.jsonl  each example: prompt, scores, choice; on request
                           results.json        all finished tasks, and why others are missing
    RUN/eval/checkpoints/SETTINGS/results.json  over those last asked for

SETTINGS names all of them, such as gpt3-1shot-5seeds or, of the first 20 examples of each task,
gpt3-1shot-5seeds-limit20: a quick look never stands in the place of a full evaluation. A result
says by fingerprints what was scored: the rows, demonstrations' included, and the checkpoint. It is
used again for the same ones alone; with others the task is evaluated anew and its file replaced,
and results.json leaves out what is of another checkpoint.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.likelihood.oneshot import Settings, spread
from eval.likelihood.paper import Figures
from eval.tasks.catalogue import TASKS
from laser.training.folders import write_atomically

Result = dict[str, Any]
Record = dict[str, Any]
OF_ONE = ("fingerprints", "shots_dropped", "truncated", "seconds")  # fields of one checkpoint's


class ResultsFolder:
    """The results of one checkpoint with the same settings; made if not there."""

    def __init__(self, output: Path, step: int, settings: Settings):
        self.path = _folder(output, str(step), settings)
        self.path.mkdir(parents=True, exist_ok=True)

    def finished(self, task: str) -> Result | None:
        """The result that is there, of whatever rows and checkpoint."""
        path = self.path / f"{task}.json"
        return _read(path) if path.is_file() else None

    def has_records(self, task: str) -> bool:
        return self._records(task).is_file()

    def save(self, result: Result, records: bool) -> None:
        """Writes a result; records that are there are its own, or else they are removed."""
        if not records:
            self._records(result["task"]).unlink(missing_ok=True)
        write_atomically(self.path / f"{result['task']}.json", _text(result))

    def save_all(
        self, checkpoint: str, missing: Mapping[str, str], failed: Mapping[str, str]
    ) -> Path:
        """Writes results.json, of these tasks and of those finished before; returns its path.

        Args:
          checkpoint: fingerprint of the one that was scored; results of another are left out.
          missing: tasks without data, and how to get them.
          failed: tasks that could not be evaluated this time, and why.
        """
        path = self.path / "results.json"
        finished = sorted(file for file in self.path.glob("*.json") if file != path)
        results = {file.stem: _read(file) for file in finished if file.stem not in failed}
        tasks = {
            task: result
            for task, result in results.items()
            if result.get("fingerprints", {}).get("checkpoint") == checkpoint
        }
        lacking = {task: why for task, why in missing.items() if task not in tasks}
        write_atomically(path, _text({"tasks": tasks, "missing": {**lacking, **failed}}))
        return path

    @contextlib.contextmanager
    def record_writer(self, task: str) -> Iterator[Callable[[Record], None]]:
        """A function that appends a record; the file is there once the context has ended well."""
        temporary = self._records(task).with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                yield lambda record: print(json.dumps(record, ensure_ascii=False), file=file)
            temporary.replace(self._records(task))
        finally:
            temporary.unlink(missing_ok=True)

    def _records(self, task: str) -> Path:
        return self.path / f"{task}.records.jsonl"


def of_checkpoint(folder: Path, checkpoint: str) -> dict[str, list[Result]]:
    """SETTINGS → results of whole tasks in RUN/eval/STEP, of the checkpoint of this fingerprint.

    Raises ValueError, which names the file, if one is damaged.
    """
    found = {}
    for path in sorted(folder.glob("*/results.json")):
        results = [
            result
            for result in _object(_read(path).get("tasks"), path).values()
            if _object(result, path).get("fingerprints", {}).get("checkpoint") == checkpoint
        ]
        if results and not any(result["limit"] for result in results):
            found[path.parent.name] = results
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return _object(value, path)


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _damaged(path, f"expected an object, got {json.dumps(value)[:40]}")
    return value


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: damaged ({why}); remove it and evaluate again")


def _text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def describe(settings: Settings) -> str:
    """The settings in words."""
    words = [settings.protocol, _count(settings.shots, "shot")]
    words += [_count(settings.seeds, "seed")] if settings.shots else []
    words += [f"the first {settings.limit} of each task alone"] if settings.limit else []
    return ", ".join(words)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def over_checkpoints(results: Sequence[Result]) -> Result:
    """One task's results at several checkpoints as one: mean and deviation over checkpoints, and a
    list of what each says of itself alone."""
    metrics = {
        name: spread([result["metrics"][name]["mean"] for result in results])
        for name in results[0]["metrics"]
    }
    each = {name: [result[name] for result in results] for name in OF_ONE if name in results[0]}
    return {**results[0], **each, "metrics": metrics}


def save_over_checkpoints(
    output: Path, settings: Settings, steps: Sequence[int], merged: Sequence[Result]
) -> Path:
    """Writes the results of `over_checkpoints` and returns the file's path."""
    path = _folder(output, "checkpoints", settings) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks = {result["task"]: result for result in merged}
    write_atomically(path, _text({"steps": list(steps), "tasks": tasks}))
    return path


def _folder(output: Path, name: str, settings: Settings) -> Path:
    parts = [settings.protocol, f"{settings.shots}shot"]
    if settings.shots:  # without demonstrations there is nothing to draw
        parts.append(_count(settings.seeds, "seed").replace(" ", ""))
    if settings.limit:
        parts.append(f"limit{settings.limit}")
    return output / name / "-".join(parts)


def table(results: Sequence[Result], paper: Figures, over: str = "seeds") -> str:
    """The table that is printed, in percent.

    Metric, its deviation `over` seeds or checkpoints, the standard error of a share of n examples,
    chance, the paper's figure, which is there only if it has figures for such a model, beside the
    metric that is taken for its own, and where the rows came from.
    """
    header = ["task", "n", "metric", "score", f"± {over}", "± sample", "chance"]
    header += ["paper"] if paper else []
    header += ["data"]
    rows = [header]
    for result in results:
        for name, values in result["metrics"].items():
            first = name == result["metric"]
            row = [result["task"] if first else "", str(result["n"]) if first else "", name]
            deviation = values["std"]
            row += [_percent(values["mean"]), "" if deviation is None else _percent(deviation)]
            row += [_percent(_sample_error(values["mean"], result["n"])) if _is_share(name) else ""]
            row += [_percent(result["chance"]) if name in ("accuracy", "em") else ""]
            task = TASKS.get(result["task"])
            # The paper's protocol is GPT-3's; the harness reports another metric of MultiRC first.
            theirs = task is not None and name == task.protocols["gpt3"].metrics[0]
            figure = paper.get(task.paper) if task and theirs else None
            row += ["" if figure is None else f"{figure:.2f}"] if paper else []
            row += [result["origin"] if first else ""]
            rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = (0, 2, len(header) - 1)  # columns of words
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


def legend(over: str) -> str:
    """What the columns behind ± are, for below the table."""
    return (
        f"± {over}: standard deviation over {over}; ± sample: standard error of the score with n "
        "examples (binomial)"
    )


def _is_share(metric: str) -> bool:
    """Whether a metric is the share of the examples that were answered well."""
    return metric in ("em", "acc_norm") or metric.startswith("accuracy")


def _sample_error(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / n)


def remarks(results: Sequence[Result]) -> list[str]:
    """What a reader of the table has to know: splits, prompts that were cut, rows left out."""
    lines = []
    for result in results:
        task = TASKS.get(result["task"])
        wanted = task.protocols[result["protocol"]].split if task else result["split"]
        passes = result["n"] * len(next(iter(result["metrics"].values()))["values"])
        notes = []
        if result["split"] != wanted:
            notes.append(f"the {result['split']} split, as there is no {wanted} split here")
        if result["unusable_rows"]:
            notes.append(f"{result['unusable_rows']} rows left out, as their labels are hidden")
        for key, words in (
            ("shots_dropped", "lost demonstrations"),
            ("truncated", "lost the left of the context"),
        ):
            if result[key]:
                notes.append(f"{result[key]} of {passes} prompts {words}")
        if notes:
            lines.append(f"{result['task']}: {'; '.join(notes)}")
    return lines


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"
