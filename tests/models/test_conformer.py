"""The Conformer against its formulas in NumPy, its size, and what padding may not change."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import conformer as shipped
from laser.training.config import load_config
from laser.training.roofline import parameter_count
from models import conformer, families
from models.config import AttentionConfig, ConformerConfig
from tests.models import conformer_oracle

VARIANTS = ["standard", "laser", "laser+qk_norm"]


def make_config(variant="laser", **fields):
    kind, *modifiers = variant.split("+")
    attention = AttentionConfig(kind=kind, per_dim_temp=True, qk_norm="qk_norm" in modifiers)
    shape = {"vocab_size": 11, "num_layers": 2, "model_dim": 16, "mlp_dim": 32, "num_heads": 2}
    return ConformerConfig(**shape | {"mel_bins": 10, "attention": attention} | fields)


def random_parameters(config, seed=0):
    """Of every parameter other values than its initial ones, which are often 0 or 1."""
    shapes = jax.eval_shape(functools.partial(families.init_parameters, config, 0))
    draws = np.random.default_rng(seed)

    def draw(path, leaf):
        fan = max(1, math.prod(leaf.shape[1:]) / leaf.shape[-1])
        values = draws.standard_normal(leaf.shape) / math.sqrt(fan)
        if path[-1].key == "variance":
            values = np.exp(values)
        return jnp.float32(values + (path[-1].key == "scale"))  # of QK-norm

    return jax.tree_util.tree_map_with_path(draw, shapes)


def batch(lengths, frames, bins=10, seed=1):
    """Features and their numbers of frames; what is no frame is far from 0."""
    draws = np.random.default_rng(seed)
    features = np.full((len(lengths), frames, bins), 1e3, np.float32)
    for row, length in enumerate(lengths):
        features[row, :length] = draws.standard_normal((length, bins))
    return features, np.array(lengths, np.int32)


def forward(config, params, *inputs):
    return jax.jit(nnx.merge(families.structure(config), params))(*inputs)


@pytest.mark.parametrize("size, millions", [("32m", 32.3), ("105m", 104.9)])
def test_as_many_parameters_as_algoperf(size, millions):
    config = load_config(shipped.get_config(f"size={size}")).model
    params = jax.eval_shape(lambda: families.init_parameters(config, 0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert round(count / 1e6, 1) == millions


def test_the_config_counts_the_matrices():
    """What plans go by; biases, norms and moments are the rest."""
    config = ConformerConfig(
        vocab_size=1024, num_layers=4, model_dim=512, mlp_dim=2048, num_heads=8
    )
    params = jax.eval_shape(lambda: families.init_parameters(config, 0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert parameter_count(config) == pytest.approx(count, rel=3e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_equals_the_formulas(variant):
    """In a padded batch, in training by the moments of the batch, in evaluation by its own."""
    config = make_config(variant, dropout=0.0)
    params = random_parameters(config)
    lengths = [37, 18, 5]
    features, frames = batch(lengths, 40)
    recordings = [row[:length] for row, length in zip(features, lengths)]
    kind = config.attention.kind

    noise = np.zeros(3, np.uint32)
    outputs = forward(config, params, features, frames, noise)
    expected, moments = conformer_oracle.conformer(params, recordings, kind)
    assert outputs.positions_B.tolist() == [10, 5, 2] == [len(x) for x in expected]
    for row, logits in enumerate(expected):
        np.testing.assert_allclose(outputs.logits_BTV[row, : len(logits)], logits, atol=1e-5)
    means, variances = map(np.stack, zip(*moments))
    np.testing.assert_allclose(outputs.moments.mean, means, atol=1e-5)
    np.testing.assert_allclose(outputs.moments.variance, variances, atol=1e-5)

    own = params["blocks"]["convolution"]["batch_norm"]
    outputs = forward(config, params, features, frames)
    expected, _ = conformer_oracle.conformer(
        params, recordings, kind, list(zip(own["mean"], own["variance"]))
    )
    for row, logits in enumerate(expected):
        np.testing.assert_allclose(outputs.logits_BTV[row, : len(logits)], logits, atol=1e-5)


@pytest.mark.parametrize("variant", ["standard", "laser"])
@pytest.mark.parametrize("frames", [41, 64])
@pytest.mark.slow
def test_more_padding_and_empty_rows_change_nothing(variant, frames):
    """But the last bits: sums over more zeros may be cut into other pieces."""
    config = make_config(variant, dropout=0.0)
    params = random_parameters(config)

    def loss(params, features, lengths):
        model = nnx.merge(families.structure(config), params)
        outputs = model(features, lengths, jnp.zeros(len(lengths), jnp.uint32))
        valid = conformer.within(outputs.logits_BTV.shape[1], outputs.positions_B)
        return jnp.sum(jnp.square(outputs.logits_BTV) * valid[..., None]), outputs

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    expected_gradient, expected = gradient(params, *batch([37, 18], 40))
    found_gradient, found = gradient(params, *batch([37, 18, 0], frames))
    for row, positions in enumerate([10, 5]):
        part = np.s_[row, :positions]
        np.testing.assert_allclose(found.logits_BTV[part], expected.logits_BTV[part], atol=1e-5)
    np.testing.assert_allclose(found.moments, expected.moments, atol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3),
        found_gradient,
        expected_gradient,
    )


def test_padding_that_is_not_finite_does_not_show():
    config = make_config()
    params = random_parameters(config)
    features, frames = batch([37, 18], 40)
    for row, length in enumerate(frames):
        features[row, length:] = np.nan
    assert np.isfinite(forward(config, params, features, frames).logits_BTV).all()


def test_dropout_is_each_rows_own():
    """It follows from the row's number, wherever the row is in the batch."""
    config = make_config(dropout=0.5)
    params = random_parameters(config)
    features, frames = batch([37, 37, 37], 40)
    features[:] = features[0]
    noise = np.array([7, 8, 7], np.uint32)
    logits = forward(config, params, features, frames, noise).logits_BTV
    np.testing.assert_array_equal(logits[0], logits[2])
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_the_convolutions_branch_has_no_dropout(monkeypatch):
    """What is left when the other branches are 0, and the input's dropout is taken away."""
    real = conformer.dropped

    def dropped(x, rate, noise, place):
        return x if isinstance(place, int) else real(x, rate, noise, place)

    config = make_config(dropout=0.5, num_layers=1)
    params = random_parameters(config)
    features, frames = batch([37, 18], 40)

    def differs(params):
        noises = (np.array([1, 2], np.uint32), np.array([3, 4], np.uint32))
        one, other = (forward(config, params, features, frames, x).logits_BTV for x in noises)
        return bool((one != other).any())

    monkeypatch.setattr(conformer, "dropped", dropped)
    assert differs(params)
    blocks = params["blocks"]
    for branch in (blocks["first"]["down"], blocks["second"]["down"]):
        branch |= {name: 0 * x for name, x in branch.items()}
    for name in ("output", "output_bias"):
        blocks["attention"][name] *= 0
    assert not differs(params)


