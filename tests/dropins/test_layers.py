"""Layers of Flax and Equinox with LASER in them, beside the formula between their projections."""

import functools
import re

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from laser.attention import dot_product_attention, interface
from laser.dropins.equinox import MultiheadAttention
from laser.dropins.flax import laser_attention
from tests.attention.test_kernels import described_mesh

B, T, HEADS, SIZE = 2, 10, 4, 32
CAUSAL = jnp.tril(jnp.ones((T, T), bool))
formula = functools.partial(dot_product_attention, kind="laser", implementation="reference")


@pytest.fixture(scope="module")
def x():
    return 3 * jax.random.normal(jax.random.key(1), (B, T, SIZE))


def nnx_layer(**options):
    return nnx.MultiHeadAttention(
        HEADS, SIZE, attention_fn=laser_attention, rngs=nnx.Rngs(0), **{"decode": False, **options}
    )


def close(found, wanted):
    """Beside the largest of all: the gradient of a key's bias is 0 but for rounding."""
    largest = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(wanted))
    jax.tree.map(
        lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-5 * largest), found, wanted
    )


@pytest.mark.slow  # compiles gradients
def test_nnx(x):
    layer = nnx_layer()
    graph, params = nnx.split(layer)

    def loss(params, attention):
        layer = nnx.merge(graph, params)
        out = attention(layer.query(x), layer.key(x), layer.value(x), None, CAUSAL)
        return (layer.out(out) ** 2).sum()

    def layers_loss(params):
        return (nnx.merge(graph, params)(x, mask=CAUSAL[None, None]) ** 2).sum()

    wanted = jax.value_and_grad(lambda params: loss(params, formula))(params)
    close(jax.value_and_grad(layers_loss)(params), wanted)
    close(layer(x, is_causal=True), layer(x, mask=CAUSAL[None, None]))
    # Several dims of the batch, and none.
    wide = x.reshape(B, 1, T, SIZE)
    close(layer(wide, mask=CAUSAL[None, None, None])[:, 0], layer(x, is_causal=True))
    close(layer(x[0], mask=CAUSAL[None]), layer(x, is_causal=True)[0])
    # One mask for each example, through two dims of the batch.
    masks = jnp.arange(T) < jnp.array([T, 6])[:, None, None, None]
    oracle = nnx_layer()
    oracle.attention_fn = lambda q, k, v, mask, **_: formula(q, k, v, None, mask)
    close(layer(wide, mask=masks[:, None])[:, 0], oracle(x, mask=masks))


def test_nnx_decodes(x):
    layer = nnx_layer(decode=True)
    layer.init_cache(x.shape)
    step = nnx.jit(lambda layer, token: layer(token))
    steps = [step(layer, x[:, t : t + 1]) for t in range(T)]
    close(jnp.concatenate(steps, axis=1), nnx_layer()(x, mask=CAUSAL[None, None]))


def test_linen_and_its_decoding(x):
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=laser_attention)
    params = layer.init(jax.random.key(0), x)

    def by_hand(query, key, value, mask=None, **_):
        return formula(query, key, value, None, mask)

    mask = CAUSAL[None, None]
    oracle = layer.clone(attention_fn=by_hand)
    wanted = oracle.apply(params, x, mask=mask)
    close(layer.apply(params, x, mask=mask), wanted)
    decoder = layer.clone(decode=True)
    cache = decoder.init(jax.random.key(0), x)["cache"]
    step = jax.jit(lambda variables, token: decoder.apply(variables, token, mutable=["cache"]))
    for t in range(T):
        out, updated = step({**params, "cache": cache}, x[:, t : t + 1])
        cache = updated["cache"]
        close(out[:, 0], wanted[:, t])


@pytest.mark.slow  # compiles gradients
def test_equinox(x):
    layer = MultiheadAttention(HEADS, SIZE, key=jax.random.key(0))
    theirs = equinox.nn.MultiheadAttention(HEADS, SIZE, key=jax.random.key(0))
    assert jax.tree.structure(jax.tree.leaves(layer)) == jax.tree.structure(jax.tree.leaves(theirs))

    def by_hand(layer, x):
        heads = (
            jax.vmap(projection)(x).reshape(1, T, HEADS, -1)
            for projection in (layer.query_proj, layer.key_proj, layer.value_proj)
        )
        return jax.vmap(layer.output_proj)(formula(*heads, mask=CAUSAL).reshape(T, SIZE))

    def ours(layer, x):
        return layer(x, x, x, mask=CAUSAL)

    def loss(layer, function):
        return (jax.vmap(lambda x: function(layer, x))(x) ** 2).sum()

    wanted = equinox.filter_grad(loss)(layer, by_hand)
    close(equinox.filter_grad(loss)(layer, ours), wanted)
    each = jax.vmap(
        lambda x: equinox.filter_grad(lambda layer: (ours(layer, x) ** 2).sum())(layer)
    )(x)
    close(jax.tree.map(lambda g: g.sum(0), each), wanted)
    masks = jnp.stack([CAUSAL] * HEADS).at[0].set(True)
    close(layer(x[0], x[0], x[0], mask=masks)[-1], ours(layer, x[0])[-1])
    close(layer(x[0], x[1], x[1], process_heads=lambda q, k, v: (q, k, v))[0],
          layer(x[0, :1], x[1], x[1])[0])  # fmt: skip


