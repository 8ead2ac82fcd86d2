"""The parts of a block: norm, MLP, and the attention layer that owns the variant's parameters.

Parameters are float32 and are cast to the activations' dtype where they are used; norms compute in
float32. No dense layer has a bias (the paper's parameter counts leave no room to tell), norms have
scale and bias. Dense weights start as truncated normals of variance 1 / fan-in.

Shapes: B batch, T positions, M model dim, F MLP dim, H heads, D head dim, Q query dim.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from laser import attention as attn
from models.config import ModelConfig

Array = jax.Array


def dense_param(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """A float32 weight of variance 1 / fan_in."""
    # 0.8796 is the standard deviation of a unit normal truncated at two standard deviations.
    scale = 1 / math.sqrt(fan_in) / 0.87962566
    return nnx.Param(scale * jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32))


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last dim, in float32, with epsilon 1e-6 as in PAX."""

    def __init__(self, dim: int, kind: str):
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim)) if kind == "layernorm" else None

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6) * self.scale[...]
        if self.bias is not None:
            y += self.bias[...]
        return y.astype(x.dtype)


class Mlp(nnx.Module):
    """down(gelu(up(x))), GELU in its tanh form."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.up = dense_param(rngs, (config.model_dim, config.mlp_dim), config.model_dim)
        self.down = dense_param(rngs, (config.mlp_dim, config.model_dim), config.mlp_dim)

    def __call__(self, x_BTM: Array) -> Array:
        hidden_BTF = jax.nn.gelu(x_BTM @ self.up[...].astype(x_BTM.dtype), approximate=True)
        return hidden_BTF @ self.down[...].astype(x_BTM.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention of any variant.

    Differential attention splits each head's query and key in two of half the size and keeps the
    value whole, so all variants have projections of the same shape.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        heads, size, dim = config.num_heads, config.head_dim, config.model_dim
        query_dim = config.query_dim
        self.query = dense_param(rngs, (dim, heads, size), dim)
        self.key = dense_param(rngs, (dim, heads, size), dim)
        self.value = dense_param(rngs, (dim, heads, size), dim)
        self.output = dense_param(rngs, (dim, heads, size), heads * size)
        variant = config.attention
        if variant.per_dim_temp:
            self.log_temperature = nnx.Param(jnp.zeros(query_dim))
        if variant.qk_norm:
            self.query_norm = Norm(query_dim, "layernorm")
            self.key_norm = Norm(query_dim, "layernorm")
        if variant.diff == "official":
            # Four vectors of standard deviation 0.1, shared by the heads (arXiv 2410.05258).
            self.lambda_vectors = nnx.Param(0.1 * jax.random.normal(rngs.params(), (4, query_dim)))
            self.output_norm_scale = nnx.Param(jnp.ones(size))
        elif variant.diff == "scalar":
            self.lambda_scalar = nnx.Param(jnp.zeros(()))

    def __call__(
        self, x_BTM: Array, layer: Array, positions_BT: Array, segment_ids_BT: Array | None
    ) -> tuple[Array, Array]:
        """Returns (B, T, M) and the attention range in nats, see `laser.attention.attention`."""

        def project(weight):
            return jnp.einsum("btm,mhd->bthd", x_BTM, weight[...].astype(x_BTM.dtype))

        value = project(self.value)
        pairs = zip(self._split(project(self.query)), self._split(project(self.key)), strict=True)
        outputs, ranges = zip(
            *(self._attend(q, k, value, positions_BT, segment_ids_BT) for q, k in pairs),
            strict=True,
        )
        out = outputs[0] if len(outputs) == 1 else self._difference(outputs, layer)
        out_BTM = jnp.einsum("bthd,mhd->btm", out, self.output[...].astype(x_BTM.dtype))
        return out_BTM, functools.reduce(jnp.maximum, ranges)

    def _split(self, x_BTHD: Array) -> list[Array]:
        return jnp.split(x_BTHD, self.config.head_dim // self.config.query_dim, axis=-1)

    def _attend(self, query, key, value, positions_BT, segment_ids_BT):
        variant = self.config.attention
        if self.config.positions == "rotary":
            query, key = attn.rotary(query, positions_BT), attn.rotary(key, positions_BT)
        if variant.qk_norm:
            query = attn.qk_norm(query, self.query_norm.scale[...], self.query_norm.bias[...])
            key = attn.qk_norm(key, self.key_norm.scale[...], self.key_norm.bias[...])
        if variant.per_dim_temp:
            query = attn.per_dim_temperature(query, self.log_temperature[...])
        return attn.attention(
            query,
            key,
            value,
            kind=variant.kind,
            logits_scale=1 / (variant.temperature * math.sqrt(self.config.query_dim)),
            segment_ids=segment_ids_BT,
            logits_soft_cap=variant.soft_cap,
            implementation=variant.implementation,
            return_range=True,
        )

    def _difference(self, outputs: tuple[Array, ...], layer: Array) -> Array:
        first, second = outputs
        initial = attn.lambda_init(layer)
        if self.config.attention.diff == "scalar":
            return attn.differential(first, second, self.lambda_scalar[...] + initial)
        lambda_ = attn.lambda_official(self.lambda_vectors[...], initial)
        difference = attn.differential(first, second, lambda_)
        return attn.head_norm(difference, self.output_norm_scale[...], initial)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(config.model_dim, config.norm)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config.model_dim, config.norm)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x_BTM: Array, layer: Array, positions_BT: Array, segment_ids_BT: Array | None
    ) -> tuple[Array, Array]:
        out, range_nats = self.attention(
            self.attention_norm(x_BTM), layer, positions_BT, segment_ids_BT
        )
        x_BTM += out
        return x_BTM + self.mlp(self.mlp_norm(x_BTM)), range_nats
