"""BERT's form of the blocks, against the formulas and against PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import bert
from laser.training.config import load_config
from laser.training.roofline import parameter_count
from models.config import AttentionConfig, BertConfig
from models.decoder import sinusoidal, train_flops_per_token
from models.families import init_parameters, structure

SMALL = BertConfig(
    vocab_size=50, num_layers=2, model_dim=16, mlp_dim=32, num_heads=2, head_dim=8,
    mlp="relu", logits_soft_cap=30.0, remat="none",
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 20)).astype(np.int32)
SEGMENTS = np.int32([[1] * 7 + [2] * 13, [1] * 12 + [2] * 5 + [0] * 3])


def parameters(config):
    """Initial ones, with norms that do something."""
    rng = np.random.default_rng(1)
    params = jax.device_get(init_parameters(config, 0))
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def run(config, params, tokens=TOKENS, segments=SEGMENTS):
    model = nnx.merge(structure(config), params)
    return np.asarray(model.logits(model(jnp.asarray(tokens), jnp.asarray(segments))[0]))


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def oracle(config, params, tokens, segments):
    """One row by float64 numpy, a document at a time as if it were alone."""
    params = jax.tree.map(np.float64, params)
    embedding, out = params["embedding"], np.zeros((len(tokens), config.vocab_size))
    for segment in np.unique(segments):
        there = segments == segment
        count = there.sum()
        table = sinusoidal(jnp.arange(count)[None], config.model_dim)[0]
        x = embedding[tokens[there]] * 4 + np.float64(table)
        for layer in range(config.num_layers):
            p = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
            y, a = norm(x, p["attention_norm"]), p["attention"]
            q, k, v = (np.einsum("tm,mhd->htd", y, a[n]) for n in ("query", "key", "value"))
            logits = np.einsum("htd,hsd->hts", q, k) / np.sqrt(config.head_dim)
            if cap := config.attention.soft_cap:
                logits = cap * np.tanh(logits / cap)
            probs = np.exp(logits - logits.max(-1, keepdims=True))
            probs /= probs.sum(-1, keepdims=True)
            laser = config.attention.kind == "laser"
            read = np.log(probs @ np.exp(v)) if laser else probs @ v
            x = x + np.einsum("htd,mhd->tm", read, a["output"])
            hidden = np.maximum(norm(x, p["mlp_norm"]) @ p["mlp"]["up"], 0)
            x = x + hidden @ p["mlp"]["down"]
        logits = norm(x, params["final_norm"]) @ embedding.T
        out[there] = 30 * np.tanh(logits / 30)
    return out


@pytest.mark.parametrize("soft_cap", [0.0, 50.0])
@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_logits_are_those_of_the_formulas(kind, soft_cap):
    """Documents of a row, and padding, see nothing of each other."""
    attention = AttentionConfig(kind=kind, soft_cap=soft_cap)
    config = dataclasses.replace(SMALL, attention=attention)
    params = parameters(config)
    expected = np.stack([oracle(config, params, *row) for row in zip(TOKENS, SEGMENTS)])
    np.testing.assert_allclose(run(config, params), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_a_token_sees_both_ways_and_no_padding(kind):
    config = dataclasses.replace(SMALL, attention=AttentionConfig(kind=kind))
    params, changed = parameters(config), TOKENS.copy()
    changed[1, 17:] = (changed[1, 17:] + 3) % 50  # padding
    before, after = run(config, params), run(config, params, changed)
    np.testing.assert_array_equal(before[1, :17], after[1, :17])
    changed[1, 11] = (changed[1, 11] + 3) % 50  # the last one of a document
    after = run(config, params, changed)
    assert np.abs(after - before)[1, :11].min(-1).min() > 0
    np.testing.assert_array_equal(before[1, 12:17], after[1, 12:17])


def test_blocks_are_those_of_transformers():
    """Its BERT has the norm after the sum; its one with the norm before is RoBERTa's."""
    torch = pytest.importorskip("torch")
    roberta = pytest.importorskip("transformers.models.roberta_prelayernorm")
    config = dataclasses.replace(SMALL, attention=AttentionConfig(kind="standard"))
    params = parameters(config)
    theirs = roberta.RobertaPreLayerNormModel(
        roberta.RobertaPreLayerNormConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, hidden_act="relu", hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, layer_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    blocks, state = params["blocks"], {}
    for i in range(config.num_layers):
        a, layer = blocks["attention"], f"encoder.layer.{i}."
        for name in ("query", "key", "value"):
            state[f"{layer}attention.self.{name}.weight"] = a[name][i].reshape(16, -1).T
        state[f"{layer}attention.output.dense.weight"] = a["output"][i].reshape(16, -1)
        state[f"{layer}intermediate.dense.weight"] = blocks["mlp"]["up"][i].T
        state[f"{layer}output.dense.weight"] = blocks["mlp"]["down"][i].T
        for ours, name in (("attention_norm", "attention"), ("mlp_norm", "intermediate")):
            for part, their_part in (("scale", "weight"), ("bias", "bias")):
                state[f"{layer}{name}.LayerNorm.{their_part}"] = blocks[ours][part][i]
    state["LayerNorm.weight"] = params["final_norm"]["scale"]
    state["LayerNorm.bias"] = params["final_norm"]["bias"]
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            value = state.pop(name, None)
            if value is not None:
                parameter.copy_(torch.tensor(np.ascontiguousarray(value)))
            elif name.endswith("dense.bias") or ".self." in name:
                parameter.zero_()
        assert not state
        table = np.asarray(sinusoidal(jnp.arange(20)[None], 16))
        x = torch.tensor(params["embedding"][TOKENS] * 4 + table)
        hidden = theirs.LayerNorm(theirs.encoder(x).last_hidden_state).numpy()
    expected = 30 * np.tanh(hidden @ params["embedding"].T / 30)
    ours = run(config, params, segments=np.ones_like(SEGMENTS))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "size, blocks", [("2p2b", 2_147_483_648), ("110m", 84_934_656)]
)  # 32 · (4 · 2048 · 4096 + 2 · 2048 · 8192); BERT-base: 12 · (4 · 768² + 2 · 768 · 3072)
def test_parameter_counts(size, blocks):
    model = load_config(bert.get_config(f"size={size}")).model
    assert parameter_count(model) == blocks + 32_000 * model.model_dim
    shapes = jax.eval_shape(lambda: init_parameters(model, 0))
    norms = (4 * model.num_layers + 2) * model.model_dim
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameter_count(model) + norms


def test_flops_have_the_whole_square():
    weights = 2 * (4 * 16 * 2 * 8 + 2 * 16 * 32) + 50 * 16
    assert train_flops_per_token(SMALL, 20) == 6 * (weights + 2 * 2 * (8 + 8) * 20)
