"""Our parameters under the names and shapes of a model in PyTorch, and back without losing a bit.

`gpt2` is transformers' GPT2LMHeadModel, `starcoder2` its Starcoder2ForCausalLM: they compute what
our decoder does with standard attention, with sinusoidal or rotary positions; `llama` is its
LlamaForCausalLM, which has RMSNorm and a SwiGLU besides. `laser` is the module in export/remote,
which computes everything else. Our embedding is scaled by sqrt(M) on the way in
and not on the way out; models without that scale get two matrices.

Shapes: L layers, M model dim, V vocabulary, H heads, D head dim, Q query dim, F MLP dim.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from models.config import AttentionConfig, ModelConfig, require
from models.decoder import Parameters, init_parameters, sinusoidal

Tensors = dict[str, np.ndarray]
Layout = Literal["gpt2", "starcoder2", "llama", "laser"]
# Gives a tensor of a shape by its name, or says what is wrong with it.
Take = Callable[[str, tuple[int, ...]], np.ndarray]


def choose_layout(config: ModelConfig) -> Layout:
    """An existing architecture if one computes the same function, else our own module.

    Raises:
      ValueError: that has no such attention either.
    """
    require(
        config.kind == "decoder",
        f"model.kind={config.kind}: only decoders are exported",
    )
    require(
        config.attention.kind in ("standard", "laser"),
        f"attention.kind={config.attention.kind}: export/remote/modeling_laser.py has no such "
        "attention; write it there, and add it here",
    )
    plain = AttentionConfig(kind="standard", implementation=config.attention.implementation)
    if config.attention != plain or config.logits_soft_cap:
        return "laser"
    block = (config.positions, config.norm, config.mlp)
    if block == ("sinusoidal", "layernorm", "gelu"):
        square = config.kv_heads * config.head_dim == config.model_dim == _width(config)
        return "gpt2" if square else "laser"
    rotary: dict[Any, Layout] = {
        ("rotary", "layernorm", "gelu"): "starcoder2",
        ("rotary", "rmsnorm", "swiglu"): "llama",
    }
    return rotary.get(block, "laser")


def to_tensors(layout: Layout, config: ModelConfig, params: Parameters, length: int) -> Tensors:
    """All tensors of the file, float32. `length` is how many positions a table of them has."""
    tensors = dict(_WRITERS[layout](config, jax.tree.map(np.asarray, params), length))
    return {name: np.asarray(x, order="C") for name, x in tensors.items()}


def from_tensors(
    layout: Layout, config: ModelConfig, tensors: Mapping[str, np.ndarray], length: int
) -> Parameters:
    """The parameters of which `to_tensors` makes these.

    Raises:
      ValueError: a tensor is missing, unknown, of another shape or dtype, or has values that our
        architecture has no place for; the message names it.
    """
    left = dict(tensors)

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        require(name in left, f"tensor {name} {shape} is missing")
        x = left.pop(name)
        require(x.shape == shape, f"tensor {name} has shape {x.shape}, the config says {shape}")
        require(x.dtype == np.float32, f"tensor {name} has dtype {x.dtype}: must be float32")
        return x

    params = _READERS[layout](config, take, length)
    require(not left, f"tensors that the config knows nothing of: {', '.join(sorted(left)[:5])}")
    return params


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position, (M/2,) or for rotary positions (Q/2,): as bits, since at position 1000
    the last bit of a frequency is the fourth decimal of an angle."""
    if config.positions == "rotary":
        half = config.query_dim // 2
        return np.asarray(10_000.0 ** (-jnp.arange(half) / half), np.float32)
    count = config.model_dim // 2
    return np.asarray(jnp.exp(-math.log(10_000.0) * jnp.arange(count) / max(count - 1, 1)))


def _laser_tensors(config: ModelConfig, params: Parameters, length: int):
    del length
    yield "frequencies", frequencies(config)
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [entry.key for entry in path]
        if keys[0] != "blocks":
            yield ".".join(keys), x
            continue
        for i in range(config.num_layers):
            yield _layer_name(keys, i), x[i]


