"""The parts of a block: norm, MLP, and the attention layer that owns the variant's parameters.

Parameters are float32 and are cast to the activations' dtype where they are used; norms compute in
float32. A decoder's dense layers have no bias (the paper's parameter counts leave no room to tell)
and start as truncated normals of variance 1 / fan-in; where the config says `biases`, they have one
and start uniform, of variance 2 / (fan-in + fan-out) (Xavier). LayerNorm has scale and bias,
RMSNorm a scale.

Shapes: B batch, T positions, M model dim, F MLP dim, H heads of queries, K of keys and values, D
head dim, Q query dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from laser import attention as attn
from models.config import GATED, BlockConfig
from models.products import activation, dense, heads_product

Array = jax.Array
Parameters = dict[str, Any]  # nested dicts with float32 arrays as leaves

# attention.kind → the function over whole rows, and the one of new tokens over a cache.
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Array]]] = dict.fromkeys(
    ("standard", "laser"), (attn.attention, attn.cached_attention)
)


def dense_param(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """A float32 weight of variance 1 / fan_in."""
    # 0.8796 is the standard deviation of a unit normal truncated at two standard deviations.
    scale = 1 / math.sqrt(fan_in) / 0.87962566
    return nnx.Param(scale * jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32))


def layer_param(
    config: BlockConfig, rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, fan_out: int
) -> nnx.Param:
    """A float32 weight of a block, as the top of this file says."""
    if not config.biases:
        return dense_param(rngs, shape, fan_in)
    limit = math.sqrt(6 / (fan_in + fan_out))
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit))


def with_bias(x: Array, bias: nnx.Param | None) -> Array:
    """x + bias over the last dims, in the dtype of `x`; x if there is none.

    Added in float32, so that the bias' gradient, a sum over all positions, is summed in it.
    """
    return x if bias is None else (x.astype(jnp.float32) + bias[...]).astype(x.dtype)


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
    """down(f(up(x))), or gated (arXiv 2002.05202): down(f(gate(x)) · up(x)).

    f is GELU in its tanh form or ReLU; gated it is that GELU (GeGLU) or SiLU (SwiGLU). Biases, of
    the form without a gate alone, start as normals of standard deviation 1e-6.
    """

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        self.kind = config.mlp
        model, hidden = config.model_dim, config.mlp_dim
        self.up = layer_param(config, rngs, (model, hidden), model, hidden)
        self.down = layer_param(config, rngs, (hidden, model), hidden, model)
        if config.mlp in GATED:
            self.gate = dense_param(rngs, (model, hidden), model)

        def bias(size):
            return nnx.Param(1e-6 * jax.random.normal(rngs.params(), (size,), jnp.float32))

        self.up_bias = bias(hidden) if config.biases else None
        self.down_bias = bias(model) if config.biases else None

    def __call__(self, x_BTM: Array) -> Array:
        return self.output(self.hidden(x_BTM))

    def hidden(self, x_BTM: Array) -> Array:
        """(B, T, M) -> (B, T, F)."""
        hidden_BTF = with_bias(dense(x_BTM, self.up[...].astype(x_BTM.dtype)), self.up_bias)
        if self.kind == "gelu":
            hidden_BTF = activation(jax.nn.gelu, hidden_BTF)
        elif self.kind == "relu":
            hidden_BTF = jax.nn.relu(hidden_BTF)
        else:
            gate_BTF = dense(x_BTM, self.gate[...].astype(x_BTM.dtype))
            hidden_BTF *= activation(
                jax.nn.silu if self.kind == "swiglu" else jax.nn.gelu, gate_BTF
            )
        return hidden_BTF

    def output(self, hidden_BTF: Array) -> Array:
        """(B, T, F) -> (B, T, M)."""
        return with_bias(dense(hidden_BTF, self.down[...].astype(hidden_BTF.dtype)), self.down_bias)


class LayerCache(NamedTuple):
    """Keys, as they meet the queries, and values of one layer, in the activations' dtype.

    keys: one (B, K, S, Q) array, or two for differential attention. value: (B, K, S, D).
    """

    keys: tuple[Array, ...]
    value: Array


class Attention(nnx.Module):
    """Multi-head or grouped-query self-attention of any variant.

    Differential attention splits each head's query and key in two of half the size and keeps the
    value whole, so all variants have projections of the same shape.
    """

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        self.config = config
        heads, size, dim = config.num_heads, config.head_dim, config.model_dim
        kv_heads = config.kv_heads
        query_dim = config.query_dim
        make = functools.partial(layer_param, config, rngs)
        self.query = make((dim, heads, size), dim, heads * size)
        self.key = make((dim, kv_heads, size), dim, kv_heads * size)
        self.value = make((dim, kv_heads, size), dim, kv_heads * size)
        self.output = make((dim, heads, size), heads * size, dim)
        biased = config.biases
        self.query_bias = nnx.Param(jnp.zeros((heads, size))) if biased else None
        self.key_bias = nnx.Param(jnp.zeros((kv_heads, size))) if biased else None
        self.value_bias = nnx.Param(jnp.zeros((kv_heads, size))) if biased else None
        self.output_bias = nnx.Param(jnp.zeros(dim)) if biased else None
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
        self,
        x_BTM: Array,
        layer: Array,
        positions_BT: Array | None,
        segment_ids_BT: Array | None,
        shared_segment: int | None = None,
    ) -> tuple[Array, Array]:
        """Returns (B, T, M) and the attention range in nats, see `laser.attention.attention`."""
        queries, keys, value = self.project(x_BTM, positions_BT)
        attention, _ = FUNCTIONS[self.config.attention.kind]
        outputs, ranges = zip(
            *(
                attention(
                    query,
                    key,
                    value,
                    causal=self.config.causal,
                    segment_ids=segment_ids_BT,
                    shared_segment=shared_segment,
                    implementation=self.config.attention.implementation,
                    return_range=True,
                    **self._readout_options(),
                )
                for query, key in zip(queries, keys, strict=True)
            ),
            strict=True,
        )
        return self._output(outputs, layer), functools.reduce(jnp.maximum, ranges)

    def decode(
        self,
        x_BTM: Array,
        layer: int,
        positions_BT: Array,
        cache: LayerCache,
        slot: Array,
        visible_BTS: Array,
    ) -> tuple[Array, LayerCache]:
        """The same for T new tokens, whose keys and values go into the cache from `slot` on.

        Returns (B, T, M) and the cache with them. `visible_BTS` as in
        `laser.attention.cached_attention`.
        """
        queries, keys, value = self.project(x_BTM, positions_BT)

        def write(cached_BHSD, new_BTHD):
            return jax.lax.dynamic_update_slice_in_dim(
                cached_BHSD, new_BTHD.transpose(0, 2, 1, 3), slot, axis=2
            )

        cache = LayerCache(
            tuple(write(cached, key) for cached, key in zip(cache.keys, keys, strict=True)),
            write(cache.value, value),
        )
        stop = slot + x_BTM.shape[1]
        _, cached_attention = FUNCTIONS[self.config.attention.kind]
        outputs = tuple(
            cached_attention(query, key, cache.value, visible_BTS, stop, **self._readout_options())
            for query, key in zip(queries, cache.keys, strict=True)
        )
        # Flat: with two dims to sum over, XLA on CPUs transposes the weight first, in ten times the
        # time of the product of one token.
        out_BTN = self._combined(outputs, layer).reshape(*x_BTM.shape[:2], -1)
        weight_MN = self.output[...].astype(out_BTN.dtype).reshape(x_BTM.shape[-1], -1)
        return jnp.einsum("btn,mn->btm", out_BTN, weight_MN), cache

    def project(
        self, x_BTM: Array, positions_BT: Array | None
    ) -> tuple[list[Array], list[Array], Array]:
        """Queries and keys, two of each for differential attention, and the value.

        Queries are (B, T, H, Q), keys and the value (B, T, K, ·).
        """

        def project(weight, bias):
            out = heads_product("btm,mhd->bthd", x_BTM, weight[...].astype(x_BTM.dtype))
            return with_bias(out, bias)

        value = project(self.value, self.value_bias)
        queries = self._split(project(self.query, self.query_bias))
        keys = self._split(project(self.key, self.key_bias))
        variant = self.config.attention
        if self.config.positions == "rotary":
            assert positions_BT is not None
            queries, keys = ([attn.rotary(x, positions_BT) for x in xs] for xs in (queries, keys))
        if variant.qk_norm:
            queries = [self._normalised(x, self.query_norm) for x in queries]
            keys = [self._normalised(x, self.key_norm) for x in keys]
        if variant.per_dim_temp:
            temperature = self.log_temperature[...]
            queries = [attn.per_dim_temperature(x, temperature) for x in queries]
        return queries, keys, value

    def _split(self, x_BTHD: Array) -> list[Array]:
        return jnp.split(x_BTHD, self.config.head_dim // self.config.query_dim, axis=-1)

    def _normalised(self, x_BTHD: Array, norm: Norm) -> Array:
        assert norm.bias is not None  # a LayerNorm
        return attn.qk_norm(x_BTHD, norm.scale[...], norm.bias[...])

    def _readout_options(self) -> dict[str, Any]:
        variant = self.config.attention
        return {
            "kind": variant.kind,
            "logits_scale": 1 / (variant.temperature * math.sqrt(self.config.query_dim)),
            "logits_soft_cap": variant.soft_cap,
        }

    def _output(self, outputs: tuple[Array, ...], layer: Array | int) -> Array:
        """One or two attention outputs (B, T, H, D) to (B, T, M)."""
        out = self._combined(outputs, layer)
        out_BTM = heads_product("bthd,mhd->btm", out, self.output[...].astype(out.dtype))
        return with_bias(out_BTM, self.output_bias)

    def _combined(self, outputs: tuple[Array, ...], layer: Array | int) -> Array:
        """One or two attention outputs to one, (B, T, H, D)."""
        return outputs[0] if len(outputs) == 1 else self._difference(outputs, layer)

    def _difference(self, outputs: tuple[Array, ...], layer: Array | int) -> Array:
        first, second = outputs
        initial = attn.lambda_init(layer)
        if self.config.attention.diff == "scalar":
            return attn.differential(first, second, self.lambda_scalar[...] + initial)
        lambda_ = attn.lambda_official(self.lambda_vectors[...], initial)
        difference = attn.differential(first, second, lambda_)
        return attn.head_norm(difference, self.output_norm_scale[...], initial)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(config.model_dim, config.norm)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config.model_dim, config.norm)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self,
        x_BTM: Array,
        layer: Array,
        positions_BT: Array,
        segment_ids_BT: Array | None,
        shared_segment: int | None = None,
    ) -> tuple[Array, Array]:
        out, range_nats = self.attention(
            self.attention_norm(x_BTM), layer, positions_BT, segment_ids_BT, shared_segment
        )
        return self._add_mlp(x_BTM + out), range_nats

    def decode(
        self,
        x_BTM: Array,
        layer: int,
        positions_BT: Array,
        cache: LayerCache,
        slot: Array,
        visible_BTS: Array,
    ) -> tuple[Array, LayerCache]:
        """T new tokens after those in the cache, see `Attention.decode`."""
        out, cache = self.attention.decode(
            self.attention_norm(x_BTM), layer, positions_BT, cache, slot, visible_BTS
        )
        return self._add_mlp(x_BTM + out), cache

    def _add_mlp(self, x_BTM: Array) -> Array:
        return x_BTM + self.mlp(self.mlp_norm(x_BTM))
