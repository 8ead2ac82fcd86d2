import jax
from flax import linen

from laser.dropins.flax import laser_attention

layer = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=laser_attention)
x = jax.random.normal(jax.random.key(1), (2, 10, 32))
mask = linen.make_causal_mask(x[..., 0])
params = layer.init(jax.random.key(0), x, mask=mask)
out = layer.apply(params, x, mask=mask)
