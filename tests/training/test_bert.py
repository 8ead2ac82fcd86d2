"""Masked tokens in training: what the loss is of, meshes, hosts, and a run that is interrupted."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import bert
from laser.training import sharding
from laser.training.config import load_config
from laser.training.metrics import read_metrics
from laser.training.open_rows import open_rows
from laser.training.program import Program
from laser.training.step import make_gradient
from tests.training import runs

FIELDS = {
    "model.vocab_size": 400, "model.model_dim": 32, "model.mlp_dim": 64, "model.num_heads": 2,
    "model.head_dim": 16, "data.seq_len": 32, "data.block_rows": 4, "training.steps": 12,
    "training.batch_size": 8, "training.log_every": 1, "training.eval_every": 12,
    "training.eval_batches": 2, "optimizer.warmup_steps": 3, "checkpoint.every": 12,
}  # fmt: skip


def make_config(store, mesh=(1, 1, 1), attention="laser"):
    config = bert.get_config(f"size=tiny,attention={attention}")
    config.update_from_flattened_dict(FIELDS | {"data.store": str(store), "model.unroll": False})
    config.mesh.update(data=mesh[0], fsdp=mesh[1], tensor=mesh[2])
    return load_config(config)


@functools.cache
def trained(store, mesh, steps=3):
    """Losses, error rates and gradient norms of the first steps."""
    config = make_config(store, mesh)
    program = Program(config, sharding.make_mesh(config, jax.devices()[: np.prod(mesh)]))
    state, history = program.init_state(), []
    with open_rows(config).train_batches(config, 0, program.batch_sharding) as batches:
        for _ in range(steps):
            state, metrics = program.train_step(state, next(batches)[1])
            history.append([float(metrics[x]) for x in ("loss", "error", "gradient_norm")])
    return np.array(history)


@pytest.mark.slow
def test_devices_equal_one(store):
    np.testing.assert_allclose(trained(store, (2, 2, 2)), trained(store, (1, 1, 1)), rtol=5e-5)


@pytest.fixture(scope="module")
def evaluated(store):
    """An eval step, parameters, and a batch of the validation split with padding in it."""
    config = make_config(store)
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, eval_batches=0)
    )
    program = Program(config, sharding.single_device_mesh())
    params = program.init_state().params
    gradient = jax.jit(sharding.on_mesh(program.mesh, make_gradient(config)))
    (part,) = open_rows(config).validation_parts(config, program.batch_sharding)
    batch = {name: np.array(x) for name, x in list(part.batches)[-1].items()}
    assert (batch["segment_ids"] == 0).any()

    def step(batch):
        return jax.device_get(program.eval_step(params, batch))

    return step, lambda batch: jax.device_get(gradient(params, batch)[0]), batch


def test_the_loss_is_of_masked_tokens_alone(evaluated):
    """Other targets and other padding change no bit of it, nor of its gradients."""
    step, gradient, batch = evaluated

    def of_the_loss(sums):  # the attention range is of padding, too
        return sums._replace(attention_range=0)

    before = step(batch)
    changed = {name: x.copy() for name, x in batch.items()}
    elsewhere, padding = batch["weights"] == 0, batch["segment_ids"] == 0
    changed["targets"][elsewhere] = (changed["targets"][elsewhere] + 5) % 400
    changed["inputs"][padding] = (changed["inputs"][padding] + 5) % 400
    jax.tree.map(np.testing.assert_array_equal, of_the_loss(step(changed)), of_the_loss(before))
    jax.tree.map(np.testing.assert_array_equal, gradient(changed), gradient(batch))
    changed["targets"][~elsewhere] = (changed["targets"][~elsewhere] + 5) % 400
    assert step(changed).nll != before.nll
    assert before.tokens == batch["weights"].sum() > 0


def test_the_error_counts_masked_tokens_that_are_not_the_likeliest(evaluated):
    step, _, batch = evaluated
    total = batch["weights"].sum()
    right = {}
    for token in range(400):  # all targets one token: right where that is the likeliest
        targets = np.full_like(batch["targets"], token)
        right[token] = total - float(step(batch | {"targets": targets}).shares["error"])
    assert sum(right.values()) == total  # a position has one likeliest token
    assert 1 < sum(count > 0 for count in right.values()) < total

    one = np.zeros_like(batch["weights"])
    one.flat[np.flatnonzero(batch["weights"])[0]] = 1
    of_one = [
        step(batch | {"weights": one, "targets": np.full_like(batch["targets"], token)})
        for token in range(400)
    ]
    likeliest = int(np.argmin([float(sums.nll) for sums in of_one]))
    assert [token for token in range(400) if of_one[token].shares["error"] == 0] == [likeliest]


def test_a_run_without_segments_is_refused():
    config = bert.get_config("size=tiny")
    config.data.segment_ids = False
    with pytest.raises(ValueError, match="segment_ids"):
        load_config(config)


@pytest.fixture(scope="module")
def command(store):
    fields = FIELDS | {"data.store": store}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config=configs/bert.py:size=tiny", "--config.model.unroll=False", *overrides]


@pytest.mark.slow
def test_an_interrupted_run_is_bit_equal(command, tmp_path):
    """Every row has the masks that it had."""
    command = [*command, "--config.checkpoint.every=10"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runs.train(command, whole).returncode == 0
    assert runs.train(command, parts, event=runs.SIGTERM_AFTER_7).returncode == 75
    resumed = runs.train(command, parts)
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 7" in resumed.stdout
    assert runs.losses(parts) == runs.losses(whole)
    assert sorted(runs.losses(whole)) == list(range(1, 13))
    scores = [[x["eval/error"] for x in read_metrics(folder / "metrics.jsonl") if "eval/error" in x]
              for folder in (whole, parts)]  # fmt: skip
    assert scores[0] == scores[1] != []
    runs.assert_same_parameters(parts, whole)


@pytest.mark.slow
def test_two_hosts_equal_one(command, tmp_path):
    command = [*command, "--config.mesh.fsdp=4", "--config.mesh.data=1"]
    for hosts in (1, 2):
        finished = runs.train_on_hosts(
            command, tmp_path / f"{hosts}", hosts=hosts, devices=4 // hosts
        )
        assert [x.returncode for x in finished] == [0] * hosts, finished[0].stderr
    # Sums between processes may be in another order.
    one, two = (list(runs.losses(tmp_path / f"{hosts}").values()) for hosts in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-5)
