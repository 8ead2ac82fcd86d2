"""The Conformer (arXiv 2005.08100) as AlgoPerf has it: log-mel frames to logits for CTC.

Two convolutions of stride 2 take four frames to one position, sinusoidal positions are added, and
each block is half a feed-forward, self-attention, a convolution module, the other half, and a
LayerNorm. Recordings are padded to one length. Padding is a segment of its own for the attention,
so that LASER sees none of it; convolutions read 0 there, and batch norm counts the rest alone.

In training, batch norm takes the mean and variance over all rows of all devices, and the model
returns them. In evaluation it takes a mean and variance that lie among the parameters. No gradient
changes those two: the training step moves them towards the ones that it has measured (`moved`).

Dropout lies on the input and on the residual branches of the feed-forwards and the attention, drawn
as in vit.py. There is none on the convolution's branch, whose rate is 0 in AlgoPerf's config.

Shapes: B batch, F frames, C mel bins, T positions (F / 4 rounded up), M model dim, V vocabulary,
L blocks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from laser import attention as attn
from models import stack
from models.config import ConformerConfig
from models.decoder import sinusoidal
from models.layers import Attention, Parameters, with_bias
from models.vit import dropped

Array = jax.Array

BATCH_NORM_EPSILON = 1e-3
BLANK = 0  # of CTC; the tokenizer's padding
# Before and after the frames. At AlgoPerf's 1,998 that is "SAME", which is another one at another
# length; fixed, a recording's positions do not depend on what it is padded to.
TIME_PADDING = ((0, 2), (1, 1))


class Moments(NamedTuple):
    """Mean and variance of the channels of batch norm, (M,) or (L, M) float32 each."""

    mean: Array
    variance: Array


class Outputs(NamedTuple):
    """What the model says of a batch.

    Attributes:
      logits_BTV: float32.
      positions_B: int32, those of each recording; what lies beyond is padding.
      moments: those that batch norm used, (L, M) each.
      ranges_L: the attention range of each block in nats.
    """

    logits_BTV: Array
    positions_B: Array
    moments: Moments
    ranges_L: Array


class Context(NamedTuple):
    """What the blocks of a batch share.

    Attributes:
      valid_BT: whether a position belongs to a recording.
      noise_B: (B,) uint32, what dropout follows from; None in evaluation.
      total: sums over the devices that share the batch.
    """

    valid_BT: Array
    noise_B: Array | None
    total: Callable[[Any], Any]


class Dense(nnx.Module):
    """x · kernel + bias over the last dims of x, with xavier-uniform weights."""

    def __init__(self, rngs: nnx.Rngs, inputs: tuple[int, ...], outputs: int):
        xavier = jax.nn.initializers.xavier_uniform()
        kernel = xavier(rngs.params(), (math.prod(inputs), outputs), jnp.float32)
        self.kernel = nnx.Param(kernel.reshape(*inputs, outputs))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Array, dtype: Any = None) -> Array:
        """x · kernel + bias in `dtype`, by default that of x."""
        kernel = self.kernel[...].astype(x.dtype)
        out = jnp.tensordot(x, kernel, kernel.ndim - 1, preferred_element_type=dtype)
        return with_bias(out, self.bias)


class OffsetNorm(nnx.Module):
    """LayerNorm as in models.layers.Norm, of scale 1 + offset: decay takes it to 1, not to 0."""

    def __init__(self, dim: int):
        self.offset = nnx.Param(jnp.zeros(dim))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, x: Array) -> Array:
        return attn.qk_norm(x, 1 + self.offset[...], self.bias[...])


class FeedForward(nnx.Module):
    """down(swish(up(norm(x)))). AlgoPerf masks padding within; no valid position reads it."""

    def __init__(self, config: ConformerConfig, rngs: nnx.Rngs):
        self.norm = OffsetNorm(config.model_dim)
        self.up = Dense(rngs, (config.model_dim,), config.mlp_dim)
        self.down = Dense(rngs, (config.mlp_dim,), config.model_dim)

    def __call__(self, x_BTM: Array) -> Array:
        return self.down(jax.nn.swish(self.up(self.norm(x_BTM))))


class BatchNorm(nnx.Module):
    """Normalises every channel by its moments over the valid positions of all devices."""

    def __init__(self, dim: int):
        self.offset = nnx.Param(jnp.zeros(dim))  # of the scale, as in `OffsetNorm`
        self.bias = nnx.Param(jnp.zeros(dim))
        self.mean = nnx.Param(jnp.zeros(dim))
        self.variance = nnx.Param(jnp.ones(dim))

    def __call__(self, x_BTM: Array, context: Context) -> tuple[Array, Moments]:
        """x, normalised by its own moments in evaluation, else by those of the batch; and these."""
        x32 = x_BTM.astype(jnp.float32)
        if context.noise_B is None:
            moments = Moments(self.mean[...], self.variance[...])
        else:
            valid_BT1 = context.valid_BT[..., None].astype(jnp.float32)
            count = jnp.maximum(context.total(valid_BT1.sum()), 1)
            mean = context.total((x32 * valid_BT1).sum((0, 1))) / count
            squares = context.total((jnp.square(x32 - mean) * valid_BT1).sum((0, 1)))
            moments = Moments(mean, squares / count)
        y = (x32 - moments.mean) * jax.lax.rsqrt(moments.variance + BATCH_NORM_EPSILON)
        return (y * (1 + self.offset[...]) + self.bias[...]).astype(x_BTM.dtype), moments


class Convolution(nnx.Module):
    """Gate, depthwise convolution over time, batch norm, swish and a projection."""

    def __init__(self, config: ConformerConfig, rngs: nnx.Rngs):
        dim = config.model_dim
        self.norm = OffsetNorm(dim)
        self.value = Dense(rngs, (dim,), dim)
        self.gate = Dense(rngs, (dim,), dim)
        xavier = jax.nn.initializers.xavier_uniform()
        self.kernel = nnx.Param(xavier(rngs.params(), (config.kernel_size, 1, dim)))
        self.batch_norm = BatchNorm(dim)
        self.output = Dense(rngs, (dim,), dim)

    def __call__(self, x_BTM: Array, context: Context) -> tuple[Array, Moments]:
        x_BTM = self.norm(x_BTM)
        x_BTM = self.value(x_BTM) * jax.nn.sigmoid(self.gate(x_BTM))
        x_BTM = jax.lax.conv_general_dilated(
            x_BTM * context.valid_BT[..., None].astype(x_BTM.dtype),
            self.kernel[...].astype(x_BTM.dtype),
            window_strides=(1,),
            padding="SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=x_BTM.shape[-1],
        )
        x_BTM, moments = self.batch_norm(x_BTM, context)
        return self.output(jax.nn.swish(x_BTM)), moments


class Block(nnx.Module):
    """Half a feed-forward, attention, convolution, the other half; LayerNorm."""

    def __init__(self, config: ConformerConfig, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.first = FeedForward(config, rngs)
        self.attention_norm = OffsetNorm(config.model_dim)
        self.attention = Attention(config, rngs)
        self.convolution = Convolution(config, rngs)
        self.second = FeedForward(config, rngs)
        self.norm = OffsetNorm(config.model_dim)

    def __call__(
        self, x_BTM: Array, layer: Array, context: Context
    ) -> tuple[Array, tuple[Moments, Array]]:
        """(B, T, M) to (B, T, M), and the moments of batch norm and the attention range."""

        def drop(x, place):
            return dropped(x, self.dropout, context.noise_B, 3 * layer + place)

        x_BTM += 0.5 * drop(self.first(x_BTM), 1)
        out_BTM, range_nats = self.attention(
            self.attention_norm(x_BTM), layer, None, context.valid_BT.astype(jnp.int32)
        )
        x_BTM += drop(out_BTM, 2)
        out_BTM, moments = self.convolution(x_BTM, context)
        x_BTM += out_BTM
        x_BTM += 0.5 * drop(self.second(x_BTM), 3)
        return self.norm(x_BTM), (moments, range_nats)


class HalvingConvolution(nnx.Module):
    """3 x 3 convolution of stride 2 over frames and bins, and ReLU."""

    def __init__(self, rngs: nnx.Rngs, channels: int, outputs: int):
        xavier = jax.nn.initializers.xavier_uniform()
        self.kernel = nnx.Param(xavier(rngs.params(), (3, 3, channels, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Array, time_padding: tuple[int, int]) -> Array:
        """(B, F, C, channels) -> (B, F / 2, C / 2, outputs), both rounded up."""
        x = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(2, 2),
            padding=(time_padding, (x.shape[2] % 2, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(with_bias(x, self.bias))


class Subsampling(nnx.Module):
    """(B, F, C) to (B, T, M): two halving convolutions and a projection."""

    def __init__(self, config: ConformerConfig, rngs: nnx.Rngs):
        dim = config.model_dim
        self.first = HalvingConvolution(rngs, 1, dim)
        self.second = HalvingConvolution(rngs, dim, dim)
        self.output = Dense(rngs, (num_positions(config.mel_bins), dim), dim)

    def __call__(self, features_BFC: Array, frames_B: Array) -> tuple[Array, Array]:
        """(B, T, M), and how many positions belong to each recording, (B,)."""
        valid_BF = within(features_BFC.shape[1], frames_B)
        x = jnp.where(valid_BF[..., None], features_BFC, 0)[..., None]
        for convolution, padding in zip((self.first, self.second), TIME_PADDING, strict=True):
            frames_B = (frames_B + 1) // 2
            x = convolution(x, padding)
            x *= within(x.shape[1], frames_B)[..., None, None].astype(x.dtype)
        return self.output(x), frames_B


class Conformer(nnx.Module):
    """Features to logits."""

    def __init__(self, config: ConformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.subsampling = Subsampling(config, rngs)
        self.blocks = stack.stacked(Block, config, rngs)
        self.final_norm = OffsetNorm(config.model_dim)
        self.head = Dense(rngs, (config.model_dim,), config.vocab_size)

    def __call__(
        self,
        features_BFC: Array,
        frames_B: Array,
        noise_B: Array | None = None,
        whole: Callable[[str, Any], Any] | None = None,
        total: Callable[[Any], Any] = lambda x: x,
    ) -> Outputs:
        """Runs the blocks.

        Args:
          features_BFC: (B, F, C); what lies beyond a recording's frames is not read.
          frames_B: (B,) int32, frames of each recording; 0 for a row without any.
          noise_B: (B,) uint32, what each row's dropout follows from. None in evaluation, which has
            no dropout, and where batch norm goes by its own moments.
          whole: where the parameters are parts that devices share: from a name and its part to the
            whole of it, as in models/decoder.py.
          total: sums over the devices that share the batch.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)

        def module(name):
            part = getattr(self, name)
            if whole is None:
                return part
            return nnx.merge(nnx.graphdef(part), whole(name, nnx.to_pure_dict(nnx.state(part))))

        x_BTM, positions_B = module("subsampling")(features_BFC.astype(dtype), frames_B)
        x_BTM += sinusoidal(jnp.arange(x_BTM.shape[1])[None], config.model_dim).astype(dtype)
        x_BTM = dropped(x_BTM, config.dropout, noise_B, 0)
        context = Context(within(x_BTM.shape[1], positions_B), noise_B, total)

        def call(block, x, layer):
            return block(x, layer, context)

        x_BTM, (moments, ranges_L) = stack.run(config, self.blocks, x_BTM, call, whole)
        logits_BTV = module("head")(self.final_norm(x_BTM), jnp.float32)
        return Outputs(logits_BTV, positions_B, moments, ranges_L)


