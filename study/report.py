"""What a study's runs say: report.md with tables and figures, and all raw numbers in one file.

report.md, *.png    for people
numbers.json        every run's numbers; docs/results.md is made of such files
"""

import datetime
import json
from pathlib import Path
from typing import Any

from data.sealed import SEAL, seal, unseal
from laser.training.folders import write_atomically
from study import figures, tables
from study.plan import listed, number_of_runs
from study.run import Folder

NUMBERS, REPORT = "numbers.json", "report.md"


def write_report(folder: Folder) -> str:
    """Writes tables and figures of what is there. Returns the tables.

    Raises:
      ValueError: no run has a result yet, or a result is damaged.
    """
    record = collect(folder)
    if not record["runs"]:
        raise ValueError(f"output={folder.path}: no run has a result yet")
    write_atomically(folder.path / NUMBERS, dumps(record))
    pictures = figures.draw_all(record, folder.path)
    text = tables.all_tables(record)
    shown = "\n\n".join(f"![{path.stem}]({path.name})" for path in pictures)
    today = datetime.date.today().isoformat()
    done, total = len(record["runs"]), sum(stage["runs"] for stage in record["stages"])
    head = f"# {folder.plan.file}\n\n{done} of {total} runs, {today}"
    write_atomically(folder.path / REPORT, f"{head}\n\n{text}\n\n{shown}\n")
    return f"{text}\n\n{folder.path / REPORT}"


def collect(folder: Folder) -> dict[str, Any]:
    """The study's plan with its runs' numbers."""
    study = folder.plan.study
    stages, runs = [], []
    for stage, cells in folder.stages():
        stages.append({
            "name": stage.name,
            "why": stage.why,
            "runs": number_of_runs(stage),
            "listed": listed(stage),
        })  # fmt: skip
        for cell in cells or ():
            if result := folder.result(cell):
                numbers = {key: value for key, value in result.items() if key != SEAL}
                runs.append({**numbers, "flags": list(cell.flags())})
    compare = [
        {"stage": c.stage, "one": dict(c.one), "other": dict(c.other), "other_stage": c.other_stage}
        for c in study.compare
    ]
    record = {
        "study": folder.plan.file,
        "stages": stages,
        "compare": compare,
        "sizes": list(study.sizes),
        "measure": study.measure,
        **_shared_config(runs),
    }
    return seal(record)


def _shared_config(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs, and apart from them the fields of their configs that are the same in all."""
    configs = [run["config"] for run in runs if "config" in run]
    shared = {
        name: value
        for name, value in (configs[0] if configs else {}).items()
        if all(name in config and config[name] == value for config in configs)
    }
    for i, run in enumerate(runs):
        if "config" in run:
            own = {name: value for name, value in run["config"].items() if name not in shared}
            runs[i] = {**run, "config": own}
    return {"config": shared, "runs": runs}


def dumps(record: dict[str, Any]) -> str:
    """One line for each run, so that a change of one shows as a change of one."""
    head = {key: value for key, value in record.items() if key != "runs"}
    runs = ",\n  ".join(json.dumps(run, sort_keys=True) for run in record["runs"])
    return f'{json.dumps(head)[:-1]}, "runs": [\n  {runs}\n]}}\n'


def read_numbers(path: Path) -> dict[str, Any]:
    """Raises ValueError if the file is damaged or no study's."""
    try:
        record = unseal(path.read_bytes())
        if not {"stages", "runs", "compare"} <= {*record}:
            raise ValueError("not the numbers of a study")
        return record
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; make it again by scripts/study.py --report") from error
