"""What a study costs, before it starts: tokens, FLOPs, and hours at the speed of this machine.

The speed is that of the runs which such a machine has trained already, or else half of this
processor's best matrix product, as training reaches on CPUs. It does not touch an accelerator,
whose speed the first run tells.
"""

import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

from laser.training.hardware import has_accelerator
from laser.training.metrics import format_duration
from laser.training.versions import machine
from study.plan import Cell, any_end, number_of_runs
from study.run import Folder

START_SECONDS = 30.0  # imports and compilation of one run
OF_PEAK = 0.5


def estimate(folder: Folder) -> str:
    """Some lines for a person. Runs whose settings are still open count as those of the first
    choice would."""
    rows = []
    for stage in folder.plan.study.stages:
        cells = folder.plan.cells(stage, folder.final_of)
        all_cells = cells or folder.plan.cells(stage, any_end) or []
        left = [cell for cell in all_cells if cells is None or folder.result(cell) is None]
        rows.append((stage, number_of_runs(stage), left))
    speed, source = _speed(folder)
    lines = [f"{'stage':<14} {'runs':>5} {'left':>5} {'M tokens':>9} {'PFLOP':>8} {'time':>12}"]
    seconds = 0.0
    for stage, runs, left in rows:
        costs = [_cost(cell) for cell in left]
        tokens, flops = sum(t for t, _ in costs), sum(f for _, f in costs)
        took = flops / speed + START_SECONDS * len(left) if speed else 0.0
        seconds += took
        told = format_duration(took) if speed else "unknown"
        lines.append(
            f"{stage.name:<14} {runs:>5} {len(left):>5} {tokens / 1e6:>9.1f} {flops / 1e15:>8.2f} "
            f"{told:>12}"
        )
    total = format_duration(seconds) if speed else "unknown until the first run is done"
    return "\n".join([*lines, f"left: {total} on this machine alone ({source})"])


def _cost(cell: Cell) -> tuple[float, float]:
    """Tokens and FLOPs of a run."""
    from models.families import train_flops_per_token  # imports jax

    config = cell.config()
    tokens = config.training.steps * config.training.batch_size * config.data.seq_len
    return tokens, tokens * train_flops_per_token(config.model, config.data.seq_len)


def _speed(folder: Folder) -> tuple[float, str]:
    """FLOP/s of training, 0 if unknown, and where it is from."""
    done = [
        (cell, result)
        for cells in _known(folder)
        for cell in cells
        if (result := folder.result(cell)) and result["status"] == "done"
        if _on_such_a_machine(result)
    ]
    if done:
        speeds = []
        for cell, result in done[-5:]:
            _, flops = _cost(cell)
            speeds.append(flops / (result["seconds_per_step"] * result["steps"]))
        return statistics.median(speeds), f"at the speed of the last {len(speeds)} runs"
    if has_accelerator():
        return 0.0, "the speed of an accelerator is not looked at"
    return OF_PEAK * _matrix_product(), "at half the speed of its matrix products"


def _on_such_a_machine(result: Mapping[str, Any]) -> bool:
    """As far as can be told: older results say nothing of devices, and this machine is not asked
    for its own, which a run may hold."""
    is_cpu = str(result.get("devices", "")).endswith(" cpu")
    same_kind = "devices" not in result or is_cpu != has_accelerator()
    return same_kind and result.get("machine") == machine()


def _known(folder: Folder) -> Iterable[list[Cell]]:
    return (cells for _, cells in folder.stages() if cells)


def _matrix_product(size: int = 1024, repeats: int = 5) -> float:
    import numpy as np

    x = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