def test_logits_of_bfloat16_are_not_rounded_to_it():
    config = make_config(dtype="bfloat16")
    logits = forward(config, random_parameters(config), *batch([37, 18], 40)).logits_BTV
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


def test_what_it_cannot_be_is_refused():
    for fields, message in (
        ({"kernel_size": 4}, "model.kernel_size=4: must be at least 1 and odd"),
        ({"kernel_size": -1}, "model.kernel_size=-1: must be at least 1 and odd"),
        ({"num_heads": 3}, "model.model_dim=16: must be a multiple"),
        ({"dropout": 1.0}, "model.dropout=1.0: must be at least 0 and below 1"),
        ({"num_heads": 8, "model_dim": 24}, "model.model_dim=24: must be a multiple"),
    ):
        with pytest.raises(ValueError) as error:
            make_config(**fields)
        assert message in str(error.value)


@pytest.mark.slow
def test_flops_are_those_that_xla_counts():
    """Of the forward pass of one block, so that no scan hides others; a third of all."""
    fields = {"num_layers": 1, "model_dim": 64, "mlp_dim": 256, "mel_bins": 80}
    config = make_config("standard", unroll=True, **fields)
    params = families.init_parameters(config, 0)
    model = nnx.merge(families.structure(config), params)
    features, frames = batch([200], 200, bins=80)
    compiled = jax.jit(lambda x, n: model(x, n).logits_BTV).lower(features, frames).compile()
    counted = compiled.cost_analysis()["flops"]
    flops = 200 * conformer.train_flops_per_token(config, 200)
    assert flops / 3 == pytest.approx(counted, rel=0.1)


def test_moments_move_and_nothing_else_does():
    config = make_config()
    params = families.init_parameters(config, 0)
    step = conformer.Moments(jnp.full((2, 16), 3.0), jnp.full((2, 16), 5.0))
    new = jax.tree.map(lambda x: x + 1, params)
    moved = conformer.moved(config, params, new, step)
    norm = moved["blocks"]["convolution"]["batch_norm"]
    np.testing.assert_allclose(norm["mean"], 0.003, rtol=1e-5)
    np.testing.assert_allclose(norm["variance"], 0.999 + 0.005, rtol=1e-5)
    for name in ("mean", "variance"):
        norm[name] = new["blocks"]["convolution"]["batch_norm"][name]
    jax.tree.map(np.testing.assert_array_equal, moved, new)
