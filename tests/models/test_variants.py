"""Every attention layer variant against the paper's formulas, written out in numpy float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser.attention import lambda_init
from models.config import AttentionConfig, ModelConfig
from models.layers import Attention

B, T, M, H, D = 2, 9, 12, 2, 8
LAYER = 3
VARIANTS = [
    {
        "kind": kind,
        "temperature": temperature,
        "per_dim_temp": per_dim,
        "qk_norm": norm,
        "diff": diff,
    }
    for kind, temperature, per_dim, norm, diff in itertools.product(
        ("standard", "laser"),
        (1.0, 0.5),
        (False, True),
        (False, True),
        ("none", "official", "scalar"),
    )
]


def make_config(variant):
    return ModelConfig(
        vocab_size=16,
        num_layers=1,
        model_dim=M,
        mlp_dim=M,
        num_heads=H,
        head_dim=D,
        attention=AttentionConfig(**variant),
    )


def make_layer(variant):
    """A layer whose every parameter is away from its initial value, norms and temperatures too."""
    layer = Attention(make_config(variant), nnx.Rngs(0))
    state = nnx.state(layer, nnx.Param)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + jnp.float32(0.3 * rng.normal(size=x.shape)), state)
    nnx.update(layer, moved)
    return layer, jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(moved))


def layer_norm(x, norm):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]


def expected_layer(x, p, variant):
    """paper.md's table of functions, one head and one row at a time."""
    maps = 1 if variant["diff"] == "none" else 2
    d = D // maps
    initial = 0.8 - 0.6 * np.exp(-0.3 * LAYER)
    out = np.zeros((B, T, H, D))
    for b, h in itertools.product(range(B), range(H)):
        value = x[b] @ p["value"][:, h]
        parts = []
        for part in range(maps):
            query = (x[b] @ p["query"][:, h])[:, part * d : (part + 1) * d]
            key = (x[b] @ p["key"][:, h])[:, part * d : (part + 1) * d]
            if variant["qk_norm"]:
                query, key = layer_norm(query, p["query_norm"]), layer_norm(key, p["key_norm"])
            if variant["per_dim_temp"]:
                query = query * np.log1p(np.exp(p["log_temperature"])) / np.log(2)
            logits = query @ key.T / (np.sqrt(d) * variant["temperature"])
            logits[np.triu_indices(T, 1)] = -np.inf
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            parts.append(
                weights @ value
                if variant["kind"] == "standard"
                else np.log(weights @ np.exp(value))
            )
        if variant["diff"] == "none":
            out[b, :, h] = parts[0]
        elif variant["diff"] == "scalar":
            out[b, :, h] = parts[0] - (p["lambda_scalar"] + initial) * parts[1]
        else:
            q1, k1, q2, k2 = p["lambda_vectors"]
            o = parts[0] - (np.exp(q1 @ k1) - np.exp(q2 @ k2) + initial) * parts[1]
            o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * p["output_norm_scale"]
            out[b, :, h] = o * (1 - initial)
    return np.einsum("bthd,mhd->btm", out, p["output"])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def test_layer_equals_the_formula(variant):
    layer, params = make_layer(variant)
    x = np.random.default_rng(1).normal(size=(B, T, M))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    actual, _ = layer(jnp.float32(x), jnp.int32(LAYER), positions, None)
    np.testing.assert_allclose(actual, expected_layer(x, params, variant), rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(str(x) for x in v.values()))
def test_every_parameter_of_every_variant_is_trained(variant):
    layer, _ = make_layer(variant)
    graph, params = nnx.split(layer, nnx.Param)
    x = jnp.float32(np.random.default_rng(1).normal(size=(B, T, M)))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))

    def loss(params):
        out, _ = nnx.merge(graph, params)(x, jnp.int32(LAYER), positions, None)
        return jnp.sin(out).sum()

    for path, gradient in nnx.to_flat_state(jax.grad(loss)(params)):
        assert np.isfinite(gradient[...]).all(), path
        # A key's bias moves all logits of a query alike, except where temperatures differ.
        assert np.any(gradient[...] != 0), path


def test_per_dim_temperature_starts_at_exactly_the_standard_scale():
    plain = Attention(make_config({"kind": "laser"}), nnx.Rngs(0))
    scaled = Attention(make_config({"kind": "laser", "per_dim_temp": True}), nnx.Rngs(0))
    x = jnp.float32(np.random.default_rng(1).normal(size=(B, T, M)))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    first, second = (layer(x, jnp.int32(0), positions, None)[0] for layer in (plain, scaled))
    np.testing.assert_array_equal(first, second)


def test_lambda_starts_as_in_the_differential_transformer():
    np.testing.assert_allclose(lambda_init(0), 0.2, rtol=1e-6)
    np.testing.assert_allclose(lambda_init(31), 0.8 - 0.6 * np.exp(-9.3), rtol=1e-6)
