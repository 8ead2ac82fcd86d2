import jax
from flax import nnx

from laser.dropins.flax import laser_attention

layer = nnx.MultiHeadAttention(
    num_heads=4, in_features=32, decode=False, attention_fn=laser_attention, rngs=nnx.Rngs(0)
)
x = jax.random.normal(jax.random.key(1), (2, 10, 32))
out = layer(x, is_causal=True)  # on a TPU by the fused kernel; a mask takes XLA's path