def _from_laser(config: ModelConfig, take: Take, length: int) -> Parameters:
    del length
    take("frequencies", frequencies(config).shape)

    def parameter(path, abstract):
        keys = [entry.key for entry in path]
        if keys[0] != "blocks":
            return take(".".join(keys), abstract.shape)
        layers = range(config.num_layers)
        return np.stack([take(_layer_name(keys, i), abstract.shape[1:]) for i in layers])

    abstract = jax.eval_shape(functools.partial(init_parameters, config, 0))
    return jax.tree_util.tree_map_with_path(parameter, abstract)


def _layer_name(keys: list[str], layer: int) -> str:
    return ".".join(["blocks", str(layer), *keys[1:]])


def _gpt2_tensors(config: ModelConfig, params: Parameters, length: int):
    size = config.model_dim
    yield "transformer.wte.weight", _scaled(params["embedding"], size)
    yield "transformer.wpe.weight", _table(config, length)
    yield "lm_head.weight", params["embedding"]
    yield from _norm("transformer.ln_f", params["final_norm"])
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], params["blocks"])
        prefix, attention = f"transformer.h.{i}", layer["attention"]
        fused = [attention[name].reshape(size, size) for name in ("query", "key", "value")]
        weights = {
            "attn.c_attn": np.concatenate(fused, axis=1),
            "attn.c_proj": attention["output"].reshape(size, size).T,
            "mlp.c_fc": layer["mlp"]["up"],
            "mlp.c_proj": layer["mlp"]["down"],
        }
        for name, weight in weights.items():
            yield f"{prefix}.{name}.weight", weight
            yield f"{prefix}.{name}.bias", np.zeros(weight.shape[1], np.float32)
        yield from _norm(f"{prefix}.ln_1", layer["attention_norm"])
        yield from _norm(f"{prefix}.ln_2", layer["mlp_norm"])


def _from_gpt2(config: ModelConfig, take: Take, length: int) -> Parameters:
    size, hidden = config.model_dim, config.mlp_dim
    heads, embedding = (
        (config.num_heads, config.head_dim),
        _embedding(config, take, "transformer.wte.weight"),
    )
    # Other machines may round sines of large angles in another way.
    _require_equal(take, "transformer.wpe.weight", _table(config, length), tolerance=0.01)

    def weight(name: str, shape: tuple[int, int]) -> np.ndarray:
        _require_equal(take, f"{name}.bias", np.zeros(shape[1], np.float32))
        return take(f"{name}.weight", shape)

    def layer(i: int) -> Parameters:
        prefix = f"transformer.h.{i}"
        parts = np.split(weight(f"{prefix}.attn.c_attn", (size, 3 * size)), 3, axis=1)
        query, key, value = (x.reshape(size, *heads) for x in parts)
        output = weight(f"{prefix}.attn.c_proj", (size, size)).T.reshape(size, *heads)
        return {
            "attention": {"query": query, "key": key, "value": value, "output": output},
            "mlp": {
                "up": weight(f"{prefix}.mlp.c_fc", (size, hidden)),
                "down": weight(f"{prefix}.mlp.c_proj", (hidden, size)),
            },
            "attention_norm": _taken_norm(take, f"{prefix}.ln_1", size),
            "mlp_norm": _taken_norm(take, f"{prefix}.ln_2", size),
        }

    return _assembled(config, embedding, _taken_norm(take, "transformer.ln_f", size), layer)


# Our matrices of an MLP, and transformers'.
_MLP_NAMES = {
    "starcoder2": {"up": "c_fc", "down": "c_proj"},
    "llama": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}


def _width(config: ModelConfig) -> int:
    return config.num_heads * config.head_dim


def _rotary_tensors(layout: Layout, config: ModelConfig, params: Parameters, length: int):
    """Of StarCoder2 or Llama, whose layers have the same names outside of the MLP."""
    del length
    size = config.model_dim
    yield "model.embed_tokens.weight", _scaled(params["embedding"], size)
    yield "lm_head.weight", params["embedding"]
    yield from _norm("model.norm", params["final_norm"])
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], params["blocks"])
        prefix, attention = f"model.layers.{i}", layer["attention"]
        for name in ("query", "key", "value"):
            yield f"{prefix}.self_attn.{name[0]}_proj.weight", attention[name].reshape(size, -1).T
        yield f"{prefix}.self_attn.o_proj.weight", attention["output"].reshape(size, -1)
        for name, theirs in _MLP_NAMES[layout].items():
            yield f"{prefix}.mlp.{theirs}.weight", layer["mlp"][name].T
        yield from _norm(f"{prefix}.input_layernorm", layer["attention_norm"])
        yield from _norm(f"{prefix}.post_attention_layernorm", layer["mlp_norm"])


