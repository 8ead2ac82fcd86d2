"""The fused kernels compiled by the real TPU compiler, which needs no TPU, only libtpu.

Each compile is a process of its own, as libtpu reads its settings once.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import c4

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
    ),
]


def compile_step(*arguments):
    """What scripts/benchmark_attention.py says of one compiled program."""
    result = subprocess.run(
        [sys.executable, "-m", "scripts.benchmark_attention", "compile", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


SMALL, LARGE = c4.SIZES["301m"][-2:], c4.SIZES["7p7b"][-2:]  # heads and head size


@pytest.mark.parametrize(
    ("chip", "shape", "length"),
    [("v5e", SMALL, 1024), ("v5p", LARGE, 1024), ("v5e", SMALL, 8192), ("v5p", LARGE, 4096)],
)
def test_compiles_for_a_tpu(chip, shape, length):
    """Forward and backward kernel, and what runs where these do not do."""
    found = compile_step(chip, *shape, length, "laser")
    pair = {"laser_forward", "laser_backward"}
    assert set(found["bundles"]) == pair | {f"{name}_raw" for name in pair} | {"laser_forward_wide"}
    assert all(found["bundles"].values())


@pytest.mark.parametrize("chip", ["v5e", "v5p"])
@pytest.mark.parametrize(
    "arguments",
    [  # one tile each: tiles of a block are unrolled, and the time grows with their square
        (8, 128, 256, "laser", "--packed", "--soft_cap=50"),
        (8, 128, 256, "standard", "--packed", "--soft_cap=50"),
        (8, 128, 1100, "laser", "--packed", "--full"),  # two blocks
        (8, 128, 256, "laser", "--dtype=float32"),
        (8, 720, 256, "laser", "--dtype=float32"),
        (8, 64, 256, "laser", "--value_size=128"),
        (8, 128, 256, "laser", "--value_size=256"),
        (8, 256, 256, "laser", "--value_size=512"),
        (16, 360, 256, "laser", "--value_size=720"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_options_compile_for_a_tpu(chip, arguments):
    assert all(compile_step(chip, *arguments)["bundles"].values())
