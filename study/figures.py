"""Figures of a study as PNG, each with axes, units, a legend and the number of its runs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.results import LOSS, all_parameters
from study.statistics import mean_interval
from study.tables import RATE, ends_by_rate, finals, fits, grouped, label, pairs, said, sized

Record = Mapping[str, Any]


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Draws what the runs give. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for stage in record["stages"]:
        name = stage["name"]
        if RATE in stage["listed"]:
            drawn.append(_rates(record, stage, folder / f"rates_{name}.png"))
        elif grouped(record, name):
            drawn.append(_curves(record, name, folder / f"curves_{name}.png"))
    drawn.append(_differences(record, folder / "differences.png"))
    drawn.append(_sizes(record, folder / "sizes.png"))
    return [path for path in drawn if path is not None]


def _rates(record: Record, stage: Record, path: Path) -> Path | None:
    """A line for each group of runs, of means over seeds; rates at which a run failed have none."""
    from matplotlib import pyplot

    groups = ends_by_rate(record, stage)
    means = {
        group: {rate: statistics.fmean(ends) for rate, ends in ends_of.items()}
        for group, ends_of in groups.items()
    }
    if not any(math.isfinite(mean) for of_rate in means.values() for mean in of_rate.values()):
        return None
    figure, axis = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    for group, of_rate in means.items():
        shown = [mean if math.isfinite(mean) else math.nan for mean in of_rate.values()]
        count = sum(map(len, groups[group].values()))
        axis.plot(list(of_rate), shown, marker="o", label=f"{group}, {count} runs")
    axis.set(xscale="log", xlabel="learning rate (peak)", ylabel=f"final {_axis(record)}")
    axis.set_title(f"stage {stage['name']}")
    return _save(figure, axis, path)


def _curves(record: Record, stage: str, path: Path) -> Path:
    """What decides, and the gradient norm, through training: means over seeds, and their range."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for i, (name, runs) in enumerate(grouped(record, stage).items()):
        told = f"{name}, {len(runs)} runs"
        _band(axes[0], [run["curve"] for run in runs], f"C{i}", told)
        _band(axes[1], [run["gradient_norm"] for run in runs], f"C{i}", told)
    axes[0].set(xlabel="step", ylabel=_axis(record))
    axes[0].set_title(f"stage {stage}: mean, and range over seeds")
    axes[1].set(xlabel="step", ylabel="gradient norm before clipping", yscale="log")
    axes[1].legend(fontsize="small")
    axes[1].grid(alpha=0.3)
    return _save(figure, axes[0], path)


def _band(axis, curves: Sequence[Sequence[Sequence[float]]], color: str, told: str) -> None:
    values: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            if value is not None:
                values.setdefault(step, []).append(value)
    steps = [step for step in sorted(values) if len(values[step]) == len(curves)]
    axis.plot(steps, [statistics.fmean(values[s]) for s in steps], color=color, label=told)
    low, high = [min(values[s]) for s in steps], [max(values[s]) for s in steps]
    axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def _differences(record: Record, path: Path) -> Path | None:
    from matplotlib import pyplot

    found = [(c, pairs(record, c)) for c in record["compare"]]
    found = [(c, p) for c, p in found if len(p) > 1]
    if not found:
        return None
    figure, axis = pyplot.subplots(figsize=(8, 1.5 + 0.5 * len(found)), layout="constrained")
    for i, (comparison, matched) in enumerate(found):
        one, other = label(comparison["one"]), label(comparison["other"])
        ones, others = (finals(record, side) for side in zip(*matched))
        delta = mean_interval([a - b for a, b in zip(ones, others)])
        error = [[delta.value - delta.low], [delta.high - delta.value]]
        told = f"{comparison['stage']}: {one} − {other}, {delta.count} pairs"
        axis.errorbar([delta.value], [i], xerr=error, fmt="o", capsize=4, label=told)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel=f"difference of the final {_axis(record)}, mean and 95 % interval")
    axis.set(yticks=[], ylim=(len(found) - 0.5, -0.5), ylabel="comparison")
    return _save(figure, axis, path)


def _sizes(record: Record, path: Path) -> Path | None:
    laws = fits(record)
    if not laws:
        return None
    import numpy as np
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    for i, (attention, law) in enumerate(laws.items()):
        runs = sized(record)[attention]
        sizes = [all_parameters(r, record["config"]) for r in runs]
        losses = [r["eval_loss"] for r in runs]
        axis.plot(sizes, losses, "o", color=f"C{i}")
        line = np.geomspace(min(sizes), max(sizes), 50)
        told = f"{attention}: {law.a.value:.2f} n^{law.b.value:.3f}, {len(sizes)} runs"
        axis.plot(line, law.a.value * line**law.b.value, color=f"C{i}", label=told)
    axis.set(xscale="log", xlabel="parameters, those of the embedding with them", yscale="log")
    axis.set(ylabel="final validation loss (nats)")
    return _save(figure, axis, path)


def _axis(record: Record) -> str:
    return f"{said(record)} (nats)" if record["measure"] == LOSS else said(record)


def _save(figure, axis, path: Path) -> Path:
    from matplotlib import pyplot

    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
