"""What came of a study's runs: `result.json` in the folder of each, and what is read from it.

A run that failed has a result, too. Numbers are those of metrics.jsonl and of study/measure.py.
"""

import functools
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs import base
from data.sealed import seal, unseal
from laser.training.config import TrainingConfig, load_config, to_dict
from laser.training.fields import flatten
from laser.training.folders import write_atomically
from laser.training.metrics import METRICS_FILE, SKIPPED_FILE, count_spikes, read_metrics
from laser.training.run_folder import (
    OF_NO_MATTER,
    load_record,
    load_versions,
    saved_step_folders,
)
from models.config import ModelConfig
from study.plan import Cell

RESULT, MEASURED = "result.json", "measured.json"
LOSS = "eval/loss"


def write_done(cell: Cell, folder: Path, measure: str) -> dict[str, Any]:
    """Of a run that has ended as it should; without a number at the end it has failed. Raises
    ValueError if it has not what decides."""
    lines = read_metrics(folder / METRICS_FILE)
    evals = [(line["step"], line[measure]) for line in lines if measure in line]
    if not evals:
        raise ValueError(
            f"{cell.key}: the study's measure={measure} is not in its {METRICS_FILE}; there are "
            f"{', '.join(sorted({name for line in lines for name in line if '/' in name}))}"
        )
    final = [line for line in lines if LOSS in line][-1]
    if None in (evals[-1][1], final[LOSS]):
        return write_failed(cell, folder, "ended with a loss that is not finite")
    measured = json.loads((folder / MEASURED).read_text()) if (folder / MEASURED).exists() else {}
    record = load_record(str(folder))
    batch = record["config"]["training"]["batch_size"] * record["config"]["data"]["seq_len"]
    model = load_config(record["config"]).model
    speeds = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    if not speeds:  # each process made one step, which compiles and has no speed
        last = [line for line in lines if "time/steps" in line][-1]
        speeds = [last["time/steps"] / last["step"]]
    norms = [
        [line["step"], line["gradient_norm"] and float(f"{line['gradient_norm']:.4g}")]
        for line in lines
        if "gradient_norm" in line
    ]
    skipped = [line["skipped_steps"] for line in lines if "skipped_steps" in line]
    result = _identity(cell) | {
        "status": "done",
        "eval_loss": final[LOSS],
        "evaluated": {k: x for line in lines for k, x in line.items() if k.startswith("eval/")},
        "bits_per_byte": final.get("eval/bits_per_byte"),
        "measure": measure,
        "curve": [(step, value) for step, value in evals if value is not None],
        "spikes": count_spikes(folder),
        "skipped_steps": int(skipped[-1]) if skipped else 0,
        "steps": final["step"],
        "tokens": final["step"] * batch,
        "parameters": beside_embedding(model),
        "all_parameters": beside_embedding(model) + model.outer_weights,
        "seconds_per_step": statistics.median(speeds),
        "gradient_norm": norms[:: max(1, len(norms) // 50)],
        "config": comparable(record["config"]),
        "data": record["data"]["fingerprint"],
        **measured,
        **load_versions(folder),
    }
    return _write(folder, result)


def write_adopted(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run that was trained elsewhere, from the numbers that are kept of it."""
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder, {key: value for key, value in run.items() if key != "flags"})


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's fields by their whole names, without those that may differ when a run goes on."""
    return {name: x for name, x in flatten(config).items() if name not in OF_NO_MATTER}


def changes(result: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """A line for each field that has another value in a config than in that of a run.

    Fields that the run does not know came later, and have changed nothing if they are as in
    configs/base.py; where that has none, as of other models, nothing is said of them.
    """
    if "config" not in result:  # a run of before, which failed
        return []
    then, now = result["config"], comparable(config)
    defaults = _defaults()
    lines = [
        f"{name}: {value} -> {now.get(name, '(absent)')}"
        for name, value in then.items()
        if name not in OF_NO_MATTER and (name not in now or now[name] != value)
    ]
    return lines + [
        f"{name}: (absent) -> {value}"
        for name, value in now.items()
        if name not in then and name in defaults and value != defaults[name]
    ]


@functools.cache
def _defaults() -> dict[str, Any]:
    return comparable(base.get_config().to_dict())


def write_failed(cell: Cell, folder: Path, reason: str) -> dict[str, Any]:
    """Of a run that cannot go on, as one that has diverged."""
    config = comparable(to_dict(cell.config()))
    failed = {"status": "failed", "reason": reason, "config": config}
    return _write(folder, _identity(cell) | failed | load_versions(folder))


def ended(cell: Cell, folder: Path) -> str | None:
    """How train.py ended in a folder: "" after the last step, or why the run cannot go on. None if
    it has not ended. Raises ValueError if what has ended is another run than the study's."""
    config = cell.config()
    how = _ended(folder, config.training)
    if how is not None:
        there = comparable(load_record(str(folder))["config"])
        if lines := changes({"config": there}, to_dict(config)):
            raise ValueError(
                f"{folder}: was trained with another config ({'; '.join(lines)}); move it away "
                "and train the study's run by the flags that --commands prints"
            )
    return how


def _ended(folder: Path, training: TrainingConfig) -> str | None:
    saved = training.steps in saved_step_folders(folder)
    if saved and any(LOSS in line for line in _lines(folder / METRICS_FILE, training.steps)):
        return ""
    limit = training.max_skipped_steps
    skipped = _lines(folder / SKIPPED_FILE)[-limit:]
    steps = [line["step"] for line in skipped]
    if len(steps) == limit and steps[-1] - steps[0] == limit - 1 and _is_broken(skipped[-1]):
        return f"diverged: no update in steps {steps[0]} to {steps[-1]}"
    return None


def _is_broken(skipped: Mapping[str, Any]) -> bool:
    """Whether a step was skipped for numbers that are not finite, and not for a large gradient."""
    return not all(math.isfinite(float(skipped[name])) for name in ("loss", "gradient_norm"))


def _lines(path: Path, step: int | None = None) -> list[dict[str, Any]]:
    lines = read_metrics(path) if path.exists() else []
    return [line for line in lines if step in (None, line["step"])]


def read(folder: Path) -> dict[str, Any] | None:
    """A run's result, if it has one. Raises ValueError if it is damaged."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        return unseal(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete it, and the study measures the run again") from (
            error
        )


def final(result: Mapping[str, Any], measure: str) -> float:
    """What a run ended with; infinite if it failed."""
    value = result.get("eval_loss") if measure == LOSS else result.get("evaluated", {}).get(measure)
    return math.inf if value is None else value


def beside_embedding(model: ModelConfig) -> int:
    """Parameters of the matrices in the blocks."""
    return model.num_layers * (model.attention_weights + model.mlp_weights)


def all_parameters(result: Mapping[str, Any], shared: Mapping[str, Any]) -> int:
    """Parameters of all matrices of a finished run, the embedding's with them. Older numbers, which
    are of decoders alone, do not have it; `shared` are the fields that all configs have."""
    if "all_parameters" in result:
        return result["all_parameters"]
    config = {**shared, **result["config"]}
    return result["parameters"] + config["model.vocab_size"] * config["model.model_dim"]


def _identity(cell: Cell) -> dict[str, Any]:
    return {"stage": cell.stage, "name": cell.name, "settings": dict(cell.settings)}


def _write(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    sealed = seal(result)
    write_atomically(folder / RESULT, json.dumps(sealed) + "\n")
    return sealed
