"""Tables in Markdown from the numbers of a study: always the same text from the same numbers."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from configs.study import Comparison
from study.plan import has, pair_keys
from study.results import LOSS, all_parameters, final
from study.statistics import (
    Estimate,
    PowerLaw,
    deviation,
    fit_power_law,
    mean_interval,
    step_at,
)

RATE = "optimizer.learning_rate"
SEEDS = ("seed", "shuffle_seed")
Record = Mapping[str, Any]
# What a difference of losses says, one side minus the other.
LOWER, HIGHER = "{one} ends lower", "{one} ends higher"
UNTOLD, SINGLE = "no difference that these runs can tell", "a single pair tells nothing"


def all_tables(record: Record) -> str:
    """Every table that the runs give, with a heading each."""
    sections = {
        f"Differences of the final {said(record)}": differences(record),
        "Best learning rates": best_rates(record),
        "Runs by stage": overview(record),
        "All groups": groups(record),
        "Bits per byte by domain": domains(record),
        "One-shot accuracy, in percent": one_shot(record),
        "Differences of one-shot accuracy, in points": one_shot_differences(record),
        "Loss and size (n: parameters, those of the embedding with them)": power_laws(record),
        "Failed runs": failures(record),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in sections.items() if text)


def overview(record: Record) -> str:
    rows = []
    for stage in record["stages"]:
        runs = [run for run in record["runs"] if run["stage"] == stage["name"]]
        done = _done(runs)
        hours = sum(run["seconds_per_step"] * run["steps"] for run in done) / 3600
        rows.append([stage["name"], stage["why"], f"{len(done)} of {stage['runs']}",
                     str(len(runs) - len(done)), f"{hours:.2f}"])  # fmt: skip
    return table(["stage", "what", "done", "failed", "hours of training"], rows)


def groups(record: Record) -> str:
    """Mean and deviation over the seeds of each group of runs that differ in nothing else."""
    rows = []
    measure = record["measure"]
    for stage in record["stages"]:
        for name, runs in grouped(record, stage["name"]).items():
            rows.append([
                stage["name"], name, str(len(runs)),
                spread([run["eval_loss"] for run in runs], 4),
                *([spread(finals(record, runs), 4)] if measure != LOSS else []),
                spread([run["bits_per_byte"] for run in runs], 4),
                spread([run["continuations"] for run in runs if "continuations" in run], 3),
                str(sum(run["spikes"] for run in runs)),
                f"{statistics.median(run['seconds_per_step'] for run in runs):.3f}",
            ])  # fmt: skip
    own = [measure] if measure != LOSS else []
    heads = ["stage", "runs of", "n", "loss, nats", *own, "bits per byte", "continuations",
             "spikes", "s a step"]  # fmt: skip
    return table(heads, rows) if rows else ""


def differences(record: Record) -> str:
    rows = []
    for comparison in record["compare"]:
        found = pairs(record, comparison)
        if not found:
            continue
        one, other = label(comparison["one"]), label(comparison["other"])
        ones, others = (finals(record, side) for side in zip(*found))
        delta = mean_interval([a - b for a, b in zip(ones, others)])
        base = statistics.fmean(others)
        reached = [step_at(a["curve"], b) for (a, _), b in zip(found, others)]
        lost = len(ended_pairs(record, comparison)) - len(found)
        count = f"{len(found)}, {lost} more failed" if lost else str(len(found))
        rows.append([
            comparison["stage"], f"{one} − {other}", count,
            f"{delta.value:+.4f}", interval(delta, 4), f"{100 * delta.value / base:+.2f} %",
            *_shares(found, reached),
            verdict(delta, one),
        ])  # fmt: skip
    heads = ["stage", "difference", "pairs", unit(record), "95 %", "relative",
             "steps to the other's end", "seconds to it", "verdict"]  # fmt: skip
    return table(heads, rows) if rows else ""


def best_rates(record: Record) -> str:
    """Of each group of runs that differ in rate and seed alone, in each stage that lists rates, and
    whether the best lies at the edge. A rate counts with the mean over its runs."""
    rows = []
    for stage in record["stages"]:
        for group, ends_of in ends_by_rate(record, stage).items():
            means = {rate: statistics.fmean(ends) for rate, ends in ends_of.items()}
            best = min(means, key=lambda rate: means[rate])
            told = "; ".join(
                f"{rate:g}: {mean:.4f}" if math.isfinite(mean) else f"{rate:g}: failed"
                for rate, mean in means.items()
            )
            is_edge = best in (min(means), max(means))
            named = f"{best:g}" if math.isfinite(means[best]) else "–"
            rows.append([stage["name"], group, named, told, "yes" if is_edge else "no"])
    heads = ["stage", "runs of", "best", unit(record), "at the edge of those tried"]
    return table(heads, rows) if rows else ""


def ends_by_rate(record: Record, stage: Record) -> dict[str, dict[float, list[float]]]:
    """By group of runs that differ in rate and seed alone, and by rate, upwards: what the runs
    ended with, infinite if they failed. Groups of a single rate are left out."""
    if RATE not in stage["listed"]:
        return {}
    besides = [
        name for name in stage["listed"] if name != RATE and name.rpartition(".")[2] not in SEEDS
    ]
    groups: dict[str, dict[float, list[float]]] = {}
    for run in record["runs"]:
        if run["stage"] == stage["name"]:
            group = label({name: run["settings"][name] for name in besides})
            ends = groups.setdefault(group, {}).setdefault(run["settings"][RATE], [])
            ends.append(final(run, record["measure"]))
    several = {group: ends_of for group, ends_of in groups.items() if len(ends_of) > 1}
    return {group: dict(sorted(ends_of.items())) for group, ends_of in several.items()}


def domains(record: Record) -> str:
    names = sorted({name for run in record["runs"] for name in run.get("domains", ())})
    rows = []
    for stage in record["stages"]:
        for group, runs in grouped(record, stage["name"]).items():
            measured = [run["domains"] for run in runs if "domains" in run]
            if measured:
                values = [spread([d.get(name) for d in measured], 3) for name in names]
                rows.append([stage["name"], group, str(len(measured)), *values])
    return table(["stage", "runs of", "n", *names], rows) if rows else ""


def one_shot(record: Record) -> str:
    """Mean and deviation over the seeds of each task, and of their mean."""
    names = _one_shot_names(record["runs"])
    rows = []
    for stage in record["stages"]:
        for group, runs in grouped(record, stage["name"]).items():
            if measured := [_percents(run) for run in runs if "oneshot" in run]:
                values = [spread([scores.get(name) for scores in measured], 2) for name in names]
                rows.append([stage["name"], group, str(len(measured)), *values])
    return table(["stage", "runs of", "n", *names], rows) if rows else ""


def one_shot_differences(record: Record) -> str:
    """Of each comparison and task, over the pairs of runs of which both sides have it."""
    rows = []
    for comparison in record["compare"]:
        one = label(comparison["one"])
        found = pairs(record, comparison)
        scores = [(_percents(a), _percents(b)) for a, b in found]
        for name in _one_shot_names(run for pair in found for run in pair):
            deltas = [a[name] - b[name] for a, b in scores if name in a and name in b]
            if deltas:
                delta = mean_interval(deltas)
                rows.append([
                    comparison["stage"], f"{one} − {label(comparison['other'])}", name,
                    str(len(deltas)), f"{delta.value:+.2f}", interval(delta, 2),
                    verdict(delta, one),
                ])  # fmt: skip
    heads = ["stage", "difference", "task", "pairs", "points", "95 %", "verdict"]
    return table(heads, rows) if rows else ""


def _one_shot_names(runs: Iterable[Record]) -> list[str]:
    """What `_percents` has of these runs: the mean, then the tasks."""
    names = {name for run in runs for name in _percents(run)}
    return sorted(names, key=lambda name: (name != "mean", name))


def _percents(run: Record) -> dict[str, float]:
    if "oneshot" not in run:
        return {}
    scores = run["oneshot"]
    return {name: 100 * x for name, x in {"mean": scores["mean"], **scores["tasks"]}.items()}


def power_laws(record: Record) -> str:
    """The laws, and by each the n at which it has the loss that standard attention ended with at
    its largest size (paper, figure 4)."""
    laws = fits(record)
    loss = _loss_of_largest(record) if "standard" in laws else None
    of_standard = laws["standard"].size_at(loss) if loss else None
    rows = []
    for attention, law in laws.items():
        n = law.size_at(loss) if loss else None
        rows.append([
            attention, str(law.b.count), f"{law.a.value:.3f}", interval(law.a, 3),
            f"{law.b.value:.4f}", interval(law.b, 4), f"{n:,.0f}" if n else "–",
            f"{100 * (n / of_standard - 1):+.2f} %" if n and of_standard else "–",
        ])  # fmt: skip
    heads = ["loss = a · n^b", "runs", "a", "95 %", "b", "95 %",
             f"n at a loss of {loss:.4f}" if loss else "n at the same loss",
             "more than standard's"]  # fmt: skip
    return table(heads, rows) if rows else ""


def _loss_of_largest(record: Record) -> float:
    """Mean loss of the runs of standard attention at its largest size."""
    losses: dict[int, list[float]] = {}
    for run in sized(record)["standard"]:
        losses.setdefault(all_parameters(run, record["config"]), []).append(run["eval_loss"])
    return statistics.fmean(losses[max(losses)])


def failures(record: Record) -> str:
    failed = [run for run in record["runs"] if run["status"] != "done"]
    rows = [[run["stage"], run["name"], run["reason"].replace("|", "/")] for run in failed]
    return table(["stage", "run", "reason"], rows) if rows else ""


def fits(record: Record) -> dict[str, PowerLaw]:
    """For each attention, where there are runs enough."""
    laws = {
        attention: fit_power_law(
            [all_parameters(r, record["config"]) for r in runs], [r["eval_loss"] for r in runs]
        )
        for attention, runs in sized(record).items()
    }
    return {attention: law for attention, law in laws.items() if law}


def sized(record: Record) -> dict[str, list[Record]]:
    """The finished runs that a power law is fitted to, by attention."""
    found: dict[str, list[Record]] = {}
    for run in _done(record["runs"]):
        if run["stage"] in record["sizes"]:
            found.setdefault(run["settings"]["attention"], []).append(run)
    return found


def pairs(record: Record, comparison: Record) -> list[tuple[Record, Record]]:
    """Those of `ended_pairs` of which no side has failed."""
    return [pair for pair in ended_pairs(record, comparison) if len(_done(pair)) == 2]


def ended_pairs(record: Record, comparison: Record) -> list[tuple[Record, Record]]:
    """Runs of both sides that agree in what else their stages list, seeds above all."""
    listed = {stage["name"]: stage["listed"] for stage in record["stages"]}
    names = comparison["stage"], comparison["other_stage"] or comparison["stage"]
    keys = pair_keys(Comparison(**comparison), [listed[name] for name in names])

    def runs(name: str, wanted: Record) -> dict[tuple, Record]:
        chosen = [
            run for run in record["runs"] if run["stage"] == name and has(run["settings"], wanted)
        ]
        return {tuple(run["settings"][key] for key in keys): run for run in chosen}

    ones, others = runs(names[0], comparison["one"]), runs(names[1], comparison["other"])
    return [(ones[key], others[key]) for key in ones if key in others]


def grouped(record: Record, stage: str) -> dict[str, list[Record]]:
    """The finished runs of a stage by what they vary besides the seed."""
    found: dict[str, list[Record]] = {}
    for run in _done(record["runs"]):
        if run["stage"] == stage:
            parts = run["name"].split(",")
            name = ", ".join(part for part in parts if part.partition("=")[0] not in SEEDS)
            found.setdefault(name or "all", []).append(run)
    return dict(sorted(found.items(), key=lambda item: _first_place(record, item[1])))


def finals(record: Record, runs: Iterable[Record]) -> list[float]:
    """What finished runs ended with, in the study's measure."""
    return [final(run, record["measure"]) for run in runs]


