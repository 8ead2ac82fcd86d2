"""Puts runs side by side: what differs in their configs, and what came of it.

    python scripts/compare_runs.py runs/standard runs/laser --png=compare.png
    python scripts/compare_runs.py runs/control runs/change --assert_equal=1e-5

Reads config.json, metrics.jsonl and spikes.jsonl of each run's folder and nothing else. Prints
final and best evaluation, speed, the smoothed training loss, how often it spiked, the loss at equal
steps, and whether the runs read the same rows in the same order, without which a small difference
in loss means little.
--assert_equal holds the losses of training and evaluation of every step to the first run's, to the
bit, or to a relative tolerance; a step that only one of them has is a difference, too.
Exit codes: 0 done, 1 not equal, 2 a folder that is no run.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.addresses import is_address
from laser.training.config import diff_configs
from laser.training.folders import folder_of
from laser.training.metrics import METRICS_FILE, count_spikes, read_metrics

SEEDS = (("training", "seed"), ("data", "shuffle_seed"))
LOSSES = ("loss", "eval/loss")
SMOOTHING = 0.05  # of the last training losses, as a share of all of them
Curve = dict[int, float]


@dataclass
class Run:
    """A run's folder, read."""

    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    curves: dict[str, Curve]  # metric → step → value, steps in order, finite values alone
    spikes: int  # of the loss, see laser/training/spikes.py

    def curve(self, metric: str) -> Curve:
        return self.curves.get(metric, {})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--png",
        help="where to draw the curves (default: beside the first run)",
    )
    parser.add_argument(
        "--assert_equal",
        nargs="?",
        type=_tolerance,
        const=0.0,
        metavar="TOLERANCE",
        help="end with 1 where losses differ by more than this share of them (without it: at all)",
    )
    arguments = parser.parse_args(argv)
    if arguments.assert_equal is not None and len(arguments.runs) < 2:
        parser.error("--assert_equal: give two runs or more")
    try:
        runs = [read_run(folder_of(folder)) for folder in arguments.runs]
    except ValueError as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(report(runs)))
    first = folder_of(arguments.runs[0])
    beside = Path() if is_address(first) else first.resolve().parent
    png = Path(arguments.png or beside / "compare.png")
    draw(runs, png)
    print(f"\ncurves: {png}")
    if arguments.assert_equal is None:
        return 0
    tolerance = arguments.assert_equal
    found = [
        f"{other.name} is not equal to {runs[0].name}: {line}"
        for other in runs[1:]
        if (line := first_difference(runs[0], other, tolerance))
    ]
    if found:
        print("\n".join(found))
        return 1
    count = sum(len(runs[0].curve(metric)) for metric in LOSSES)
    print(f"{count} losses are equal {f'to {tolerance:g} of them' if tolerance else 'to the bit'}")
    return 0


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no tolerance: write --assert_equal=1e-5, or --assert_equal after the runs"
        )
    return value


