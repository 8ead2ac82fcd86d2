"""The training step: accumulation, meshes, bad steps; on a small model in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import base
from laser.training import sharding
from laser.training.config import load_config
from laser.training.program import Program
from laser.training.step import init_state, make_eval_step, make_train_step
from models.families import structure

BATCH, LENGTH, VOCAB = 16, 24, 64


def make_config(attention="laser", diff="none", mesh=(-1, 1, 1), **overrides):
    config = base.get_config()
    config.model.update(
        vocab_size=VOCAB, num_layers=2, model_dim=32, mlp_dim=64, num_heads=4, head_dim=8
    )
    config.attention.update(kind=attention, diff=diff)
    config.data.seq_len = LENGTH
    config.training.update(batch_size=BATCH, steps=20)
    config.optimizer.update(warmup_steps=2, learning_rate=1e-2)
    config.mesh.update(data=mesh[0], fsdp=mesh[1], tensor=mesh[2])
    config.update_from_flattened_dict(overrides)
    return load_config(config)


def make_batch(step, packed=False):
    """Rows of quite different numbers of target tokens."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    lengths = np.linspace(1, LENGTH, BATCH).astype(int)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.float32(np.arange(LENGTH) < lengths[:, None]),
    }
    if packed:
        batch["segment_ids"] = np.int32(
            1 + (np.arange(LENGTH) > rng.integers(0, LENGTH, (BATCH, 1)))
        )
    return batch


def run(config, steps=3, packed=False, devices=None):
    """Losses, gradient norms and the last state, on the config's mesh."""
    program = Program(config, sharding.make_mesh(config, devices))
    state = program.init_state()
    history = []
    for step in range(steps):
        batch = jax.device_put(make_batch(step, packed), program.batch_sharding)
        state, metrics = program.train_step(state, batch)
        history.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return np.array(history), state


@functools.cache
def begun(config):
    """Its train step, compiled once for all tests, and its first state."""
    return jax.jit(make_train_step(config)), init_state(config)


def test_evaluation_takes_micro_batches_too():
    """A run that fits because of them fits its evaluations: logits of 2 rows, never of 16."""
    sums, texts = [], []
    for accumulation in (1, 8):
        config = make_config(**{"training.accumulation": accumulation})
        step = jax.jit(make_eval_step(config))
        params = init_state(config).params
        texts.append(step.lower(params, make_batch(0)).as_text())
        sums.append(step(params, make_batch(0)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *sums)
    chunks = [f"tensor<{rows}x{LENGTH}x32x" for rows in (BATCH, BATCH // 8)]  # hidden states
    assert [[chunk in text for chunk in chunks] for text in texts] == [[True, False], [False, True]]


def test_the_embedding_s_gradient_is_reduced_before_the_blocks_backward_pass():
    """The gradient of the hidden states waits for a device's part of it (memory on TPUs)."""
    config = make_config(mesh=(1, 8, 1))
    program = Program(config, sharding.make_mesh(config))
    lowered = program.train_step.lower(program.abstract_state, program.abstract_batch())
    barriers = [x for x in lowered.as_text().splitlines() if "optimization_barrier" in x]
    part, hidden = f"tensor<{VOCAB // 8}x32xf32>", f"tensor<{BATCH // 8}x{LENGTH}x32xf32>"
    assert any(part in line and hidden in line for line in barriers)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_loss_and_gradient_are_means_over_target_tokens(accumulation):
    config = make_config(**{"training.accumulation": accumulation})
    (train_step, state), batch = begun(config), make_batch(0)

    def mean_loss(params):
        model = nnx.merge(structure(config.model), params)
        log_probs = jax.nn.log_softmax(model.logits(model(batch["inputs"])[0]))
        nll = -jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
        return jnp.sum(nll * batch["weights"]) / batch["weights"].sum()

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    after, metrics = train_step(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)
    squares = sum(float(np.square(x).sum()) for x in jax.tree.leaves(after.params))
    np.testing.assert_allclose(metrics["parameter_norm"], squares**0.5, rtol=1e-5)


def assert_same_run(actual, expected):
    np.testing.assert_allclose(actual[0], expected[0], rtol=2e-5)
    # Adam divides by the root of the second moment: a parameter moves by up to a learning rate.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-4),
        jax.device_get(actual[1].params),
        jax.device_get(expected[1].params),
    )


@pytest.mark.slow
def test_four_micro_batches_equal_one_batch():
    one = [jax.devices()[0]]
    whole = run(make_config(), packed=True, devices=one)
    split = run(make_config(**{"training.accumulation": 4}), packed=True, devices=one)
    assert_same_run(split, whole)
    assert whole[0][0, 0] == pytest.approx(np.log(VOCAB), rel=0.25)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_loss_falls_on_a_repeated_batch(optimizer):
    config = make_config(**{"optimizer.name": optimizer})
    train_step, state = begun(config)
    losses = []
    for _ in range(15):
        state, metrics = train_step(state, make_batch(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.step) == 15


def test_a_bad_step_changes_nothing_but_the_counts():
    train_step, initial = begun(make_config())
    good, _ = train_step(initial, make_batch(0))
    bad_batch = make_batch(1)
    bad_batch["weights"][0, 0] = np.inf
    bad, metrics = train_step(good, bad_batch)
    assert not np.isfinite(metrics["gradient_norm"])
    assert (int(bad.step), int(bad.skipped), int(bad.skipped_in_a_row)) == (2, 1, 1)
    for old, new in zip(jax.tree.leaves(good[1:3]), jax.tree.leaves(bad[1:3]), strict=True):
        np.testing.assert_array_equal(old, new)
    after, metrics = train_step(bad, make_batch(2))
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 0)
    assert metrics["skipped_steps"] == 1
    assert not np.array_equal(after.params["embedding"], bad.params["embedding"])


def test_z_loss_trains_but_is_not_reported_as_loss():
    configs, batch = (make_config(), make_config(**{"training.z_loss": 0.1})), make_batch(0)
    first, second = (step(state, batch)[1] for step, state in map(begun, configs))
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-6)
    assert abs(float(first["gradient_norm"] - second["gradient_norm"])) > 1e-3


def test_evaluation_is_the_training_loss_without_an_update():
    config, batch = make_config(), make_batch(0)
    train_step, state = begun(config)
    sums = jax.jit(make_eval_step(config))(state.params, batch)
    _, metrics = train_step(state, batch)
    np.testing.assert_allclose(sums.nll / sums.tokens, metrics["loss"], rtol=1e-6)
    assert float(sums.tokens) == batch["weights"].sum()


def test_attention_range_is_reported():
    batch = make_batch(0)
    laser, standard = map(begun, (make_config(), make_config("standard")))
    _, metrics = laser[0](laser[1], batch)
    assert 0 < metrics["attention_range"] < 30
    _, metrics = standard[0](standard[1], batch)
    assert metrics["attention_range"] == jnp.float32(0)
