"""Spikes of the loss are found and recorded; gradients far outside of the last ones are skipped."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from laser.training import incidents
from laser.training.config import load_config
from laser.training.spikes import LEAST, WINDOW, Spikes
from laser.training.step import NORMS, _judged
from scripts import compare_runs


def losses(steps, seed=0):
    rng = np.random.default_rng(seed)
    return 3 + 3 * np.exp(-np.arange(steps) / 200) + 0.05 * rng.normal(size=steps)


def found(values, spikes=None):
    spikes = spikes or Spikes()
    return {step: h for step, x in enumerate(values) if (h := spikes.height(float(x))) is not None}


def test_losses_without_any_deviation_are_no_mistake():
    assert found([0.0] * 300) == {}
    assert list(found([0.0] * 300 + [1e-3])) == [300]


def test_a_spike_is_seven_deviations_above_the_last_thousand():
    values = losses(3000)
    assert found(values) == {}
    values[[50, 1500, 1501, 2900]] += [5.0, 1.0, 1.0, -2.0]
    spikes = found(values)
    assert set(spikes) == {1500, 1501}  # 50 is before LEAST; 2900 goes down
    last = values[1500 - WINDOW : 1500]
    np.testing.assert_allclose(spikes[1500], (values[1500] - last.mean()) / last.std())
    assert LEAST > 50


def test_what_is_not_finite_is_no_spike_and_spoils_nothing():
    values = losses(2000)[1000:]
    values[[400, 401]] = np.nan, np.inf
    values[500] += 3.0
    assert set(found(values)) == {500}


def test_one_that_goes_on_finds_the_same():
    values = losses(2500)
    values[[1200, 2000]] += 2.0
    whole = found(values)
    first = Spikes()
    found(values[:1700], first)
    kept = json.loads(json.dumps(list(first.recent)))
    rest = found(values[1700:], Spikes(kept))
    assert {step + 1700: height for step, height in rest.items()} == {2000: whole[2000]}


def test_a_run_records_steps_heights_and_rows(tmp_path, caplog):
    rows = types.SimpleNamespace(row_ids=lambda config, step: np.array([step, 7]))
    records = types.SimpleNamespace(folder=tmp_path)
    run = types.SimpleNamespace(spikes=Spikes(), rows=rows, config=None, records=records)
    values = losses(1300)[1000:]
    values[250] += 4.0
    for step, loss in enumerate(values, start=1):
        incidents.record_spike(run, step, {"loss": float(loss)})
    (record,) = map(json.loads, (tmp_path / "spikes.jsonl").open())
    assert (record["step"], record["row_ids"]) == (251, [250, 7])
    assert record["loss"] == values[250]
    assert record["deviations"] > 7
    assert "step 251: loss" in caplog.text

    sections = {"training": {"seed": 0, "steps": 300}, "data": {"shuffle_seed": 0}}
    (tmp_path / "config.json").write_text(json.dumps({"config": sections, "data": {}}))
    lines = [{"step": i, "loss": float(x)} for i, x in enumerate(values, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = compare_runs.summary(compare_runs.read_run(tmp_path))
    assert summary["loss spikes"] == "1"


def judged(norms, limit):
    """Which of the steps count."""
    recent = jnp.full(NORMS, jnp.inf)
    judge = jax.jit(lambda norm, recent: _judged(jnp.isfinite(norm), norm, recent, limit))
    counted = []
    for norm in norms:
        good, recent = judge(jnp.float32(norm), recent)
        counted.append(bool(good))
    return np.array(counted)


def test_gradients_far_outside_of_the_last_ones_are_skipped():
    norms = np.random.default_rng(0).lognormal(sigma=0.2, size=400)
    norms[[10, 100, 200, 300]] = 1e3, 12.0, np.nan, 8.0
    counted = judged(norms, limit=10.0)
    assert set(np.flatnonzero(~counted)) == {100, 200}  # at 10 nothing is known yet
    assert set(np.flatnonzero(~judged(norms, limit=0.0))) == {200}


def test_gradients_that_stay_large_become_the_usual_ones():
    counted = judged(np.repeat([1.0, 50.0], 200), limit=10.0)
    skipped = np.flatnonzero(~counted)
    assert skipped[0] == 200
    assert len(skipped) == NORMS // 2
    assert (np.diff(skipped) == 1).all()


@pytest.mark.parametrize("value", [1.0, 0.5, -3.0])
def test_a_limit_within_the_usual_is_one_line(value):
    config = base.get_config()
    config.training.skip_gradient_norm = value
    with pytest.raises(ValueError, match=rf"^training.skip_gradient_norm={value}: must be 0 \(off"):
        load_config(config)