def test_a_causal_layer_is_for_the_kernel_and_not_for_a_cache(x, caplog):
    """What docs/drop-ins.md says of `is_causal`, and of a mask."""
    causal = functools.partial(laser_attention, is_causal=True)
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=causal)
    params = layer.init(jax.random.key(0), x)
    masked = layer.clone(attention_fn=laser_attention)
    close(layer.apply(params, x), masked.apply(params, x, mask=CAUSAL[None, None]))
    calls = {
        "pallas": lambda: layer.apply(params, x),
        "chunked": lambda: masked.apply(params, x, mask=CAUSAL[None, None]),
    }
    with caplog.at_level("INFO", "laser.attention"):
        for name, call in calls.items():
            interface._log_choice.cache_clear()
            with jax.sharding.use_abstract_mesh(described_mesh("tpu")):
                jax.eval_shape(call)
            assert f"laser attention on tpu: {name}" in caplog.messages[-1]
    decoder = layer.clone(decode=True)
    cache = decoder.init(jax.random.key(0), x)
    refuse(
        lambda: decoder.apply({**params, "cache": cache["cache"]}, x[:, :1], mutable=["cache"]),
        f"is_causal=True of 1 queries over {T} keys",
    )


def test_a_causal_layer_of_equinox_is_for_the_kernel(x, caplog):
    layer = MultiheadAttention(HEADS, SIZE, key=jax.random.key(0))

    def values_and_gradient(x, **options):
        out, vjp = jax.vjp(jax.vmap(lambda x: layer(x, x, x, **options)), x)
        return out, *vjp(jnp.sin(out))

    found = jax.jit(functools.partial(values_and_gradient, is_causal=True))(x)
    close(found, jax.jit(functools.partial(values_and_gradient, mask=CAUSAL))(x))
    for name, options in (("pallas", {"is_causal": True}), ("chunked", {"mask": CAUSAL})):
        interface._log_choice.cache_clear()
        with (
            caplog.at_level("INFO", "laser.attention"),
            jax.sharding.use_abstract_mesh(described_mesh("tpu")),
        ):
            jax.eval_shape(functools.partial(values_and_gradient, **options), x)
        assert f"laser attention on tpu: {name}" in caplog.messages[-1]


def test_under_vmap_the_exact_path_is_a_choice(x):
    layer = MultiheadAttention(HEADS, SIZE, key=jax.random.key(0))
    batched = jax.vmap(lambda x: layer(x, x, x))
    assert re.search(r"\bcond\[", str(jax.make_jaxpr(batched)(x)))
    assert re.search(r"\bcond\[", str(jax.make_jaxpr(jax.grad(lambda x: batched(x).sum()))(x)))


def refuse(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


def test_what_laser_has_not_is_named(x):
    rngs = nnx.Rngs(0)
    refuse(lambda: nnx_layer(dropout_rate=0.1)(x, deterministic=False, rngs=rngs), "dropout_rate")
    refuse(lambda: nnx_layer()(x, sow_weights=True), "sow_weights")
    refuse(lambda: nnx_layer(precision="highest")(x), "precision='highest'")
    assert nnx_layer(dropout_rate=0.1)(x, deterministic=True).shape == x.shape
    layer = linen.MultiHeadDotProductAttention(
        HEADS, dropout_rate=0.1, deterministic=False, attention_fn=laser_attention
    )
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    refuse(lambda: layer.init(keys, x), "dropout_rate=0.1")
    einsum = linen.MultiHeadDotProductAttention(
        HEADS, qk_attn_weights_einsum_cls=lambda: jnp.einsum, attention_fn=laser_attention,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )  # fmt: skip
    refuse(lambda: einsum.init(keys, x), "qk_attn_weights_einsum")
    dropped = MultiheadAttention(HEADS, SIZE, dropout_p=0.1, key=jax.random.key(0))
    refuse(lambda: dropped(x[0], x[0], x[0]), "dropout_p=0.1")
    assert dropped(x[0], x[0], x[0], inference=True).shape == x[0].shape
