"""The decoder-only language model: tied embedding, one block scanned over its layers, final norm.

The paper names PAX and leaves much open. Of PAX's defaults are taken: sinusoidal positions added to
the embedding, which is scaled by sqrt(model dim), pre-norm, the same matrix for input and output,
the norms' epsilon. Not taken: its initialisation (Xavier's; here variances are 1 / fan-in), its
biases, weight decay of every tensor, and, unless a config asks for them, per-dim temperature and
its soft caps on logits, which configs/bert.py has.

Shapes: B batch, T positions, M model dim, V vocabulary, L layers.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import stack
from models.config import ModelConfig
from models.layers import Block, Norm

Array = jax.Array


class Decoder(nnx.Module):
    """Tokens to final hidden states; `logits` takes those to the vocabulary."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.model_dim)
        scale = 1 / math.sqrt(config.model_dim)
        self.embedding = nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.blocks = stack.stacked(Block, config, rngs)
        self.final_norm = Norm(config.model_dim, config.norm)

    def __call__(
        self,
        tokens_BT: Array,
        segment_ids_BT: Array | None = None,
        shared_segment: int | None = None,
        whole: Callable[[str, Any], Any] | None = None,
    ) -> tuple[Array, Array]:
        """Runs the blocks.

        Args:
          tokens_BT: (B, T) int32.
          segment_ids_BT: (B, T) int32; tokens attend within their segment and positions restart
            there.
          shared_segment: id of a segment at the row's beginning that those after it go on from,
            each by itself: they attend to it too, and their positions count from its end.
          whole: where the parameters are parts that devices share: from 'embedding' and its part,
            or 'blocks' and the parts of one layer, to the whole of it. The backward pass asks again
            in place of keeping it.

        Returns:
          (B, T, M) hidden states after the final norm, in the config's dtype, and per layer the
          attention range in nats, (L,) float32.
        """
        positions_BT = positions(tokens_BT.shape, segment_ids_BT, shared_segment)
        embedding_VM = self.embedding[...]
        if whole is not None:
            embedding_VM = whole("embedding", embedding_VM)
        x_BTM = embed(self.config, embedding_VM, tokens_BT, positions_BT)

        def call(block, x, layer):
            return block(x, layer, positions_BT, segment_ids_BT, shared_segment)

        x_BTM, ranges_L = stack.run(self.config, self.blocks, x_BTM, call, whole)
        return self.final_norm(x_BTM), ranges_L

    def logits(self, hidden_BTM: Array) -> Array:
        """(B, T, M) -> (B, T, V) float32, through the tied embedding."""
        with stack.product_precision(self.config):
            return output_logits(hidden_BTM, self.embedding[...], self.config.logits_soft_cap)


def embed(config: ModelConfig, embedding_VM: Array, tokens_BT: Array, positions_BT: Array) -> Array:
    """The first block's input, (B, T, M) in the config's dtype."""
    dtype = jnp.dtype(config.dtype)
    x_BTM = look_up(embedding_VM, tokens_BT).astype(dtype) * math.sqrt(config.model_dim)
    if config.positions == "sinusoidal":
        x_BTM += sinusoidal(positions_BT, config.model_dim).astype(dtype)
    return x_BTM


@jax.custom_vjp
def look_up(table_VM: Array, tokens_BT: Array) -> Array:
    """Rows of the table, (V, M), (B, T) int -> (B, T, M), whose gradient is summed in float32.

    A frequent token's gradient is a sum of thousands; in bfloat16 a small addend is lost beside a
    sum 256 times as large. The sum is rounded to the table's dtype once, at its end.
    """
    return table_VM[tokens_BT]


def _look_up_bwd(residuals, d_rows_BTM: Array) -> tuple[Array, None]:
    table_VM, tokens_BT = residuals
    sums_VM = jnp.zeros(table_VM.shape, jnp.float32)
    sums_VM = sums_VM.at[tokens_BT].add(d_rows_BTM.astype(jnp.float32))
    return sums_VM.astype(table_VM.dtype), None


look_up.defvjp(lambda table, tokens: (table[tokens], (table, tokens)), _look_up_bwd)


def output_logits(hidden: Array, embedding_VM: Array, soft_cap: float) -> Array:
    """hidden · embeddingᵀ accumulated in float32, then c · tanh(· / c) if soft_cap > 0.

    (..., M), (V, M) -> (..., V) float32.
    """
    logits = jnp.einsum(
        "...m,vm->...v",
        hidden,
        embedding_VM.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits


def positions(
    shape: tuple[int, ...], segment_ids_BT: Array | None, shared_segment: int | None = None
) -> Array:
    """Position of each token in its row, or in its segment if there are any. (B, T) int32.

    Those of segments that go on from a shared one count from its end.
    """
    index_BT = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    if segment_ids_BT is None:
        return index_BT
    starts = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    in_segment_BT = index_BT - jax.lax.cummax(jnp.where(starts, index_BT, 0), axis=1)
    if shared_segment is None:
        return in_segment_BT
    shared_BT = segment_ids_BT == shared_segment
    return in_segment_BT + jnp.where(shared_BT, 0, shared_BT.sum(axis=1, keepdims=True))


def sinusoidal(positions_BT: Array, dim: int) -> Array:
    """[sin | cos] at dim/2 wavelengths from 2π to 2π·10,000, as in PAX. (B, T) -> (B, T, dim)."""
    count = dim // 2
    frequency = jnp.exp(-math.log(10_000.0) * jnp.arange(count) / max(count - 1, 1))
    angle = positions_BT[:, :, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Matrix-product FLOPs of forward and backward pass per token.

    Causal attention counts half of the square, and recomputation not at all: the convention of the
    MFU that is reported here. The head of a BERT is counted for every token, as it is computed.
    """
    size = config.head_dim
    weights = config.num_layers * (config.attention_weights + config.mlp_weights)
    weights += config.vocab_size * config.model_dim
    maps = size // config.query_dim  # differential attention has two, each over the whole value
    seen = seq_len / 2 if config.causal else seq_len
    per_layer = config.num_heads * (size + maps * size) * seen
    return 6 * (weights + config.num_layers * per_layer)
