"""Muon beside optax's own, on one device and on a mesh, and the schedule that holds its peak."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec

from configs import base
from laser.planning.collectives import collectives
from laser.planning.hlo import Module
from laser.training import roofline, sharding
from laser.training.config import MeshConfig, load_config
from laser.training.optimizer import learning_rate, make_optimizer
from models.config import ModelConfig
from models.families import init_parameters

MODEL = ModelConfig(
    vocab_size=24, num_layers=4, model_dim=16, mlp_dim=24, num_heads=4, head_dim=4, num_kv_heads=2,
    mlp="swiglu",
)  # fmt: skip
CONFIG = dataclasses.replace(load_config(base.get_config()).optimizer, name="muon")
STEPS = 3


def gradients(step):
    rng = np.random.default_rng(step)
    params = init_parameters(MODEL, 0)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)


def run(config, mesh=None):
    """The last update and the state after it."""
    optimizer = make_optimizer(config)
    params = init_parameters(MODEL, 0)
    update, state = optimizer.update, optimizer.init(params)
    if mesh is not None:
        params = jax.device_put(params, sharding.state_shardings(mesh, params))
        state = jax.device_put(state, sharding.state_shardings(mesh, state))
        update = sharding.on_mesh(mesh, update)
    update = jax.jit(update)
    for step in range(STEPS):
        updates, state = update(gradients(step), state, params)
    return updates, state


def flat(matrix, path):
    """A layer's parameter as the matrix that multiplies from the right."""
    if path == ("attention", "output"):
        return matrix.transpose(1, 2, 0).reshape(-1, matrix.shape[0])
    return matrix.reshape(matrix.shape[0], -1)


PATHS = [("attention", name) for name in ("query", "key", "value", "output")]
PATHS += [("mlp", name) for name in ("gate", "up", "down")]


def of_path(tree, path, layer):
    return flat(tree["blocks"][path[0]][path[1]][layer], path)


@functools.cache
def on_one_device():
    return run(dataclasses.replace(CONFIG, clip_grad_norm=0.0))


@pytest.mark.slow
def test_matrices_of_layers_get_the_update_of_optax():
    theirs = optax.contrib.muon(
        1.0, beta=CONFIG.muon_momentum, weight_decay=CONFIG.weight_decay, consistent_rms=0.2
    )
    ours, _ = on_one_device()
    params, update = init_parameters(MODEL, 0), jax.jit(theirs.update)
    for layer in (0, 3):
        own = {path: of_path(params, path, layer) for path in PATHS}
        state = theirs.init(own)
        for step in range(STEPS):
            given = {path: of_path(gradients(step), path, layer) for path in PATHS}
            expected, state = update(given, state, own)
        for path in PATHS:
            actual = of_path(ours, path, layer)
            np.testing.assert_allclose(actual, -expected[path], atol=2e-6, err_msg=str(path))
            assert 0.1 < np.sqrt(np.square(actual).mean()) < 0.3


def test_all_else_gets_the_update_of_adamw():
    ours, _ = on_one_device()
    adamw, _ = run(dataclasses.replace(CONFIG, name="adamw", clip_grad_norm=0.0))
    for name in ("embedding", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, ours[name], adamw[name])
    for name in ("attention_norm", "mlp_norm"):
        jax.tree.map(np.testing.assert_array_equal, ours["blocks"][name], adamw["blocks"][name])
    assert not np.allclose(ours["blocks"]["mlp"]["up"], adamw["blocks"]["mlp"]["up"], atol=0.1)


