"""The table of the plans of all shipped configs: docs/plans.json, and for people plans.md and, of
an older layout, compiler-notes.md."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Of a plan, what a row keeps.
FIELDS = (
    "topology", "mesh", "accumulation", "remat", "unroll", "attention", "fits", "capacity_gib",
    "peak_gib", "parameters_gib", "optimizer_gib", "kept_gib", "temporaries_gib",
    "recomputed_flops", "model_flops", "traffic_gib", "all_reduce_gib", "bound", "binding", "mfu",
    "hours", "chip_hours", "compile_seconds", "compile_gb", "schedule_seconds", "schedule_mfu",
)  # fmt: skip

COLUMNS = (
    "size", "attention", "slice", "mesh", "micro-batches", "remat",
    "GiB a chip: state, kept, peak", "recomputed", "GiB moved",
    "seconds at least: compute, HBM, links", "MFU at most", "hours at least",
)  # fmt: skip
SCHEDULED = ("hours as scheduled", "ms as scheduled", "MFU as scheduled")
# Rows that were made before schedules were read have the layouts of that time.
OLDER = """## Plans of an older layout

For whoever asks whether standard or differential attention, or Muon, fits, and what bounds it.
They were made before the compiler options, the layout of gathers and unrolled layers, and have no
schedule. `slice=` gives other layouts by now: compare their memory with each other's alone."""
NOTES = "compiler-notes.md"
START, END = "<!-- table -->", "<!-- end of table -->"


def row(plan: dict[str, Any]) -> dict[str, Any]:
    """What the table keeps of a plan."""
    traffic = plan["traffic"]
    sums = {
        "traffic_gib": sum(one["gib"] for one in traffic),
        "all_reduce_gib": sum(one["gib"] for one in traffic if one["kind"] == "all-reduce"),
        "schedule_seconds": plan["schedule"]["seconds"] if plan["schedule"] else None,
    }
    rounded = {key: value for key, value in {**plan, **sums}.items() if key in FIELDS}
    return json.loads(json.dumps(rounded), parse_float=lambda text: float(f"{float(text):.5g}"))


def renew(
    path: Path, names: Sequence[str], make: Callable[[str], dict[str, Any]], only: str = ""
) -> None:
    """Makes the rows that are not in the file yet, and puts the tables into the pages beside it.

    Args:
      path: docs/plans.json.
      names: of the rows, as `arguments` reads them.
      make: from such a name to a plan.
      only: leave out names that do not contain it.
    """
    rows = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        if name not in rows and only in name:
            rows[name] = row(make(name))
            rows = {known: rows[known] for known in names if known in rows}
            path.write_text(json.dumps(rows, indent=1) + "\n")
    for page, text in (
        (path.with_suffix(".md"), render(rows)),
        (path.with_name(NOTES), render_older(rows)),
    ):
        page.write_text(insert(page.read_text(), text))


def arguments(name: str) -> dict[str, str]:
    """Of a row's name, `[model=bert,]size=2p2b,attention=laser,slice=v5e-256[,optimizer=muon]`."""
    return dict(part.split("=", 1) for part in name.split(","))


def insert(document: str, table: str) -> str:
    """The document with another table between its two marks."""
    before, _, rest = document.partition(START)
    return f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}"


def render(rows: dict[str, dict[str, Any]]) -> str:
    """Rows with a schedule, as a table in Markdown."""
    current = {name: plan for name, plan in rows.items() if plan.get("schedule_seconds")}
    return _table(current, (*COLUMNS, *SCHEDULED))


def render_older(rows: dict[str, dict[str, Any]]) -> str:
    """The other rows, as a section in Markdown; "" of none."""
    older = {name: plan for name, plan in rows.items() if not plan.get("schedule_seconds")}
    return f"{OLDER}\n\n{_table(older, COLUMNS)}" if older else ""


def _table(rows: dict[str, dict[str, Any]], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, plan in rows.items():
        which = arguments(name)
        size = " ".join(which[key] for key in ("model", "size", "optimizer") if key in which)
        mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
        state = plan["parameters_gib"] + plan["optimizer_gib"]
        bound = plan["bound"]
        cells = [
            size, which["attention"], which["slice"], mesh, str(plan["accumulation"]),
            plan["remat"] + ", unrolled" * plan["unroll"],
            f"{state:.2f}, {plan['kept_gib']:.2f}, {plan['peak_gib']:.2f} "
            f"of {plan['capacity_gib']:.2f}",
            f"{100 * plan['recomputed_flops'] / plan['model_flops']:.1f} %",
            f"{plan['traffic_gib']:.1f}",
            f"{bound['compute']:.3f}, {bound['memory']:.3f}, {bound['interconnect']:.3f}",
            f"{100 * plan['mfu']:.1f} %",
            f"{plan['hours']:.1f}",
            *_scheduled(plan),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hours_as_scheduled(plan: dict[str, Any]) -> float:
    """Of all steps of a row: its hours are those at the bound."""
    return plan["hours"] * plan["schedule_seconds"] / plan["bound"][plan["binding"]]


def _scheduled(plan: dict[str, Any]) -> list[str]:
    if not plan.get("schedule_seconds"):
        return []
    return [
        f"{hours_as_scheduled(plan):.1f}",
        f"{1e3 * plan['schedule_seconds']:.0f}",
        f"{100 * plan['schedule_mfu']:.1f} %",
    ]
