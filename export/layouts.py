"""Our parameters under the names and shapes of a model in PyTorch, and back without losing a bit.

`gpt2` is transformers' GPT2LMHeadModel, `starcoder2` its Starcoder2ForCausalLM: they compute what
our decoder does with standard attention, with sinusoidal or rotary positions; `llama` is its
LlamaForCausalLM, which has RMSNorm and a SwiGLU besides. `megatron_bert` is its
MegatronBertForMaskedLM (megatron.py), and `timm` another library's vision transformer (timm.py).
`laser` is the module in export/remote, which computes everything else that decoders and BERTs are.
Our embedding is scaled by sqrt(M) on the way in and not on the way out; models without that scale
get two matrices.

Shapes: L layers, M model dim, V vocabulary, H heads, D head dim, Q query dim, F MLP dim.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from export import timm
from export.megatron import from_megatron, to_megatron
from export.tensors import (
    Take,
    Tensors,
    layers_of,
    norm,
    positions_table,
    require_equal,
    require_sines,
    scaled,
    stacked,
    taken_embedding,
    taken_norm,
)
from models.config import AttentionConfig, ModelConfig, VitConfig, require
from models.families import AnyModelConfig, Parameters, abstract_parameters

Layout = Literal["gpt2", "starcoder2", "llama", "megatron_bert", "timm", "laser"]
BERT_MLPS = ("gelu", "relu")  # without a gate


def choose_layout(config: AnyModelConfig) -> Layout:
    """An existing architecture if one computes the same function, else our own module.

    Raises:
      ValueError: that has no such attention either, or there is none for this kind of model.
    """
    if isinstance(config, VitConfig):
        timm.arguments(config)
        return "timm"
    if not isinstance(config, ModelConfig):
        raise ValueError(f"model.kind={config.kind}: decoders, BERTs and ViTs alone are exported")
    require(
        config.attention.kind in ("standard", "laser"),
        f"attention.kind={config.attention.kind}: export/remote/modeling_laser.py has no such "
        "attention; write it there, and add it here",
    )
    plain = AttentionConfig(kind="standard", implementation=config.attention.implementation)
    if config.attention != plain or config.logits_soft_cap:
        return "laser"
    block = (config.positions, config.norm, config.mlp)
    square = config.kv_heads * config.head_dim == config.model_dim == _width(config)
    if config.kind == "bert":
        theirs = square and block[:2] == ("sinusoidal", "layernorm") and block[2] in BERT_MLPS
        return "megatron_bert" if theirs else "laser"
    if block == ("sinusoidal", "layernorm", "gelu"):
        return "gpt2" if square else "laser"
    rotary: dict[Any, Layout] = {
        ("rotary", "layernorm", "gelu"): "starcoder2",
        ("rotary", "rmsnorm", "swiglu"): "llama",
    }
    return rotary.get(block, "laser")


def to_tensors(layout: Layout, config: Any, params: Parameters, length: int) -> Tensors:
    """All tensors of the file, float32. `length` is how many positions a table of them has."""
    tensors = dict(_WRITERS[layout](config, jax.tree.map(np.asarray, params), length))
    return {name: np.asarray(x, order="C") for name, x in tensors.items()}


def from_tensors(
    layout: Layout, config: Any, tensors: Mapping[str, np.ndarray], length: int
) -> Parameters:
    """The parameters of which `to_tensors` makes these.

    Raises:
      ValueError: a tensor is missing, unknown, of another shape or dtype, or has values that our
        architecture has no place for; the message names it.
    """
    left = dict(tensors)
    if layout == "laser":
        left.pop("frequencies", None)  # of earlier exports: they follow from the config

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        require(name in left, f"tensor {name} {shape} is missing")
        x = left.pop(name)
        require(x.shape == shape, f"tensor {name} has shape {x.shape}, the config says {shape}")
        require(x.dtype == np.float32, f"tensor {name} has dtype {x.dtype}: must be float32")
        return x

    params = _READERS[layout](config, take, length)
    require(not left, f"tensors that the config knows nothing of: {', '.join(sorted(left)[:5])}")
    return params


def _laser_tensors(config: ModelConfig, params: Parameters, length: int):
    del length
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [entry.key for entry in path]
        if keys[0] != "blocks":
            yield ".".join(keys), x
            continue
        for i in range(config.num_layers):
            yield _layer_name(keys, i), x[i]


def _from_laser(config: ModelConfig, take: Take, length: int) -> Parameters:
    del length

    def parameter(path, abstract):
        keys = [entry.key for entry in path]
        if keys[0] != "blocks":
            return take(".".join(keys), abstract.shape)
        layers = range(config.num_layers)
        return np.stack([take(_layer_name(keys, i), abstract.shape[1:]) for i in layers])

    abstract = abstract_parameters(config)
    return jax.tree_util.tree_map_with_path(parameter, abstract)


def _layer_name(keys: list[str], layer: int) -> str:
    return ".".join(["blocks", str(layer), *keys[1:]])


def _gpt2_tensors(config: ModelConfig, params: Parameters, length: int):
    size = config.model_dim
    yield "transformer.wte.weight", scaled(params["embedding"], size)
    yield "transformer.wpe.weight", positions_table(config, length)
    yield "lm_head.weight", params["embedding"]
    yield from norm("transformer.ln_f", params["final_norm"]).items()
    for i, layer in enumerate(layers_of(params)):
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
        yield from norm(f"{prefix}.ln_1", layer["attention_norm"]).items()
        yield from norm(f"{prefix}.ln_2", layer["mlp_norm"]).items()


def _from_gpt2(config: ModelConfig, take: Take, length: int) -> Parameters:
    size, hidden = config.model_dim, config.mlp_dim
    heads = (config.num_heads, config.head_dim)
    embedding = taken_embedding(take, config, "lm_head.weight", "transformer.wte.weight")
    require_sines(take, "transformer.wpe.weight", positions_table(config, length))

    def weight(name: str, shape: tuple[int, int]) -> np.ndarray:
        require_equal(take, f"{name}.bias", np.zeros(shape[1], np.float32))
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
            "attention_norm": taken_norm(take, f"{prefix}.ln_1", size),
            "mlp_norm": taken_norm(take, f"{prefix}.ln_2", size),
        }

    return _assembled(config, embedding, taken_norm(take, "transformer.ln_f", size), layer)


# Our matrices of an MLP, and transformers'.
_MLP_NAMES = {
    "starcoder2": {"up": "c_fc", "down": "c_proj"},
    "llama": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}


def _width(config: ModelConfig) -> int:
    return config.num_heads * config.head_dim


def _rotary_tensors(layout: Layout, config: ModelConfig, params: Parameters, length: int):
    """The tensors of StarCoder2 or Llama, whose layers have the same names outside of the MLP."""
    del length
    size = config.model_dim
    yield "model.embed_tokens.weight", scaled(params["embedding"], size)
    yield "lm_head.weight", params["embedding"]
    yield from norm("model.norm", params["final_norm"]).items()
    for i, layer in enumerate(layers_of(params)):
        prefix, attention = f"model.layers.{i}", layer["attention"]
        for name in ("query", "key", "value"):
            yield f"{prefix}.self_attn.{name[0]}_proj.weight", attention[name].reshape(size, -1).T
        yield f"{prefix}.self_attn.o_proj.weight", attention["output"].reshape(size, -1)
        for name, theirs in _MLP_NAMES[layout].items():
            yield f"{prefix}.mlp.{theirs}.weight", layer["mlp"][name].T
        yield from norm(f"{prefix}.input_layernorm", layer["attention_norm"]).items()
        yield from norm(f"{prefix}.post_attention_layernorm", layer["mlp_norm"]).items()


def _from_rotary(layout: Layout, config: ModelConfig, take: Take, length: int) -> Parameters:
    del length
    size, hidden = config.model_dim, config.mlp_dim
    heads, bias = (config.num_heads, config.head_dim), config.norm == "layernorm"
    embedding = taken_embedding(take, config, "lm_head.weight", "model.embed_tokens.weight")

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
            "attention_norm": taken_norm(take, f"{prefix}.input_layernorm", size, bias),
            "mlp_norm": taken_norm(take, f"{prefix}.post_attention_layernorm", size, bias),
        }

    return _assembled(config, embedding, taken_norm(take, "model.norm", size, bias), layer)


def _assembled(config: ModelConfig, embedding, final_norm, layer: Callable[[int], Parameters]):
    blocks = stacked([layer(i) for i in range(config.num_layers)])
    return {"embedding": embedding, "final_norm": final_norm, "blocks": blocks}


_WRITERS: dict[Layout, Callable[..., Any]] = {
    "gpt2": _gpt2_tensors,
    "starcoder2": functools.partial(_rotary_tensors, "starcoder2"),
    "llama": functools.partial(_rotary_tensors, "llama"),
    "megatron_bert": lambda *args: to_megatron(*args).items(),
    "timm": lambda *args: timm.to_timm(*args).items(),
    "laser": _laser_tensors,
}
_READERS: dict[Layout, Callable[..., Parameters]] = {
    "gpt2": _from_gpt2,
    "starcoder2": functools.partial(_from_rotary, "starcoder2"),
    "llama": functools.partial(_from_rotary, "llama"),
    "megatron_bert": from_megatron,
    "timm": timm.from_timm,
    "laser": _from_laser,
}
