"""The campaign's eye for a run that differs; the campaign itself takes an hour (see its docstring).

python -m tests.campaign.damage_runs --help
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from configs import base
from laser.training.checkpoint import Checkpoints
from laser.training.config import load_config
from tests.campaign import damage_runs
from tests.campaign.damage import Trial, Verdict
from tests.campaign.damage_runs import STEPS, Bench, must_end_well, same_as


def finished_run(folder, weight=1.0, loss=0.5):
    with Checkpoints(folder, load_config(base.get_config()).checkpoint) as checkpoints:
        checkpoints.save(STEPS, {"params": {"w": jnp.float32([weight, 2.0])}})
    lines = [{"step": step, "loss": loss} for step in range(1, STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_is_the_same_to_the_bit_or_is_seen_as_another(tmp_path):
    whole = finished_run(tmp_path / "whole")
    bench = Bench(tmp_path, [], {}, whole, Path(), 0.0)
    assert same_as(bench, finished_run(tmp_path / "same"))()
    last_bit = finished_run(tmp_path / "weight", weight=1.0000001)
    assert not same_as(bench, last_bit)()
    other_loss = finished_run(tmp_path / "loss", loss=0.5000001)
    assert not same_as(bench, other_loss)()
    assert same_as(bench, other_loss, losses=False)()


@pytest.mark.parametrize("verdict", list(Verdict))
def test_where_nothing_was_damaged_a_refusal_is_no_good_end(verdict):
    trial = must_end_well(Trial("a", "kill", verdict))
    expected = Verdict.UGLY if verdict == Verdict.REFUSED else verdict
    assert trial == dataclasses.replace(trial, verdict=expected)


def test_every_kind_of_trial_can_be_asked_for():
    assert set(damage_runs.KINDS) < set(damage_runs.TRIALS)
