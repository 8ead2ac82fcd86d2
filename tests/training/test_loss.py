"""The chunked cross-entropy against the plain one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.training.loss import TOKENS_PER_CHUNK, chunk_length, cross_entropy

B, T, M, V = 3, 8, 6, 11


def plain(hidden, embedding, targets, weights, soft_cap, z_loss):
    logits = hidden @ embedding.T
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return jnp.sum(weights * (nll + z_loss * z)), jnp.sum(weights * nll)


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    return (
        jnp.float32(rng.normal(size=(B, T, M))),
        jnp.float32(rng.normal(size=(V, M))),
        jnp.int32(rng.integers(0, V, (B, T))),
        jnp.float32(rng.random((B, T)) < 0.7),
    )


@pytest.mark.parametrize("chunk", [1, 2, 8])
@pytest.mark.parametrize(("soft_cap", "z_loss"), [(0.0, 0.0), (3.0, 0.0), (0.0, 0.1), (3.0, 0.1)])
def test_equals_the_plain_form(inputs, soft_cap, z_loss, chunk):
    hidden, embedding, *rest = inputs

    def ours(hidden, embedding):
        return cross_entropy(hidden, embedding, *rest, soft_cap, z_loss, chunk)

    def theirs(hidden, embedding):
        return plain(hidden, embedding, *rest, soft_cap, z_loss)

    np.testing.assert_allclose(ours(hidden, embedding), theirs(hidden, embedding), rtol=1e-5)
    for scale in (1.0, 0.25):  # the cotangent of the sum reaches both gradients
        actual = jax.grad(lambda h, e, s=scale: s * ours(h, e)[0], argnums=(0, 1))(
            hidden, embedding
        )
        expected = jax.grad(lambda h, e, s=scale: s * theirs(h, e)[0], argnums=(0, 1))(
            hidden, embedding
        )
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6)


def test_value_with_and_without_gradient_is_the_same(inputs):
    def loss(hidden):
        return cross_entropy(hidden, *inputs[1:], 0.0, 0.1, 2)

    value, _ = jax.vjp(loss, inputs[0])
    np.testing.assert_array_equal(value, loss(inputs[0]))


def test_padding_has_no_gradient(inputs):
    hidden, embedding, targets, weights = inputs
    gradient = jax.grad(lambda h: cross_entropy(h, embedding, targets, weights, 0.0, 0.1, 4)[0])(
        hidden
    )
    assert np.all(np.asarray(gradient)[np.asarray(weights) == 0] == 0)
    assert np.all(np.any(np.asarray(gradient)[np.asarray(weights) == 1] != 0, axis=-1))


def test_chunks_divide_the_row():
    for batch, length in [(8, 256), (1, 1000), (1024, 1024), (3, 7), (2048, 1)]:
        chunk = chunk_length(batch, length)
        assert length % chunk == 0
        assert chunk == 1 or batch * chunk <= TOKENS_PER_CHUNK
        larger = [size for size in range(chunk + 1, length + 1) if length % size == 0]
        assert not larger or batch * larger[0] > TOKENS_PER_CHUNK
