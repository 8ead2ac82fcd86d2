"""The optimizers against their formulas in numpy; a stack of layers is as if not stacked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from laser.training.config import load_config
from laser.training.optimizer import learning_rate, make_optimizer, matrices

CONFIG = load_config(base.get_config()).optimizer


def make_tree(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "embedding": jnp.float32(scale * rng.normal(size=(5, 4))),
        "final_norm": {"scale": jnp.float32(scale * rng.normal(size=4))},
        "blocks": {
            "mlp": {"up": jnp.float32(scale * rng.normal(size=(3, 4, 6)))},
            "mlp_norm": {"scale": jnp.float32(scale * rng.normal(size=(3, 4)))},
        },
    }


def run(config, steps=3, gradient_scale=1.0):
    """Updates of each step, as a list of trees."""
    optimizer = make_optimizer(config)
    params = make_tree()
    state = optimizer.init(params)
    updates = []
    for step in range(steps):
        update, state = optimizer.update(make_tree(step + 1, gradient_scale), state, params)
        updates.append(update)
    return updates


def layer_of(tree, layer):
    return {k: jax.tree.map(lambda x: x[layer], v) if k == "blocks" else v for k, v in tree.items()}


def expected_update(config, layer, steps=3):
    """Update of the last step for the embedding, a norm's scale and the weights of one layer."""
    params = jax.tree.map(np.float64, layer_of(make_tree(), layer))
    m = jax.tree.map(np.zeros_like, params)
    v = jax.tree.map(np.zeros_like, params)
    for step in range(1, steps + 1):
        whole = jax.tree.map(np.float64, make_tree(step))
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(whole)))
        clip = min(1.0, config.clip_grad_norm / norm)
        grads = jax.tree.map(lambda g, clip=clip: g * clip, layer_of(whole, layer))
        m = jax.tree.map(lambda m, g: config.b1 * m + (1 - config.b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: config.b2 * v + (1 - config.b2) * g * g, v, grads)

    def update(m, v, p, g):
        first = m / (1 - config.b1**steps)
        if config.name == "nadamw":
            ahead, now = m / (1 - config.b1 ** (steps + 1)), g / (1 - config.b1**steps)
            first = config.b1 * ahead + (1 - config.b1) * now
        u = first / (np.sqrt(v / (1 - config.b2**steps)) + config.eps)
        if config.clip_update_rms:
            u = u / max(1.0, np.sqrt((u**2).mean()) / config.clip_update_rms)
        if p.ndim >= 2 or config.name == "nadamw":
            u = u + config.weight_decay * p
        if config.name == "lamb":
            u = u * np.linalg.norm(p) / np.linalg.norm(u)
        return u

    return jax.tree.map(update, m, v, params, grads)


@pytest.mark.parametrize("name", ["adamw", "nadamw", "lamb"])
@pytest.mark.parametrize("clip_update_rms", [0.0, 0.3])
def test_update_is_the_formulas_per_layer(name, clip_update_rms):
    config = dataclasses.replace(CONFIG, name=name, clip_update_rms=clip_update_rms, eps=1e-8)
    actual = run(config)[-1]
    for layer in range(3):
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-4, atol=1e-6),
            layer_of(actual, layer),
            expected_update(config, layer),
        )


def test_lamb_without_extras_is_optax_lamb_on_unstacked_parameters():
    config = dataclasses.replace(
        CONFIG, name="lamb", clip_update_rms=0.0, clip_grad_norm=0.0, eps=1e-6
    )
    params = layer_of(make_tree(), 1)
    theirs = optax.lamb(-1.0, config.b1, config.b2, config.eps, weight_decay=config.weight_decay,
                        mask=lambda tree: jax.tree.map(lambda x: x.ndim >= 2, tree))  # fmt: skip
    state = theirs.init(params)
    for step in range(3):
        update, state = theirs.update(layer_of(make_tree(step + 1), 1), state, params)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6),
        layer_of(run(config)[-1], 1),
        update,
    )


@pytest.mark.parametrize("b2", [0.99, 0.999])
def test_gradients_whose_squares_underflow_move_nothing_far(b2):
    """One row's gradients are tiny; no entry of it moves further than others, which are as ever."""
    config = dataclasses.replace(CONFIG, b2=b2, weight_decay=0.0, clip_grad_norm=0.0)
    assert config.eps == 1e-24
    optimizer = make_optimizer(config)
    params = make_tree()
    for scale in 10.0 ** -np.arange(15, 40):
        tiny, tiny_state = {}, optimizer.init(params)
        usual, usual_state = {}, optimizer.init(params)
        for step in range(3):
            gradients = make_tree(step)
            usual, usual_state = optimizer.update(gradients, usual_state, params)
            row = scale * np.abs(gradients["embedding"][2])
            gradients["embedding"] = gradients["embedding"].at[2].set(row)
            tiny, tiny_state = optimizer.update(gradients, tiny_state, params)
        actual, expected = np.asarray(tiny["embedding"]), np.asarray(usual["embedding"])
        assert np.abs(actual[2]).max() < 1.2, scale
        others = np.arange(len(actual)) != 2
        ratios = actual[others] / expected[others]  # the clip may cut by what the row adds: little
        np.testing.assert_allclose(ratios, ratios.flat[0], rtol=1e-5)
        assert 0.8 < ratios.flat[0] < 1.25


def test_only_matrices_decay():
    params = make_tree() | {"blocks": make_tree()["blocks"] | {
        "attention": {"lambda_vectors": jnp.ones((3, 4, 2)), "log_temperature": jnp.ones((3, 4))}
    }}  # fmt: skip
    assert matrices(params) == {
        "embedding": True,
        "final_norm": {"scale": False},
        "blocks": {
            "mlp": {"up": True},
            "mlp_norm": {"scale": False},
            "attention": {"lambda_vectors": False, "log_temperature": False},
        },
    }


def test_learning_rate_warms_up_and_ends_at_zero():
    config = dataclasses.replace(CONFIG, learning_rate=0.5, warmup_steps=10)
    rates = np.array([learning_rate(config, 100)(step) for step in range(101)])
    np.testing.assert_allclose(rates[:10], 0.05 * np.arange(1, 11), rtol=1e-6)
    assert np.argmax(rates) == 9
    assert np.all(np.diff(rates[9:]) < 0)
    assert rates[99] > 0
    np.testing.assert_allclose(rates[100], 0, atol=1e-9)
    half = rates[9 + 45] / 2 + rates[9 + 46] / 2  # 91 steps of cosine
    np.testing.assert_allclose(half, 0.25, rtol=1e-3)
