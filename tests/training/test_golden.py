"""The first losses of the quickstart's model for each attention, as they were when last renewed.

    RENEW_GOLDEN=1 python -m pytest tests/training/test_golden.py

writes tests/golden/quickstart.json anew. Renew it in the commit that is meant to change the
numbers (initial values, the order of the data, the recipe, an attention function) and say so in its
message; where nothing of the kind was meant, a difference is a mistake to be found.

Layers, width, optimizer and schedule are those of configs/quickstart.py; the rows, fewer and
shorter, are of the tests' own small store. Other processors and versions of XLA round in another
way: losses are compared to 1e-4.
"""

import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import quickstart
from laser.training import sharding
from laser.training.config import load_config
from laser.training.program import Program
from laser.training.rows import StoreRows

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "quickstart.json"
ATTENTIONS = [
    "standard", "laser", "standard+diff", "laser+diff", "laser+per_dim_temp+qk_norm",
]  # fmt: skip
STEPS = 4
TOLERANCE = 1e-4


@functools.cache
def golden():
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def first_losses(attention, store):
    config = quickstart.get_config(f"attention={attention}")
    config.data.store, config.data.seq_len = str(store), 64
    config.model.vocab_size, config.training.batch_size = 400, 4
    config = load_config(config)
    # A scan over layers compiles faster than the four of them, and gives the same numbers.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, unroll=False))
    rows = StoreRows(config)
    program = Program(config, sharding.make_mesh(config, jax.devices()[:1]))
    state, losses = program.init_state(), []
    with rows.train_batches(config, 0, program.batch_sharding) as batches:
        for _ in range(STEPS):
            _, batch = next(batches)
            state, metrics = program.train_step(state, batch)
            losses.append(float(metrics["loss"]))
    return rows.fingerprint, losses


@pytest.mark.parametrize(
    "attention",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "laser")) for name in ATTENTIONS],
)
def test_the_first_losses_are_what_they_were(attention, store):
    fingerprint, losses = first_losses(attention, store)
    if os.environ.get("RENEW_GOLDEN"):
        golden()[attention] = {"rows": fingerprint, "losses": [round(x, 6) for x in losses]}
        known = {name: golden()[name] for name in ATTENTIONS if name in golden()}
        GOLDEN.write_text(json.dumps(known, indent=1) + "\n")
        return
    expected = golden()[attention]
    assert fingerprint == expected["rows"], "other rows: see this file's first lines"
    np.testing.assert_allclose(losses, expected["losses"], rtol=TOLERANCE)


def test_the_attentions_can_be_told_apart():
    """Else the numbers above would guard nothing."""
    curves = [np.array(golden()[name]["losses"]) for name in ATTENTIONS]
    for one, other in itertools.combinations(curves, 2):
        assert np.max(np.abs(one / other - 1)) > 3 * TOLERANCE
