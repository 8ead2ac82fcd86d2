"""The vision transformer against formulas in numpy and against transformers' in PyTorch."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import vit as shipped
from laser.training.config import load_config
from models import families, vit
from models.config import AttentionConfig, VitConfig

SMALL = VitConfig(
    image_size=24, patch_size=4, num_classes=7, num_layers=2, model_dim=32, mlp_dim=48, num_heads=2
)


@pytest.mark.parametrize("size, count", [("s16", 22_122_472), ("ti16", 5_716_456)])
def test_sizes_have_the_number_of_parameters_of_algoperf(size, count):
    """The usual 22,050,664 and 5,717,416 with a class token and no tanh layer: dim² more, and less
    by 197 learned positions and that token."""
    config = load_config(shipped.get_config(f"size={size}")).model
    assert count - {"s16": 22_050_664, "ti16": 5_717_416}[size] == (
        config.model_dim * (config.model_dim + 1) - 198 * config.model_dim
    )
    params = jax.eval_shape(functools.partial(families.init_parameters, config, 0))
    assert sum(x.size for x in jax.tree.leaves(params)) == count


def test_a_new_model_says_that_all_classes_are_alike():
    logits, _ = run(SMALL, families.init_parameters(SMALL, 0), images(2))
    np.testing.assert_array_equal(logits, np.zeros((2, 7)))


def images(count: int) -> np.ndarray:
    shape = (count, SMALL.image_size, SMALL.image_size, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def parameters(config: VitConfig) -> families.Parameters:
    """All of them random, those too that start at 0 or 1."""
    params = families.init_parameters(config, 0)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    noisy = [np.float32(x + 0.1 * rng.normal(size=x.shape)) for x in leaves]
    return jax.tree.unflatten(tree, noisy)


def run(config: VitConfig, params, pixels, noise=None):
    model = nnx.merge(families.structure(config), jax.tree.map(jnp.asarray, params))
    return jax.jit(model)(jnp.asarray(pixels), noise)


def oracle(config: VitConfig, params, pixels: np.ndarray) -> np.ndarray:
    """The same by loops over images, patches, layers and heads, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        root = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return centred / root * p["scale"] + p["bias"]

    def attention(x, p):
        out = p["output_bias"] + np.zeros_like(x)
        for h in range(config.num_heads):
            q, k, v = (
                x @ p[name][:, h] + p[f"{name}_bias"][h] for name in ("query", "key", "value")
            )
            if config.attention.qk_norm:
                q, k = norm(q, p["query_norm"]), norm(k, p["key_norm"])
            weights = np.exp(q @ k.T / np.sqrt(config.head_dim))
            weights /= weights.sum(-1, keepdims=True)
            laser = config.attention.kind == "laser"
            out += (np.log(weights @ np.exp(v)) if laser else weights @ v) @ p["output"][:, h].T
        return out

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    logits = []
    size, count = config.patch_size, config.image_size // config.patch_size
    for image in np.asarray(pixels, np.float64):
        tokens = []
        for row in range(count):
            for column in range(count):
                rows = slice(row * size, row * size + size)
                columns = slice(column * size, column * size + size)
                patch = image[rows, columns].reshape(-1)
                token = patch @ params["patches"]["kernel"] + params["patches"]["bias"]
                n = config.model_dim // 4
                frequency = 1 / 10_000.0 ** (np.arange(n) / (n - 1))
                place = [f(at * frequency) for at in (column, row) for f in (np.sin, np.cos)]
                tokens.append(token + np.concatenate(place))
        x = np.stack(tokens)
        for i in range(config.num_layers):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            x = x + attention(norm(x, p["attention_norm"]), p["attention"])
            mlp = p["mlp"]
            hidden = gelu(norm(x, p["mlp_norm"]) @ mlp["up"] + mlp["up_bias"])
            x = x + hidden @ mlp["down"] + mlp["down_bias"]
        mean = norm(x, params["final_norm"]).mean(0)
        hidden = np.tanh(mean @ params["pre_logits"]["kernel"] + params["pre_logits"]["bias"])
        logits.append(hidden @ params["head"]["kernel"] + params["head"]["bias"])
    return np.stack(logits)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_logits_are_those_of_the_formulas(kind, qk_norm):
    config = dataclasses.replace(SMALL, attention=AttentionConfig(kind=kind, qk_norm=qk_norm))
    params, pixels = parameters(config), images(2)
    logits, _ = run(config, params, pixels)
    np.testing.assert_allclose(logits, oracle(config, params, pixels), rtol=1e-5, atol=1e-5)