def read_run(folder: Path) -> Run:
    """Reads a run. Raises ValueError that names the missing or empty file."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run")
    for name in ("config.json", METRICS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: has no {name}; is it the --workdir of a run?")
    try:
        saved = json.loads((folder / "config.json").read_text())
        config, data = saved["config"], saved["data"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: not written by train.py ({error})") from None
    curves: dict[str, Curve] = {}
    for line in read_metrics(folder / METRICS_FILE):
        for metric, value in line.items():
            if metric != "step" and value is not None:
                curves.setdefault(metric, {})[line["step"]] = value
    if not curves:
        raise ValueError(f"{folder / METRICS_FILE}: has no metrics yet")
    return Run(str(folder), config, data, curves, count_spikes(folder))


def report(runs: Sequence[Run]) -> list[str]:
    """The paragraphs that are printed."""
    letters = [chr(ord("A") + i) for i in range(len(runs))]
    names = "\n".join(f"{letter}  {run.name}" for letter, run in zip(letters, runs))
    paragraphs = [names]
    for letter, run in zip(letters[1:], runs[1:]):
        lines = diff_configs(runs[0].config, run.config) or ["none"]
        title = f"config differences, A -> {letter}"
        indented = [f"  {line}" for line in lines]
        paragraphs.append("\n".join([title, *indented, same_rows(runs[0], run)]))
    paragraphs.append(table(letters, [summary(run) for run in runs]))
    for letter, run in zip(letters[1:], runs[1:]):
        paragraphs.append(at_equal_steps(runs[0], run, letter))
    if len(runs) > 1 and not any_repeated(runs):
        paragraphs.append(
            "Each of them is a single run, so a difference of this size may be chance: train each "
            "config again with --config.training.seed=1, in a --workdir of its own."
        )
    return paragraphs


def any_repeated(runs: Sequence[Run]) -> bool:
    """Whether some of the runs differ by their seeds alone."""
    configs = []
    for run in runs:
        config = copy.deepcopy(run.config)
        for section, key in SEEDS:
            del config[section][key]
        configs.append(config)
    return any(config in configs[:i] for i, config in enumerate(configs))


def same_rows(first: Run, other: Run) -> str:
    """Whether two runs read the same rows at each step, and if not, what differs."""
    keys = (
        ("data", "shuffle_seed"), ("data", "block_rows"), ("training", "batch_size"),
        ("data", "seq_len"),
    )  # fmt: skip
    different = [
        f"{section}.{key}"
        for section, key in keys
        if first.config[section].get(key) != other.config[section].get(key)
    ]
    if first.data.get("order") != other.data.get("order"):
        different.insert(0, "the version of data/reading/order.py")
    if first.data["fingerprint"] != other.data["fingerprint"]:
        different.insert(0, "the data")
    return (
        f"rows: differ by {', '.join(different)}" if different else "rows: the same, in one order"
    )


def summary(run: Run) -> dict[str, str]:
    """What is printed of a run, by name."""
    losses = list(run.curve("loss").values())
    evals = run.curve("eval/loss")
    rates, mfus = run.curve("tokens_per_second"), run.curve("mfu")
    last_losses = losses[-max(1, math.ceil(SMOOTHING * len(losses))) :]
    last_step = max(max(curve) for curve in run.curves.values())
    training = run.config["training"]
    whole = f"{training['steps']:,}" if training["steps"] else f"{training['epochs']} epochs"
    return {
        "last step": f"{last_step:,} of {whole}",
        "train loss, smoothed": _number(statistics.mean(last_losses) if last_losses else None),
        "eval loss, last": _number(_last(evals)),
        "eval loss, best": _number(min(evals.values(), default=None)),
        "eval bits per byte, last": _number(_last(run.curve("eval/bits_per_byte"))),
        "tokens/s, median": _number(_median(rates), "{:,.0f}"),
        "MFU, median": _number(_median(mfus), "{:.1%}"),
        "loss spikes": str(run.spikes),
        "skipped steps": _number(_last(run.curve("skipped_steps")), "{:.0f}"),
    }


def table(letters: Sequence[str], columns: Sequence[dict[str, str]]) -> str:
    names = list(columns[0])
    width = max(len(name) for name in names)
    widths = [max(len(value) for value in column.values()) for column in columns]
    rows = [" " * width + "".join(f"   {name:>{w}}" for name, w in zip(letters, widths))]
    for name in names:
        cells = "".join(f"   {column[name]:>{w}}" for column, w in zip(columns, widths))
        rows.append(f"{name:<{width}}{cells}")
    return "\n".join(rows)


def at_equal_steps(first: Run, other: Run, letter: str, count: int = 8) -> str:
    """The difference in loss at some steps that both runs have."""
    lines = [f"loss of {letter} minus loss of A, at equal steps (below 0: {letter} is better)"]
    for metric in ("eval/loss", "loss"):
        a, b = first.curve(metric), other.curve(metric)
        steps = sorted(a.keys() & b.keys())
        chosen = {round(i * (len(steps) - 1) / (count - 1)) for i in range(count)} if steps else ()
        for step in (steps[i] for i in sorted(chosen)):
            lines.append(f"  {metric:<9}  step {step:>9,}  {b[step] - a[step]:+.4f}")
    return "\n".join(lines if len(lines) > 1 else [*lines, "  no step in common"])


def first_difference(first: Run, other: Run, tolerance: float) -> str:
    """The first step at which a loss of two runs differs by more than this share of the first's, in
    words; "" if there is none."""
    found: dict[int, str] = {}
    for metric in LOSSES:
        a, b = first.curve(metric), other.curve(metric)
        for step in sorted(a.keys() | b.keys()):
            if step not in a or step not in b:
                who = first.name if step in a else other.name
                found.setdefault(step, f"step {step:,}: only {who} has a finite {metric}")
                break
            if abs(b[step] - a[step]) > tolerance * abs(a[step]):
                found.setdefault(step, f"step {step:,}: {metric} {b[step]!r}, not {a[step]!r}")
                break
    return found[min(found)] if found else ""


def draw(runs: Sequence[Run], png: Path) -> None:
    """Draws loss and gradient norm over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for i, run in enumerate(runs):
        color = f"C{i}"
        axes[0].plot(*_points(run.curve("loss")), color=color, linewidth=0.8, label=run.name)
        axes[0].plot(*_points(run.curve("eval/loss")), color=color, marker="o", linestyle="--")
        axes[1].plot(*_points(run.curve("gradient_norm")), color=color, linewidth=0.8)
    axes[0].set(xlabel="step", ylabel="loss (nats); dashed: evaluation")
    axes[0].legend(fontsize="small")
    axes[1].set(xlabel="step", ylabel="gradient norm", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
    pyplot.close(figure)


def _points(curve: Curve) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())


def _last(curve: Curve) -> float | None:
    return list(curve.values())[-1] if curve else None


def _median(curve: Curve) -> float | None:
    return statistics.median(curve.values()) if curve else None


def _number(value: float | None, template: str = "{:.4f}") -> str:
    return "-" if value is None else template.format(value)


if __name__ == "__main__":
    sys.exit(main())
