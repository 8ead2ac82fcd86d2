"""The vision transformer (arXiv 2010.11929) in the form of AlgoPerf's ImageNet workload.

Patches that do not overlap, projected; a fixed table of sines and cosines of the two directions
(MoCo v3, arXiv 2104.02057); pre-norm blocks whose dense layers have biases; the final norm; the
mean over the tokens, without one of its own for the class; a dense layer with tanh ("pre_logits"),
and a head that starts at 0 (arXiv 2205.01580 has the same, without pre_logits). An image of 224
in patches of 16 is 196 tokens.

Dropout is where AlgoPerf has it: on the embedded patches, in the MLP, and on what attention and MLP
add; not on the attention's probabilities. Its masks follow from a number that comes with each
image, so that no layout of devices changes them.

Shapes: B batch, I side of an image, P side of a patch, T patches, M model dim, K classes, L layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import stack
from models.config import VitConfig
from models.layers import Attention, Mlp, Norm, Parameters, dense_param

Array = jax.Array

MAX_WAVELENGTH = 10_000.0


class Dense(nnx.Module):
    """x · kernel + bias, added up in float32. Starts as LeCun's normal or at 0, the bias at 0."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs | None):
        shape = (inputs, outputs)
        self.kernel = dense_param(rngs, shape, inputs) if rngs else nnx.Param(jnp.zeros(shape))
        self.bias = nnx.Param(jnp.zeros(outputs))


def project(x: Array, params: Parameters, dtype: jnp.dtype) -> Array:
    """(..., inputs) to (..., outputs) float32 by the parameters of a `Dense`."""
    kernel = params["kernel"].astype(dtype)
    out = jnp.einsum("...i,io->...o", x.astype(dtype), kernel, preferred_element_type=jnp.float32)
    return out + params["bias"]


class EncoderBlock(nnx.Module):
    """Pre-norm block, every token seeing all: x + attention(norm(x)), then x + mlp(norm(x)).

    Not a `Block`, whose ways to be called know no dropout, though it has the same parameters.
    """

    def __init__(self, config: VitConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(config.model_dim, config.norm)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config.model_dim, config.norm)
        self.mlp = Mlp(config, rngs)
        self.dropout = config.dropout

    def __call__(self, x_BTM: Array, layer: Array, noise_B: Array | None) -> tuple[Array, Array]:
        """(B, T, M) to (B, T, M), and the attention range; dropout if there is noise."""

        def drop(x, place):
            return dropped(x, self.dropout, noise_B, 3 * layer + place)

        out_BTM, range_nats = self.attention(self.attention_norm(x_BTM), layer, None, None)
        x_BTM += drop(out_BTM, 1)
        hidden_BTF = drop(self.mlp.hidden(self.mlp_norm(x_BTM)), 2)
        return x_BTM + drop(self.mlp.output(hidden_BTF), 3), range_nats


class Vit(nnx.Module):
    """Images to logits of classes."""

    def __init__(self, config: VitConfig, rngs: nnx.Rngs):
        self.config = config
        dim = config.model_dim
        self.patches = Dense(config.patch_values, dim, rngs)
        self.blocks = stack.stacked(EncoderBlock, config, rngs)
        self.final_norm = Norm(dim, config.norm)
        self.pre_logits = Dense(dim, dim, rngs)
        self.head = Dense(dim, config.num_classes, None)

    def __call__(
        self,
        images_BIIC: Array,
        noise_B: Array | None = None,
        whole: Callable[[str, Any], Any] | None = None,
    ) -> tuple[Array, Array]:
        """Classifies images.

        Args:
          images_BIIC: (B, I, I, 3), of mean 0 and standard deviation 1 or so.
          noise_B: (B,) uint32, what each image's dropout follows from; None for none.
          whole: where the parameters are parts that devices share: from a name and its part to the
            whole of it, as in models/decoder.py.

        Returns:
          (B, K) logits, float32, and per layer the attention range in nats, (L,) float32.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)

        def dense(name, x):
            params = nnx.to_pure_dict(nnx.state(getattr(self, name)))
            return project(x, params if whole is None else whole(name, params), dtype)

        x_BTM = dense("patches", patches(images_BIIC, config.patch_size))
        side = config.image_size // config.patch_size
        x_BTM += sincos_2d(side, side, config.model_dim)
        x_BTM = dropped(x_BTM.astype(dtype), config.dropout, noise_B, 0)

        def call(block, x, layer):
            return block(x, layer, noise_B)

        x_BTM, ranges_L = stack.run(config, self.blocks, x_BTM, call, whole)
        mean_BM = self.final_norm(x_BTM).astype(jnp.float32).mean(axis=1)
        return dense("head", jnp.tanh(dense("pre_logits", mean_BM))), ranges_L


def patches(images_BIIC: Array, size: int) -> Array:
    """(B, I, I, C) to (B, T, size · size · C): patches, pixels row by row, colours last."""
    batch, side, _, colours = images_BIIC.shape
    count = side // size
    x = images_BIIC.reshape(batch, count, size, count, size, colours)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, count * count, size * size * colours)


def sincos_2d(height: int, width: int, dim: int) -> np.ndarray:
    """[sin x | cos x | sin y | cos y] of every patch, (height · width, dim) float32.

    Each has dim/4 wavelengths, from 2π patches to 2π · 10,000.
    """
    y, x = np.mgrid[:height, :width]
    frequency = MAX_WAVELENGTH ** -(np.arange(dim // 4) / (dim // 4 - 1))
    angles = [place.reshape(-1, 1) * frequency for place in (x, y)]
    table = [f(angle) for angle in angles for f in (np.sin, np.cos)]
    return np.concatenate(table, axis=1).astype(np.float32)


def dropped(x_BTN: Array, rate: float, noise_B: Array | None, place: Array | int) -> Array:
    """x with entries at 0 with probability `rate`, and the others divided by 1 - rate.

    Args:
      x_BTN: (B, T, N).
      rate: at least 0, below 1.
      noise_B: (B,) uint32; None for no dropout.
      place: int, another for every use in the model.
    """
    if noise_B is None or rate == 0:
        return x_BTN

    def keep(noise):
        key = jax.random.fold_in(jax.random.key(noise), place)
        return jax.random.bernoulli(key, 1 - rate, x_BTN.shape[1:])

    return jnp.where(jax.vmap(keep)(noise_B), x_BTN / (1 - rate), 0)


def train_flops_per_token(config: VitConfig, seq_len: int) -> float:
    """Matrix-product FLOPs of forward and backward pass per patch; recomputation is not counted."""
    size = config.head_dim
    weights = config.num_layers * (config.attention_weights + config.mlp_weights)
    maps = size // config.query_dim  # differential attention has two, each over the whole value
    square = config.num_layers * config.num_heads * (size + maps * size) * seq_len
    per_image = config.model_dim * (config.model_dim + config.num_classes)
    return 6 * (weights + config.patch_values * config.model_dim + square + per_image / seq_len)