def _from_rotary(layout: Layout, config: ModelConfig, take: Take, length: int) -> Parameters:
    del length
    size, hidden = config.model_dim, config.mlp_dim
    heads, bias = (config.num_heads, config.head_dim), config.norm == "layernorm"
    embedding = _embedding(config, take, "model.embed_tokens.weight")

    def layer(i: int) -> Parameters:
        prefix = f"model.layers.{i}"
        output = take(f"{prefix}.self_attn.o_proj.weight", (size, _width(config)))
        attention = {"output": output.reshape(size, *heads)}
        counts = {"query": config.num_heads, "key": config.kv_heads, "value": config.kv_heads}
        for name, count in counts.items():
            shape = (count * config.head_dim, size)
            weight = take(f"{prefix}.self_attn.{name[0]}_proj.weight", shape)
            attention[name] = weight.T.reshape(size, count, config.head_dim)
        mlp = {}
        for name, theirs in _MLP_NAMES[layout].items():
            shape = (size, hidden) if name == "down" else (hidden, size)
            mlp[name] = take(f"{prefix}.mlp.{theirs}.weight", shape).T
        return {
            "attention": attention,
            "mlp": mlp,
            "attention_norm": _taken_norm(take, f"{prefix}.input_layernorm", size, bias),
            "mlp_norm": _taken_norm(take, f"{prefix}.post_attention_layernorm", size, bias),
        }

    return _assembled(config, embedding, _taken_norm(take, "model.norm", size, bias), layer)


def _assembled(config: ModelConfig, embedding, final_norm, layer: Callable[[int], Parameters]):
    layers = [layer(i) for i in range(config.num_layers)]
    blocks: Any = jax.tree.map(lambda *xs: np.stack(xs), *layers)
    return {"embedding": embedding, "final_norm": final_norm, "blocks": blocks}


def _scaled(embedding_VM: np.ndarray, size: int) -> np.ndarray:
    """As our decoder scales what it looks up."""
    return embedding_VM * np.float32(math.sqrt(size))


def _table(config: ModelConfig, length: int) -> np.ndarray:
    return np.asarray(sinusoidal(jnp.arange(length)[None], config.model_dim)[0])


def _embedding(config: ModelConfig, take: Take, input_name: str) -> np.ndarray:
    embedding = take("lm_head.weight", (config.vocab_size, config.model_dim))
    _require_equal(take, input_name, _scaled(embedding, config.model_dim))
    return embedding


def _norm(prefix: str, norm: Parameters):
    yield f"{prefix}.weight", norm["scale"]
    if "bias" in norm:
        yield f"{prefix}.bias", norm["bias"]


def _taken_norm(take: Take, prefix: str, size: int, bias: bool = True) -> Parameters:
    scale = {"scale": take(f"{prefix}.weight", (size,))}
    return {**scale, "bias": take(f"{prefix}.bias", (size,))} if bias else scale


def _require_equal(take: Take, name: str, expected: np.ndarray, tolerance: float = 0.0) -> None:
    require(
        np.allclose(take(name, expected.shape), expected, rtol=0.0, atol=tolerance),
        f"tensor {name} has other values than our architecture fixes there: trained elsewhere?",
    )


_WRITERS: dict[Layout, Callable[..., Any]] = {
    "gpt2": _gpt2_tensors,
    "starcoder2": functools.partial(_rotary_tensors, "starcoder2"),
    "llama": functools.partial(_rotary_tensors, "llama"),
    "laser": _laser_tensors,
}
_READERS: dict[Layout, Callable[..., Parameters]] = {
    "gpt2": _from_gpt2,
    "starcoder2": functools.partial(_from_rotary, "starcoder2"),
    "llama": functools.partial(_from_rotary, "llama"),
    "laser": _from_laser,
}