@pytest.mark.slow
def test_a_mesh_changes_the_update_by_rounding_alone():
    """Layers over fsdp and tensor; what differs is the order of sums within a product."""
    config = dataclasses.replace(CONFIG, clip_grad_norm=0.0)
    mesh = jax.make_mesh((2, 2, 2), sharding.AXES, (jax.sharding.AxisType.Auto,) * 3)
    updates, state = run(config, mesh)
    expected, expected_state = on_one_device()
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, updates, expected)
    jax.tree.map(close, state, expected_state)
    up = state[0].inner_state[0].mean["blocks"]["mlp"]["up"]
    assert up.sharding.spec == sharding.parameter_spec(mesh, "blocks/mlp/up", up.shape)
    assert up.sharding.spec != PartitionSpec()


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 1, "fsdp": 4, "tensor": 1},
        {"data": 1, "fsdp": 4, "fsdp_1": 2, "tensor": 1},  # of which the layers divide one
        {"data": 1, "fsdp": 2, "tensor": 2},
    ],
)
@pytest.mark.slow
def test_matrices_come_together_once_and_go_back_once(axes):
    """In the compiled update: no whole array on a device, no gather within the products."""
    config = dataclasses.replace(CONFIG, clip_grad_norm=0.0, clip_update_rms=0.0, eps=1e-8)
    devices = jax.devices()[: math.prod(axes.values())]
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), (jax.sharding.AxisType.Auto,) * len(axes),
        devices=devices,
    )  # fmt: skip
    optimizer, params = make_optimizer(config), init_parameters(MODEL, 0)
    state = optimizer.init(params)
    given = [sharding.state_shardings(mesh, x) for x in (params, state, params)]
    compiled = jax.jit(
        sharding.on_mesh(mesh, optimizer.update), in_shardings=given, out_shardings=tuple(given[:2])
    ).lower(params, state, params)
    moved = collectives(Module(compiled.compile().as_text()), axes)
    assert {"all-to-all"} <= {one.kind for one in moved} <= {"all-to-all", "all-gather"}, moved
    split = [size for name, size in axes.items() if name != "data" and size > 1]
    assert len(moved) <= 2 * len(PATHS) * len(split), moved
    matrices = sum(x.nbytes for x in jax.tree.leaves(params["blocks"]) if x.ndim > 2)
    whole_layers = matrices / 4  # what a device ends up with
    assert sum(one.bytes for one in moved) <= 2 * len(split) * whole_layers


def test_momentum_is_part_of_the_plan():
    config = load_config(base.get_config())
    muon = dataclasses.replace(config, optimizer=CONFIG)
    mesh = MeshConfig(data=1, fsdp=8, tensor=1)
    parameters, optimizer = roofline.state_items(muon)
    assert roofline.state_items(config) == (parameters, 2 * parameters)
    embedding = config.model.vocab_size * config.model.model_dim
    assert optimizer == parameters + embedding
    assert roofline.muon_flops(config, mesh) == 0
    # 16 layers over 8 chips: 4 matrices of 1024 x 1024, 2 of 1024 x 4096.
    n = 1024
    assert roofline.muon_flops(muon, mesh) == 2 * 5 * (4 * 6 * n**3 + 2 * 18 * n**3)
    moved = roofline.collective_bytes(muon, mesh)["fsdp"]
    assert moved - roofline.collective_bytes(config, mesh)["fsdp"] == 4 * 4 * 12 * n * n


def test_the_rate_is_held_and_then_goes_to_zero():
    config = dataclasses.replace(
        CONFIG, learning_rate=0.5, schedule="wsd", warmup_steps=10, decay_steps=20
    )
    rates = np.array([learning_rate(config, 100)(step) for step in range(101)])
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(rates[9:81], 0.5)
    np.testing.assert_allclose(rates[80:], 0.5 * np.arange(20, -1, -1) / 20, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "moun"}, "optimizer.name='moun': must be one of adamw, nadamw, lamb, muon"),
        ({"muon_momentum": 1.0}, "optimizer.muon_momentum=1.0: must be at least 0 and below 1"),
        ({"schedule": "wsd"}, "optimizer.decay_steps=0 with optimizer.schedule=wsd: wsd needs"),
        ({"decay_steps": 5}, "optimizer.decay_steps=5 with optimizer.schedule=cosine: wsd"),
        (
            {"schedule": "wsd", "decay_steps": 159_500},
            "optimizer.decay_steps=159500: with optimizer.warmup_steps=1000 more than training",
        ),
    ],
)
def test_mistakes_are_one_line(changes, message):
    config = base.get_config()
    config.optimizer.update(changes)
    with pytest.raises(ValueError) as error:
        load_config(config)
    assert str(error.value).startswith(message)
