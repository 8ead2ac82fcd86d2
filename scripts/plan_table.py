"""Renews docs/plans.json, the plans of the shipped configs, and the tables of docs/plans.md and
docs/compiler-notes.md.

    python scripts/plan_table.py [--only=SUBSTRING]

Needs libtpu (pip install libtpu). Rows that are in docs/plans.json are kept: to renew all, delete
it first. On one core a row takes the compiler a minute or two, 5 to 12 where layers are unrolled,
and up to half an hour where products are of float32 with the highest precision: hours in all. A run
that was stopped goes on where it was.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import llama
from configs.slices import LAYOUTS
from laser.planning import table

ATTENTIONS = ("laser", "standard", "laser+diff", "standard+diff")
MUON = [f"size=301m,attention=laser,slice={name},optimizer=muon" for name in ("v5e-64", "v5p-128")]
# The paper's other models have one layout each, that of their configs.
OTHERS = [
    "model=bert,size=2p2b,attention=laser,slice=v5e-256",
    "model=bert,size=2p2b,attention=laser,slice=v5p-512",
    "model=vit,size=s16,attention=laser,slice=v5e-16",
    "model=vit,size=s16,attention=laser,slice=v5p-32",
    "model=conformer,size=105m,attention=laser,slice=v5e-16",
    "model=conformer,size=105m,attention=laser,slice=v5p-32",
]


def names() -> list[str]:
    """Size, attention, slice and more of every row, as `table.arguments` reads them."""
    rows = [
        f"size={size},attention={attention},slice={name}"
        for attention in ATTENTIONS
        for size, name in LAYOUTS
        if size != llama.SIZE or "diff" not in attention
    ]
    return rows + MUON + OTHERS


def config(name: str) -> str:
    """What stands behind --config for a row."""
    which = table.arguments(name)
    if model := which.pop("model", ""):
        del which["slice"]
    elif which["size"] == llama.SIZE:
        model = which.pop("size")
    return f"configs/{model or 'c4'}.py:" + ",".join(f"{k}={v}" for k, v in which.items())


def make(name: str, *more: str) -> dict:
    """The plan of a row, with more flags, in a process of its own: libtpu gives no memory back."""
    command = [
        sys.executable, str(ROOT / "scripts/plan.py"), "--json",
        f"--config={config(name)}", f"--topology={table.arguments(name)['slice']}",
        *more,
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{name}: {result.stdout[-2000:]}{result.stderr[-2000:]}")
    plan = json.loads(result.stdout)
    print(f"{name}: {plan['peak_gib']:.2f} GiB, {plan['compile_seconds']:.0f} s", flush=True)
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name contains this")
    only = parser.parse_args().only
    table.renew(ROOT / "docs/plans.json", names(), make, only)


if __name__ == "__main__":
    main()
