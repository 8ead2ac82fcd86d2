"""The decoder: the paper's parameter counts, causality, segments, and what remat must keep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import c4
from laser.training.config import load_config
from models.config import AttentionConfig, ModelConfig
from models.decoder import Decoder, look_up, positions, sinusoidal, train_flops_per_token
from models.families import init_parameters, structure

SMALL = ModelConfig(
    vocab_size=50, num_layers=3, model_dim=16, mlp_dim=32, num_heads=2, head_dim=8, remat="none"
)
TOKENS = np.random.default_rng(0).integers(0, 50, size=(2, 20)).astype(np.int32)

# 4·d·H·S + 2·d·h per layer and 32,000·d: how the paper's sizes are met. Norms come on top.
CORE_COUNTS = {
    "234m": 234_094_592,
    "301m": 301_203_456,
    "435m": 435_421_184,
    "1p1b": 1_139_277_824,
    "2p2b": 2_213_019_648,
    "7p7b": 7_732_899_840,
}


def run(config, tokens=TOKENS, segments=None, params=None):
    params = init_parameters(config, 0) if params is None else params
    model = nnx.merge(structure(config), params)
    return model.logits(model(jnp.asarray(tokens), segments)[0])


@pytest.mark.parametrize("attention", ["standard", "laser", "laser+diff"])
@pytest.mark.parametrize("size", CORE_COUNTS)
def test_parameter_counts(size, attention):
    model = load_config(c4.get_config(f"size={size},attention={attention}")).model
    shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(Decoder(model, nnx.Rngs(0)))))
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    core = sum(x.size for path, x in leaves if x.ndim - (path[0].key == "blocks") >= 2
               and not path[-1].key.startswith("lambda"))  # fmt: skip
    norms = sum(x.size for path, x in leaves if path[-1].key in ("scale", "bias"))
    assert core == CORE_COUNTS[size]
    assert norms == (4 * model.num_layers + 2) * model.model_dim
    rest = sum(x.size for _, x in leaves) - core - norms
    per_layer = 4 * model.head_dim // 2 + model.head_dim if "diff" in attention else 0
    assert rest == model.num_layers * per_layer


def test_flops_are_six_per_weight_plus_half_the_attention_square():
    weights = 3 * (4 * 16 * 2 * 8 + 2 * 16 * 32) + 50 * 16
    attention = 3 * 2 * (8 + 8) * 20 / 2
    assert train_flops_per_token(SMALL, 20) == 6 * (weights + attention)
    diff = dataclasses.replace(SMALL, attention=AttentionConfig(diff="official"))
    assert train_flops_per_token(diff, 20) == 6 * (weights + 3 * 2 * (8 + 16) * 20 / 2)


@pytest.mark.parametrize("changes", [{}, {"positions": "rotary", "norm": "rmsnorm"}])
def test_logits_depend_on_earlier_tokens_only(changes):
    config = dataclasses.replace(SMALL, **changes)
    later = TOKENS.copy()
    later[:, 12:] = (later[:, 12:] + 7) % 50
    before, after = run(config), run(config, later)
    np.testing.assert_allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 1e-2


def test_a_packed_row_gives_what_its_documents_give_alone():
    segments = jnp.asarray([[1] * 7 + [2] * 13, [1] * 20])
    packed = run(SMALL, TOKENS, segments)
    first, second = run(SMALL, TOKENS[:1, :7]), run(SMALL, TOKENS[:1, 7:])
    np.testing.assert_allclose(packed[0, :7], first[0], atol=1e-5)
    np.testing.assert_allclose(packed[0, 7:], second[0], atol=1e-5)
    np.testing.assert_allclose(packed[1], run(SMALL)[1], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"remat": "full"}, {"remat": "dots"}, {"unroll": True}, {"unroll": True, "remat": "full"}],
)
@pytest.mark.slow
def test_remat_and_unrolling_change_neither_values_nor_gradients(changes):
    params = init_parameters(SMALL, 0)

    def loss(params, config):
        return jnp.square(run(config, params=params)).mean()

    value_and_grad = functools.partial(jax.jit, static_argnums=1)(jax.value_and_grad(loss))
    expected = value_and_grad(params, SMALL)
    actual = value_and_grad(params, dataclasses.replace(SMALL, **changes))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), actual, expected
    )


def test_bfloat16_keeps_float32_parameters_and_logits():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = init_parameters(config, 0)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden, _ = nnx.merge(structure(config), params)(jnp.asarray(TOKENS))
    assert hidden.dtype == jnp.bfloat16
    logits = run(config)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, run(SMALL), atol=0.1)


def test_logits_soft_cap_bounds_the_logits():
    params = jax.tree.map(lambda x: 20 * x, init_parameters(SMALL, 0))
    assert np.abs(run(SMALL, params=params)).max() > 5
    capped = run(dataclasses.replace(SMALL, logits_soft_cap=5.0), params=params)
    np.testing.assert_allclose(capped, 5 * np.tanh(run(SMALL, params=params) / 5), rtol=1e-5)


def test_positions_restart_in_each_segment():
    segments = jnp.asarray([[1, 1, 1, 2, 3, 3], [4, 4, 4, 4, 4, 4]])
    np.testing.assert_array_equal(
        positions((2, 6), segments), [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
    )
    np.testing.assert_array_equal(positions((1, 4), None), [[0, 1, 2, 3]])


def test_sinusoidal_positions_as_in_pax():
    signal = sinusoidal(jnp.asarray([[0, 5]]), 6)[0]
    np.testing.assert_allclose(signal[0], [0, 0, 0, 1, 1, 1], atol=1e-7)
    angles = 5 * np.array([1, 1e-2, 1e-4])
    np.testing.assert_allclose(signal[1], [*np.sin(angles), *np.cos(angles)], rtol=1e-5)


def test_initial_parameters_follow_from_the_seed_alone():
    first, again, other = (init_parameters(SMALL, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embedding"], other["embedding"])
    stacked = first["blocks"]["mlp"]["up"]
    assert not np.array_equal(stacked[0], stacked[1])
    np.testing.assert_allclose(stacked.std(), 1 / 4, rtol=0.05)


@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("times", [4096, 65536])
def test_the_gradient_of_a_frequent_token_is_summed_in_float32(times, table_dtype):
    """In bfloat16 half of it is lost at 4,096 occurrences, and nearly all at 65,536."""
    rng = np.random.default_rng(0)
    cotangents = jnp.asarray(0.5 + rng.normal(size=(1, times, 8)), jnp.bfloat16)
    tokens = jnp.full((1, times), 2, jnp.int32)
    table = jnp.zeros((4, 8), table_dtype)
    rows, pull = jax.vjp(lambda t: look_up(t, tokens).astype(jnp.bfloat16), table)
    (gradient,) = pull(cotangents)
    assert rows.shape == cotangents.shape
    assert gradient.dtype == table.dtype
    expected = np.float64(cotangents).sum((0, 1))
    np.testing.assert_allclose(np.float64(gradient[2]), expected, rtol=4e-3)
    assert not np.asarray(gradient)[[0, 1, 3]].any()
