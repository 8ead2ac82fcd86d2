"""What is opened for a run: its checkpoints with the configs that they were saved with, on the
devices that are here, and the tasks that its hosts have read."""

import json
import shutil
import types

import jax
import numpy as np
import pytest

from data.sealed import SEAL, seal
from eval.opening import check_tasks_agree
from eval.run import devices_a_copy, fingerprint, mesh_of, open_model
from laser.training import hosts
from laser.training.config import load_config
from laser.training.hardware import CHIPS, Chip
from laser.training.run_folder import load_record


def change_config(run, **attention):
    """As --allow_config_change does it: the old record stays as config.0.json."""
    path = run / "config.json"
    record = json.loads(path.read_text())
    path.rename(run / "config.0.json")
    record["config"]["attention"] |= attention
    del record[SEAL]
    path.write_text(json.dumps(seal(record)))


def test_a_checkpoint_from_before_a_change_keeps_its_config(trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    before, kept = fingerprint(run, 4), load_record(str(run), 4)
    change_config(run, temperature=0.25)
    assert load_record(str(run))["config"]["attention"]["temperature"] == 0.25
    assert load_record(str(run), 4) == kept
    assert fingerprint(run, 4) == before
    for step in (None, 2):
        assert open_model(run, step).config.model.attention.temperature == 1.0


def test_a_checkpoint_of_another_tokenizer_is_refused(trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    change_config(run)
    path = run / "config.0.json"
    record = json.loads(path.read_text()) | {"tokenizer": "0" * 64}
    del record[SEAL]
    sealed = seal(record)
    path.write_text(json.dumps(sealed))
    sidecar = run / "checkpoints/4/record/metadata"
    said = json.loads(sidecar.read_text())
    del said[SEAL]
    sidecar.write_text(json.dumps(seal(said | {"config": sealed[SEAL]})))
    with pytest.raises(ValueError) as error:
        open_model(run, 4)
    assert "checkpoint 4 was saved with another tokenizer than tokenizer.model" in str(error.value)


@pytest.mark.parametrize(
    ("gib", "memory", "count"),
    [
        (1.2, 15.75, 1),  # the 301m on v5e-8
        (8.3, 15.75, 2),  # the 2.2B
        (28.8, 15.75, 8),  # the 7.7B
        (28.8, 95.74, 1),
        (500, 15.75, 8),  # who knows
        (500, 0, 1),  # a CPU
    ],
)
def test_a_copy_lies_on_as_few_devices_as_hold_it(gib, memory, count):
    assert devices_a_copy(gib, memory, 8) == count


def test_a_model_that_one_device_cannot_hold_is_split(trained_run, monkeypatch):
    copies = jax.tree.map(np.asarray, open_model(trained_run).params)
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(CHIPS, kind, Chip("small", 1e12, hbm_gib=2**-14))
    model = open_model(trained_run)
    on_each = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(model.params):
        for shard in leaf.addressable_shards:
            on_each[shard.device] += shard.data.nbytes
    whole = sum(x.nbytes for x in jax.tree.leaves(model.params))
    assert max(on_each.values()) < 1.3 * whole / len(on_each)
    jax.tree.map(np.testing.assert_array_equal, model.params, copies)


def test_a_model_planned_for_a_pod_lies_on_the_devices_here():
    from configs import c4

    config = load_config(c4.get_config("size=2p2b,attention=laser,slice=v5e-256"))
    assert mesh_of(config).size == 8


def test_programs_of_one_host_refuse_a_slice_of_several(trained_run, monkeypatch):
    for name, value in zip(hosts.VARIABLES, ("localhost:1", "2", "0")):
        monkeypatch.setenv(name, value)
    open_model(trained_run)  # JAX_PLATFORMS=cpu, which waits for nobody
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ValueError) as error:
        open_model(trained_run)
    assert "this runs on one host, and here are several" in str(error.value)


def test_hosts_with_other_data_of_a_task_are_named(monkeypatch):
    def told(*of_others):
        values = [json.dumps(other) for other in of_others]
        monkeypatch.setattr(hosts, "exchange", lambda what, own: [own, *values])

    tasks = [
        types.SimpleNamespace(task=types.SimpleNamespace(name=name), fingerprint=f"of {name}")
        for name in ("copa", "cb")
    ]
    same = {"copa": "of copa", "cb": "of cb"}
    told(same, same)
    check_tasks_agree(tasks)
    told(same, {**same, "cb": "other"})
    with pytest.raises(ValueError) as error:
        check_tasks_agree(tasks)
    assert "has other data of cb than host 0" in str(error.value)
