"""Speed of a full training step on this machine, beside the matrix products that it is made of.

    python scripts/benchmark_train.py [--peers] [--steps=N] [--json=PATH]

Times the step that train.py runs, for standard and LASER attention; the step's matrix products alone,
a bound for any implementation; with --peers (requirements-peers.txt) GPT-2 of the same shape from
transformers on PyTorch, eager and compiled. All take turns in one process in random order, since
machines drift. What `laser.training.hardware.tune_cpu` sets (freed memory is kept, XLA's products by
YNN) holds for a whole process, so there are two: without it, and with it, as train.py runs.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import base
from laser.training import hardware
from laser.training.config import RunConfig, load_config

THREADS = 2
PRODUCTS, EAGER = "matrix products alone", "PyTorch eager"
OURS = {"standard": "ours, standard", "laser": "ours, LASER"}
PEAK_SIZES = (512, 1024, 2048)  # of the square products that the machine's peak is looked for with
SETTINGS = {
    "plain": "as installed",
    "tuned": "freed memory kept, XLA's YNN flag (as train.py sets them)",
}

Case = Callable[[], Any]  # runs once, and returns when it is done


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a batch. Head size is dim / heads, and the MLP four times as wide as the model."""

    layers: int = 4
    dim: int = 256
    heads: int = 4
    vocabulary: int = 32000
    length: int = 256
    batch: int = 8


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of every round by case, the machine's best float32 FLOP/s, and a step's FLOPs."""

    seconds: dict[str, list[float]]
    peak: float
    flops: float
    tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", action="store_true", help="time PyTorch's GPT-2 too")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each (default: 15)")
    parser.add_argument("--json", metavar="PATH", help="write all times there")
    parser.add_argument("--child", metavar="PATH", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        result = measure(Shape(), arguments.steps, arguments.peers)
        Path(arguments.child).write_text(json.dumps(dataclasses.asdict(result)))
        return 0
    results = {name: run_child(name, arguments) for name in SETTINGS}
    peak = max(result.peak for result in results.values())
    print(f"{os.cpu_count()} cores, {THREADS} threads, float32, peak {peak / 1e9:.0f} GFLOP/s")
    print(Shape())
    for name, result in results.items():
        print(f"\n{SETTINGS[name]}\n{table(result, peak)}")
    if arguments.json:
        tree = {name: dataclasses.asdict(result) for name, result in results.items()}
        Path(arguments.json).write_text(json.dumps(tree))
    return 0
