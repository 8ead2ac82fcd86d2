"""Whether a run's folder is what was written: tensors, sidecars, config, tokenizer and metrics.

Reads tensors in pieces and without jax, so that it needs little memory and no accelerator, and
changes nothing. Restoring checks the same; this looks at all checkpoints, also at those set aside.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from data.errors import first_line
from laser.training.folders import url_of
from laser.training.metrics import METRICS_FILE, mark_of, read_metrics
from laser.training.run_folder import (
    check_origin,
    load_record,
    read_sidecar,
    saved_step_folders,
    set_aside,
)

PIECE_ELEMENTS = 1 << 24  # read at a time: 64 MiB


def checkpoints_of(workdir: Path) -> dict[Path, int]:
    """Folder → step of each checkpoint, those set aside last. Their step is in their name."""
    kept = {path: step for step, path in saved_step_folders(workdir).items()}
    names = {path: path.name.partition(".")[0] for path in set_aside(workdir)}
    return kept | {path: int(step) for path, step in names.items() if step.isdigit()}


def checkpoint_problems(workdir: Path, folder: Path, step: int) -> list[str]:
    """What is wrong with a checkpoint; empty if it is intact."""
    try:
        sidecar = read_sidecar(folder)
        if sidecar["step"] != step:
            return [f"it was saved as step {sidecar['step']}"]
        check_origin(workdir, step, sidecar)
    except ValueError as error:
        return [str(error)]
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
        if not (folder / name).is_file():
            return [f"{name} is missing"]
    return list(_tensor_problems(folder / "state", sidecar["tensors"]))


def other_problems(workdir: Path) -> list[str]:
    """What is wrong with the rest of the folder: config, tokenizer, metrics."""
    problems = []
    try:
        load_record(str(workdir))
    except ValueError as error:
        problems.append(str(error))
    path = workdir / METRICS_FILE
    try:
        if path.exists():
            read_metrics(path)
    except ValueError as error:
        problems.append(str(error))
    return problems + list(_mark_problems(workdir, path))


def _mark_problems(workdir: Path, path: Path) -> Iterator[str]:
    """Compares metrics.jsonl with what it was when each checkpoint was saved."""
    for step, folder in saved_step_folders(workdir).items():
        try:
            mark: dict[str, Any] | None = read_sidecar(folder).get("metrics")
        except ValueError:  # said of the checkpoint
            continue
        if mark and mark_of(path, mark["bytes"]) != mark:
            yield f"{path}: the lines up to step {step} are not those that were written"


def _tensor_problems(state: Path, tensors: dict[str, dict[str, Any]]) -> Iterator[str]:
    base = url_of(state)
    for name, entry in tensors.items():
        kvstore = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}
        try:
            array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()
            kind = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
            same = kind == entry["type"] and _sum(array) == entry["sum"]
        except ValueError as error:  # what tensorstore calls everything that it cannot read
            yield f"{name}: {first_line(error)}"
        else:
            if not same:
                yield f"{name}: the checksum differs"


def _sum(array: Any) -> int:
    """The wrapping sum of a tensor's 32-bit words, as checkpoint.py has it."""
    total, shape = 0, array.shape
    rows = max(1, PIECE_ELEMENTS // max(1, math.prod(shape[1:])))
    starts = range(0, shape[0], rows) if shape else (None,)
    for start in starts:
        part = array if start is None else array[start : min(start + rows, shape[0])]
        words = np.ascontiguousarray(part.read().result()).reshape(-1).view(np.uint32)
        total += int(words.sum(dtype=np.uint64)) % (1 << 32)
    return total % (1 << 32)
