"""Prefill and decode against the whole forward pass, for every variant."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser.attention.decode import BLOCK
from models.config import AttentionConfig, ModelConfig
from models.decoder import embed
from models.decoding import append, empty_cache, next_logits, unstack
from models.families import init_parameters, structure
from models.layers import Norm

SMALL = ModelConfig(
    vocab_size=50, num_layers=2, model_dim=16, mlp_dim=32, num_heads=2, head_dim=8, remat="none"
)
OUTLIER = 49  # a token that is drawn nowhere else
PROMPTS, STEPS = (BLOCK + 20, 7), 5  # tokens of the two rows, and what they are continued by
VARIANTS = {
    "standard": {},
    "laser": {"kind": "laser"},
    "temperatures": {"kind": "laser", "temperature": 0.5, "per_dim_temp": True, "soft_cap": 5.0},
    "qk_norm": {"kind": "laser", "qk_norm": True, "soft_cap": 5.0},
    "diff": {"kind": "laser", "diff": "official", "per_dim_temp": True},
    "diff_scalar": {"kind": "laser", "diff": "scalar", "qk_norm": True},
    "standard_diff": {"diff": "official"},
}


def moved(config):
    """Parameters away from their initial values, norms and temperatures too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + jnp.float32(0.2 * rng.normal(size=x.shape)), init_parameters(config, 0)
    )


def with_outlier(params):
    """Parameters that give OUTLIER, and nothing else, large values in the first layer: its
    embedding has a direction of its own, which the value's weights amplify."""
    embedding = params["embedding"].at[:, 0].set(0.0).at[OUTLIER, 0].set(3.0)
    attention = params["blocks"]["attention"]
    signs = jnp.where(jnp.arange(SMALL.head_dim) % 2 == 0, 1.0, -1.0)
    attention = {**attention, "value": attention["value"].at[0, 0].set(80 * signs)}
    return {
        **params, "embedding": embedding, "blocks": {**params["blocks"], "attention": attention}
    }  # fmt: skip


def first_values(config, params, row):
    """V of the first layer, (T, H, D)."""
    blocks = jax.tree.map(lambda x: x[0], params["blocks"])
    graph = nnx.graphdef(nnx.eval_shape(lambda: Norm(config.model_dim, config.norm)))
    x_1TM = embed(config, params["embedding"], row[None], jnp.arange(len(row))[None])
    x_TM = nnx.merge(graph, blocks["attention_norm"])(x_1TM)[0]
    return jnp.einsum("tm,mhd->thd", x_TM, blocks["attention"]["value"])


def row_tokens(outlier):
    """(2, ...) prompts and continuations as the lists of the rows."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, OUTLIER, size=n + STEPS).astype(np.int32) for n in PROMPTS]
    if outlier:
        for row, prompt in zip(rows, PROMPTS):
            row[prompt - 3] = row[prompt + 2] = OUTLIER
    return rows


def whole(config, params, row):
    model = nnx.merge(structure(config), params)
    return jax.jit(lambda row: model.logits(model(row)[0])[0])(row[None])


@functools.cache
def jitted(config):
    return jax.jit(functools.partial(append, config))


def piecewise(config, params, rows, capacity=4 * BLOCK):
    """The rows' logits at their last prompt token and at each token of the continuation."""
    unstacked = unstack(config, params)
    cache = empty_cache(config, 2, capacity)
    run = jitted(config)
    logits = [[], []]
    prompts = [len(row) - STEPS for row in rows]
    for start in range(0, -(-max(prompts) // BLOCK) * BLOCK, BLOCK):
        tokens, real = np.zeros((2, BLOCK), np.int32), np.zeros((2, BLOCK), bool)
        for i, (row, prompt) in enumerate(zip(rows, prompts)):
            count = np.clip(prompt - start, 0, BLOCK)
            tokens[i, :count], real[i, :count] = row[start : start + count], True
        hidden, cache = run(unstacked, tokens, real, cache)
        for i in range(2):
            logits[i] += list(next_logits(config, unstacked, hidden[i, : real[i].sum()]))
    for step in range(STEPS):
        tokens = np.array([[row[prompt + step]] for row, prompt in zip(rows, prompts)])
        hidden, cache = run(unstacked, tokens, np.ones((2, 1), bool), cache)
        for i, new in enumerate(next_logits(config, unstacked, hidden[:, 0])):
            logits[i].append(new)
    return [np.array(x) for x in logits]


@pytest.mark.parametrize(
    "variant, positions, norm, outlier",
    [
        ("standard", "sinusoidal", "layernorm", True),
        ("standard_diff", "rotary", "rmsnorm", True),
        ("laser", "sinusoidal", "layernorm", False),
        ("laser", "sinusoidal", "layernorm", True),
        ("temperatures", "rotary", "rmsnorm", True),
        ("qk_norm", "rotary", "layernorm", True),
        ("diff", "sinusoidal", "rmsnorm", True),
        ("diff_scalar", "rotary", "layernorm", True),
    ],
)
@pytest.mark.slow
def test_prefill_and_decode_give_the_logits_of_the_whole(variant, positions, norm, outlier):
    attention = AttentionConfig(**{"kind": "standard", **VARIANTS[variant]})
    config = dataclasses.replace(
        SMALL, positions=positions, norm=norm, logits_soft_cap=5.0, attention=attention
    )
    params = moved(config)
    if outlier:
        params = with_outlier(params)
    rows = row_tokens(outlier)
    for row, actual in zip(rows, piecewise(config, params, rows), strict=True):
        np.testing.assert_allclose(actual, whole(config, params, row), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
def test_the_outlier_lies_so_far_off_that_the_papers_trick_underflows(positions):
    config = dataclasses.replace(SMALL, positions=positions)
    row = row_tokens(True)[0]
    values = first_values(config, with_outlier(moved(config)), row)
    outlier = row == OUTLIER
    assert outlier.sum() == 2
    assert values[outlier][..., ::2].min() > values[~outlier].max() + 90
    assert values[outlier][..., 1::2].max() < values[~outlier].min() - 90


@pytest.mark.slow
def test_bits_depend_on_no_neighbour_and_no_capacity():
    config = dataclasses.replace(SMALL, attention=AttentionConfig(kind="laser"))
    params = with_outlier(moved(config))
    _, row = row_tokens(True)
    rng = np.random.default_rng(2)
    short, long = (rng.integers(0, OUTLIER, size=n + STEPS).astype(np.int32) for n in (1, 150))
    expected = piecewise(config, params, [row, short])[0]
    for neighbour, capacity in ((long, 4 * BLOCK), (short, 8 * BLOCK)):
        actual = piecewise(config, params, [row, neighbour], capacity)[0]
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_bfloat16_casts_weights_once_and_keeps_norms():
    config = dataclasses.replace(SMALL, dtype="bfloat16", attention=AttentionConfig(kind="laser"))
    params = moved(config)
    unstacked = unstack(config, params)
    assert unstacked["embedding"].dtype == jnp.bfloat16
    assert unstacked["blocks"][1]["mlp"]["up"].dtype == jnp.bfloat16
    assert unstacked["blocks"][1]["mlp_norm"]["scale"].dtype == jnp.float32
    rows = row_tokens(False)
    for row, actual in zip(rows, piecewise(config, params, rows), strict=True):
        np.testing.assert_allclose(actual, whole(config, params, row), atol=0.1)
