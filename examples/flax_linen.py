import functools

import jax
from flax import linen

from laser.dropins.flax import laser_attention

causal = functools.partial(laser_attention, is_causal=True)
layer = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=causal)
x = jax.random.normal(jax.random.key(1), (2, 10, 32))
params = layer.init(jax.random.key(0), x)
out = layer.apply(params, x)
