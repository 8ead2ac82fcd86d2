"""The parts of blocks, against their formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import variants
from models.layers import Norm
from models.products import activation, dense, heads_product


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_the_dense_product_has_the_gradients_of_jax(leading, dtype):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(*leading, 5)), dtype)
    weight = jnp.asarray(random.normal(size=(5, 4)), dtype)
    d_out = jnp.asarray(random.normal(size=(*leading, 4)), dtype)
    ours, theirs = (
        [out, *backward(d_out)]
        for out, backward in (jax.vjp(product, x, weight) for product in (dense, jnp.matmul))
    )
    bound = 1e-6 if dtype == jnp.float32 else 1e-2
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, dtype)
        np.testing.assert_allclose(
            mine.astype(jnp.float32), other.astype(jnp.float32), rtol=bound, atol=bound
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", ["btm,mhd->bthd", "bthd,mhd->btm"])
def test_products_with_heads_have_the_gradients_of_jax(spec, dtype):
    random = np.random.default_rng(0)
    sizes = dict(zip("btmhd", (2, 3, 5, 4, 6), strict=True))
    x, weight, d_out = (
        jnp.asarray(random.normal(size=[sizes[dim] for dim in term]), jnp.float32)
        for term in spec.replace("->", ",").split(",")
    )
    out, backward = jax.vjp(functools.partial(jnp.einsum, spec), x, weight)
    exact = out, *backward(d_out)
    factors = x.astype(dtype), weight.astype(dtype)
    out, backward = jax.vjp(functools.partial(heads_product, spec), *factors)
    bound = 1e-6 if dtype == jnp.float32 else 1e-2
    for found, expected in zip((out, *backward(d_out.astype(dtype))), exact, strict=True):
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        error = np.abs(found.astype(jnp.float32) - expected).max()
        assert error < bound * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("product", [dense, functools.partial(heads_product, "bm,md->bd")])
def test_a_policy_that_keeps_products_finds_them(product, dtype):
    x, weight = jnp.ones((3, 4), dtype), jnp.ones((4, 5), dtype)
    policy = jax.checkpoint_policies.dots_saveable
    layer = jax.checkpoint(lambda x, w: jnp.sin(product(x, w)).sum(), policy=policy)
    _, backward = jax.vjp(layer, x, weight)
    assert (3, 5) in [kept.shape for kept in jax.tree.leaves(backward)]


@pytest.mark.parametrize("function", [jax.nn.gelu, jax.nn.silu], ids=["gelu", "silu"])
def test_an_activation_in_bfloat16_is_rounded_once_on_cpus(function):
    x = jnp.linspace(-6, 6, 4001).astype(jnp.bfloat16)
    d_out = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.bfloat16)

    def both(function, x, d_out):
        out, backward = jax.vjp(function, x)
        return out, *backward(d_out)

    exact = both(function, x.astype(jnp.float32), d_out.astype(jnp.float32))
    found = jax.jit(functools.partial(both, functools.partial(activation, function)))(x, d_out)
    for mine, other in zip(found, exact, strict=True):
        rounded = other.astype(jnp.bfloat16).astype(jnp.float32)
        # A few lie so close to the middle of two that float32's last bits decide.
        assert np.mean(mine.astype(jnp.float32) != rounded) < 1e-3
        np.testing.assert_allclose(mine.astype(jnp.float32), other, rtol=2**-8, atol=1e-7)


def test_rotary_positions_turn_halves_against_each_other():
    """RoFormer (arXiv 2104.09864), eq. 34, as GPT-NeoX pairs the dims: i with i + D / 2."""
    random = np.random.default_rng(0)
    x, positions = random.normal(size=(2, 3, 2, 8)), np.array([[0, 1, 2], [5, 6, 900]])
    found = np.asarray(variants.rotary(jnp.asarray(x, jnp.float32), jnp.asarray(positions)))
    for i in range(4):
        turned = (x[..., i] + 1j * x[..., i + 4]) * np.exp(1j * positions * 10_000 ** (-i / 4))[
            ..., None
        ]
        np.testing.assert_allclose(found[..., i], turned.real, atol=1e-4)
        np.testing.assert_allclose(found[..., i + 4], turned.imag, atol=1e-4)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms(kind):
    random = np.random.default_rng(0)
    x, scale, bias = random.normal(3.0, 2.0, (4, 6)), random.normal(size=6), random.normal(size=6)
    norm = Norm(6, kind)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    centred = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale
    if kind == "layernorm":
        norm.bias[...] = jnp.asarray(bias, jnp.float32)
        expected += bias
    found = norm(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