def within(length: int, lengths_B: Array) -> Array:
    """(B, length) bool: what lies within each row's own length."""
    return jnp.arange(length)[None] < lengths_B[:, None]


def num_positions(frames: int) -> int:
    """Positions that the subsampling makes of so many frames."""
    return -(-frames // ConformerConfig.subsampling)


def moved(
    config: ConformerConfig, old: Parameters, new: Parameters, moments: Moments
) -> Parameters:
    """The new parameters, with batch norm's own moments between the old and those of a step.

    Args:
      config: of the model.
      old: parameters before the step.
      new: after the optimizer's update.
      moments: (L, M) each, those that the step used.
    """

    def move(path, old, new):
        name = path[-1].key
        if "batch_norm" not in (key.key for key in path) or name not in Moments._fields:
            return new
        keep = config.batch_norm_momentum
        return keep * old + (1 - keep) * getattr(moments, name)

    return jax.tree_util.tree_map_with_path(move, old, new)


def train_flops_per_token(config: ConformerConfig, seq_len: int) -> float:
    """Matrix-product FLOPs of forward and backward pass per frame of rows of so many frames.

    Convolutions count as products, recomputation not at all.
    """
    dim, size = config.model_dim, config.head_dim
    maps = size // config.query_dim  # differential attention has two, each over the whole value
    per_layer = 4 * dim * config.mlp_dim + 4 * dim * dim  # feed-forwards, attention's projections
    per_layer += 3 * dim * dim + config.kernel_size * dim  # convolution module
    per_layer += config.num_heads * (size + maps * size) * num_positions(seq_len)
    per_position = config.num_layers * per_layer + dim * config.vocab_size
    per_position += num_positions(config.mel_bins) * (9 + 1) * dim * dim  # second, projection
    first = -(-config.mel_bins // 2) * 9 * dim
    return 6 * (per_position / config.subsampling + first / 2)