def said(record: Record) -> str:
    """The study's measure in words, where it has some."""
    return "validation loss" if record["measure"] == LOSS else record["measure"]


def unit(record: Record) -> str:
    return "nats" if record["measure"] == LOSS else record["measure"]


def label(settings: Record) -> str:
    """`12m laser`: the values that single out a side of a comparison."""
    return " ".join(str(value) for value in settings.values())


def verdict(delta: Estimate, one: str) -> str:
    """In words, from the interval alone."""
    if delta.count < 2:
        return SINGLE
    if delta.low <= 0 <= delta.high:
        return UNTOLD
    return (LOWER if delta.value < 0 else HIGHER).format(one=one)


def spread(values: Sequence[float | None], digits: int) -> str:
    """`3.1234 ± 0.0021`: mean and deviation; the mean alone of a single run."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return f"{mean} ± {deviation(known):.{digits}f}" if len(known) > 1 else mean


def interval(estimate: Estimate, digits: int) -> str:
    if math.isinf(estimate.low):
        return "–"
    return f"{estimate.low:+.{digits}f} to {estimate.high:+.{digits}f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shares(found: Sequence[tuple], reached: Sequence[float | None]) -> tuple[str, str]:
    """Of the other's steps, and of its seconds, at which a run is down at the other's end. Runs
    that were evaluated at their end alone tell nothing of it."""
    if any(len(a["curve"]) < 2 for a, _ in found):
        return "–", "–"
    steps = [
        math.inf if step is None else step / b["steps"] for (_, b), step in zip(found, reached)
    ]
    speeds = [a["seconds_per_step"] / b["seconds_per_step"] for a, b in found]
    return _median(steps), _median([x * speed for x, speed in zip(steps, speeds)])


def _median(shares: Sequence[float]) -> str:
    """In per cent. Pairs that never got there count: the mean of the others would show a gain of
    arms that are the same."""
    median = statistics.median(shares)
    told = f"{100 * median:.1f} %" if math.isfinite(median) else "not reached"
    never = sum(map(math.isinf, shares))
    return f"{told}, never in {never} of {len(shares)}" if never else told


def _done(runs: Iterable[Record]) -> list[Record]:
    return [run for run in runs if run["status"] == "done"]


def _first_place(record: Record, runs: Sequence[Record]) -> int:
    return min(record["runs"].index(run) for run in runs)
