"""The product of dense layers, whose gradients are written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import dense


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
