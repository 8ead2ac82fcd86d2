"""Grouped heads and gated MLPs in the decoder: counts, formulas, cache and layout on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base, c4, llama
from laser.training import roofline, sharding
from laser.training.config import load_config
from laser.training.program import Program
from models.config import AttentionConfig, ModelConfig
from models.decoder import train_flops_per_token
from models.families import init_parameters
from models.layers import Mlp
from tests.models.test_decoding import moved, piecewise, row_tokens, whole

SMALL = ModelConfig(
    vocab_size=50, num_layers=2, model_dim=16, mlp_dim=32, num_heads=4, head_dim=4, num_kv_heads=2,
    mlp="swiglu", norm="rmsnorm", positions="rotary", remat="none",
)  # fmt: skip


def test_the_shipped_config_has_the_stated_number_of_parameters():
    model = load_config(llama.get_config()).model
    papers = load_config(c4.get_config("size=301m")).model
    shapes = jax.eval_shape(functools.partial(init_parameters, model, 0))
    matrices = 32 * (2 * 1024 * (8 + 2) * 128 + 3 * 1024 * 1920) + 32_000 * 1024
    norms = (2 * 32 + 1) * 1024
    assert sum(x.size for x in jax.tree.leaves(shapes)) == matrices + norms
    assert roofline.parameter_count(model) == matrices == 305_397_760
    attention = 6 * 32 * 8 * (128 + 128) * 1024 / 2
    assert train_flops_per_token(model, 1024) == 6 * matrices + attention
    same = ("num_layers", "model_dim", "num_heads", "head_dim", "vocab_size")
    assert all(getattr(model, name) == getattr(papers, name) for name in same)
    standard = load_config(llama.get_config("attention=standard")).model
    assert dataclasses.replace(model, attention=standard.attention) == standard


@pytest.mark.parametrize("kind", ["geglu", "swiglu"])
def test_a_gated_mlp_is_its_formula(kind):
    mlp = Mlp(dataclasses.replace(SMALL, mlp=kind), nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(size=(2, 3, 16))
    gate, up, down = (np.float64(w[...]) for w in (mlp.gate, mlp.up, mlp.down))
    g = x @ gate
    tanh = np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))
    gated = 0.5 * g * (1 + tanh) if kind == "geglu" else g / (1 + np.exp(-g))
    np.testing.assert_allclose(mlp(jnp.float32(x)), (gated * (x @ up)) @ down, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_prefill_and_decode_give_the_logits_of_the_whole(kind):
    config = dataclasses.replace(SMALL, attention=AttentionConfig(kind=kind))
    params = moved(config)
    rows = row_tokens(outlier=False)
    for row, actual in zip(rows, piecewise(config, params, rows), strict=True):
        np.testing.assert_allclose(actual, whole(config, params, row), rtol=1e-5, atol=1e-5)


def run_config(**mesh):
    config = load_config(base.get_config())
    return dataclasses.replace(
        config,
        model=dataclasses.replace(SMALL, attention=AttentionConfig(kind="standard")),
        data=dataclasses.replace(config.data, seq_len=16),
        training=dataclasses.replace(config.training, batch_size=8),
        mesh=dataclasses.replace(config.mesh, **mesh),
    )


@pytest.mark.slow
def test_a_mesh_that_splits_heads_gives_the_gradients_of_one_device():
    """The tensor axis splits heads of keys with the heads of queries that they serve."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, size=(8, 17)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:],
             "weights": np.ones((8, 16), np.float32)}  # fmt: skip
    found = []
    for devices, mesh in ((1, {"data": 1}), (4, {"data": 1, "fsdp": 2, "tensor": 2})):
        config = run_config(**mesh)
        program = Program(config, sharding.make_mesh(config, jax.devices()[:devices]))
        state, metrics = program.train_step(program.init_state(), batch)
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"]), state.params))
    one, four = found
    np.testing.assert_allclose(one[:2], four[:2], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one[2], four[2])


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("model", "num_kv_heads", 3, "model.num_kv_heads=3: must divide model.num_heads=8; use 1"),
        ("model", "num_kv_heads", 16, "model.num_kv_heads=16: must divide model.num_heads=8"),
        ("model", "num_kv_heads", -2, "model.num_kv_heads=-2: must divide"),
        ("model", "mlp", "gated", "model.mlp='gated': must be one of gelu, relu, geglu, swiglu"),
        ("mesh", "tensor", 4, "mesh.tensor=4: must divide model.num_kv_heads=2; use 2"),
    ],
)
def test_mistakes_are_one_line(section, field, value, message):
    config = llama.get_config()
    config[section][field] = value
    with pytest.raises(ValueError) as error:
        load_config(config)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