def test_logits_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(SMALL, attention=AttentionConfig(kind="standard"))
    params, pixels = parameters(config), images(3)
    theirs = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=config.model_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_dim,
            hidden_act="gelu_pytorch_tanh",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=1e-6,
            image_size=config.image_size,
            patch_size=config.patch_size,
            pooler_output_size=config.model_dim,
        )
    ).eval()
    names = {name for name, _ in theirs.named_parameters()}
    given = weights_of_transformers(config, params)
    theirs.load_state_dict(
        {name: torch.tensor(np.ascontiguousarray(x)) for name, x in given.items()}, strict=False
    )
    assert names - given.keys() == {"embeddings.cls_token", "embeddings.position_embeddings"}
    with torch.no_grad():
        # Without their token for the class and their learned positions.
        x = theirs.embeddings.patch_embeddings(torch.tensor(pixels.transpose(0, 3, 1, 2)))
        x = x + torch.tensor(vit.sincos_2d(6, 6, config.model_dim))
        for layer in theirs.layers:
            x = layer(x)
        hidden = theirs.pooler.activation(theirs.pooler.dense(theirs.layernorm(x).mean(1)))
    head = params["head"]
    logits, _ = run(config, params, pixels)
    expected = hidden.numpy() @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def weights_of_transformers(config: VitConfig, params) -> dict[str, np.ndarray]:
    size, dim = config.patch_size, config.model_dim
    kernel = params["patches"]["kernel"].reshape(size, size, 3, dim)
    found = {
        "embeddings.patch_embeddings.projection.weight": kernel.transpose(3, 2, 0, 1),
        "embeddings.patch_embeddings.projection.bias": params["patches"]["bias"],
        "layernorm.weight": params["final_norm"]["scale"],
        "layernorm.bias": params["final_norm"]["bias"],
        "pooler.dense.weight": params["pre_logits"]["kernel"].T,
        "pooler.dense.bias": params["pre_logits"]["bias"],
    }
    blocks = params["blocks"]
    for i in range(config.num_layers):
        layer, attention, mlp = f"layers.{i}", f"layers.{i}.attention", f"layers.{i}.mlp"
        p = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        for name in ("query", "key", "value"):
            weight = p["attention"][name].reshape(dim, -1).T
            found[f"{attention}.{name[0]}_proj.weight"] = weight
            found[f"{attention}.{name[0]}_proj.bias"] = p["attention"][f"{name}_bias"].reshape(-1)
        found[f"{attention}.o_proj.weight"] = p["attention"]["output"].reshape(dim, -1)
        found[f"{attention}.o_proj.bias"] = p["attention"]["output_bias"]
        for theirs, ours in (("fc1", "up"), ("fc2", "down")):
            found[f"{mlp}.{theirs}.weight"] = p["mlp"][ours].T
            found[f"{mlp}.{theirs}.bias"] = p["mlp"][f"{ours}_bias"]
        for theirs, ours in (("before", "attention_norm"), ("after", "mlp_norm")):
            found[f"{layer}.layernorm_{theirs}.weight"] = p[ours]["scale"]
            found[f"{layer}.layernorm_{theirs}.bias"] = p[ours]["bias"]
    return found


def test_an_image_has_the_logits_that_it_has_alone():
    params, pixels = parameters(SMALL), images(3)
    together, _ = run(SMALL, params, pixels)
    for i in range(3):
        alone, _ = run(SMALL, params, pixels[i : i + 1].repeat(3, axis=0))
        np.testing.assert_array_equal(together[i], alone[i])


def test_the_first_patch_sees_the_last_one():
    params, pixels = parameters(SMALL), jnp.asarray(images(1))
    model = nnx.merge(families.structure(SMALL), jax.tree.map(jnp.asarray, params))
    block = jax.tree.map(lambda x: jnp.asarray(x)[0], params["blocks"])
    one = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: nnx.clone(model.blocks))), block)
    x_BTM = jnp.asarray(vit.patches(pixels, 4)[:, :, :32])

    def first(x):
        return one(x, jnp.int32(0), None)[0][0, 0].sum()

    assert jnp.abs(jax.jit(jax.grad(first))(x_BTM)[0, -1]).max() > 1e-6


def test_a_block_has_no_way_around_its_dropout():
    assert not hasattr(vit.EncoderBlock, "decode")
    assert "noise_B" in inspect.signature(vit.EncoderBlock.__call__).parameters


@pytest.mark.parametrize("change", [{"remat": "full"}, {"unroll": True}])
def test_how_it_is_compiled_changes_nothing(change):
    params, pixels = parameters(SMALL), images(2)
    other, _ = run(dataclasses.replace(SMALL, **change), params, pixels)
    np.testing.assert_allclose(run(SMALL, params, pixels)[0], other, rtol=1e-6, atol=1e-6)


def test_dropout_follows_from_the_number_of_each_image():
    config = dataclasses.replace(SMALL, dropout=0.3)
    params, pixels = parameters(config), images(3)
    noise = jnp.asarray([5, 6, 5], jnp.uint32)
    with_noise, _ = run(config, params, pixels, noise)
    order = np.array([2, 0, 1])
    moved, _ = run(config, params, pixels[order], noise[order])
    np.testing.assert_array_equal(moved, with_noise[order])
    twice, _ = run(config, params, pixels[[0, 0, 0]], noise)
    np.testing.assert_array_equal(twice[0], twice[2])
    assert np.abs(twice[0] - twice[1]).max() > 0.01
    without, _ = run(config, params, pixels)
    np.testing.assert_array_equal(without, run(SMALL, params, pixels)[0])


def test_dropout_keeps_the_mean():
    x = jnp.ones((4, 100, 50))
    dropped = vit.dropped(x, 0.25, jnp.arange(4, dtype=jnp.uint32), 0)
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.01
    assert float(jnp.where(dropped == 0, 4 / 3, dropped).min()) == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"patch_size": 5}, "model.patch_size=5: must divide model.image_size=24"),
        ({"num_heads": 5}, "model.num_heads=5: must divide model.model_dim=32"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"model_dim": 30}, "model.model_dim=30"),
        ({"num_classes": 0}, "model.num_classes=0"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(SMALL, **change)
    assert words in str(error.value)
