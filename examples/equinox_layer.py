import jax

from laser.dropins.equinox import MultiheadAttention

layer = MultiheadAttention(num_heads=4, query_size=32, key=jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (2, 10, 32))
out = jax.vmap(lambda example: layer(example, example, example, is_causal=True))(x)
