"""Vision transformers as timm's `VisionTransformer`, and back, for standard attention.

timm's has the mean over tokens and no token for the class on request; the table of positions, which
is fixed here, is a parameter there; and its head becomes the dense layer, tanh and the head, as
export/remote/load_timm.py makes it. Its images are (batch, 3, side, side) of the values of
laser/training/objectives/images.py.
"""

import math
from typing import Any

import numpy as np

from export.tensors import Take, Tensors, layers_of, norm, require_sines, stacked, taken_norm
from models.config import VitConfig, require
from models.families import Parameters
from models.vit import sincos_2d

NORMS = {"norm1": "attention_norm", "norm2": "mlp_norm"}
QK_NORMS = {"attn.q_norm": "query_norm", "attn.k_norm": "key_norm"}


def arguments(config: VitConfig) -> dict[str, Any]:
    """Of timm's class. Raises ValueError for an attention that it has not."""
    attention = config.attention
    require(attention.kind == "standard", f"attention.kind={attention.kind}: timm has standard")
    require(
        (attention.temperature, attention.per_dim_temp, attention.diff, attention.soft_cap)
        == (1.0, False, "none", 0.0),
        "attention: timm has no temperature, per_dim_temp, diff or soft_cap, only qk_norm",
    )
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": config.num_classes,
        "embed_dim": config.model_dim,
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        # timm multiplies and rounds down; a half more keeps it above the whole number.
        "mlp_ratio": (config.mlp_dim + 0.5) / config.model_dim,
        "qk_norm": attention.qk_norm,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
        "act_layer": "gelu_tanh",
    }


def to_timm(config: VitConfig, params: Parameters, length: int = 0) -> Tensors:
    """timm's tensors of parameters that are stacked by layer. Raises ValueError as `arguments`."""
    del length
    arguments(config)
    size, dim = config.patch_size, config.model_dim
    kernel = np.asarray(params["patches"]["kernel"]).reshape(size, size, 3, dim)
    tensors = {
        "patch_embed.proj.weight": kernel.transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": params["patches"]["bias"],
        "pos_embed": _positions(config),
        **norm("norm", params["final_norm"]),
        "head.0.weight": params["pre_logits"]["kernel"].T,
        "head.0.bias": params["pre_logits"]["bias"],
        "head.2.weight": params["head"]["kernel"].T,
        "head.2.bias": params["head"]["bias"],
    }
    for i, block in enumerate(layers_of(params)):
        attention, mlp = block["attention"], block["mlp"]
        parts = [attention[name].reshape(dim, -1).T for name in ("query", "key", "value")]
        biases = [attention[f"{name}_bias"].reshape(-1) for name in ("query", "key", "value")]
        layer = {
            "attn.qkv.weight": np.concatenate(parts),
            "attn.qkv.bias": np.concatenate(biases),
            "attn.proj.weight": attention["output"].reshape(dim, -1),
            "attn.proj.bias": attention["output_bias"],
            "mlp.fc1.weight": mlp["up"].T,
            "mlp.fc1.bias": mlp["up_bias"],
            "mlp.fc2.weight": mlp["down"].T,
            "mlp.fc2.bias": mlp["down_bias"],
        }
        for theirs, ours in NORMS.items():
            layer |= norm(theirs, block[ours])
        for theirs, ours in QK_NORMS.items() if config.attention.qk_norm else ():
            layer |= norm(theirs, attention[ours])
        tensors |= {f"blocks.{i}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def from_timm(config: VitConfig, take: Take, length: int = 0) -> Parameters:
    """The way back, bit for bit. Raises ValueError as `arguments` and `take`."""
    del length
    arguments(config)
    size, dim, hidden = config.patch_size, config.model_dim, config.mlp_dim
    heads = (dim, config.num_heads, config.head_dim)
    require_sines(take, "pos_embed", _positions(config))

    def dense(name: str, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
        return take(f"{name}.weight", (outputs, inputs)).T, take(f"{name}.bias", (outputs,))

    def block(i: int) -> Parameters:
        at = f"blocks.{i}"
        weight, bias = dense(f"{at}.attn.qkv", dim, 3 * dim)
        output = take(f"{at}.attn.proj.weight", (dim, dim)).reshape(heads)
        attention: Parameters = {"output": output}
        attention["output_bias"] = take(f"{at}.attn.proj.bias", (dim,))
        parts = zip(("query", "key", "value"), np.split(weight, 3, 1), np.split(bias, 3))
        for name, kernel, offset in parts:
            attention |= {name: kernel.reshape(heads), f"{name}_bias": offset.reshape(heads[1:])}
        for theirs, ours in QK_NORMS.items() if config.attention.qk_norm else ():
            attention[ours] = taken_norm(take, f"{at}.{theirs}", config.head_dim)
        mlp: Parameters = {}
        mlp["up"], mlp["up_bias"] = dense(f"{at}.mlp.fc1", dim, hidden)
        mlp["down"], mlp["down_bias"] = dense(f"{at}.mlp.fc2", hidden, dim)
        norms = {ours: taken_norm(take, f"{at}.{theirs}", dim) for theirs, ours in NORMS.items()}
        return {"attention": attention, "mlp": mlp, **norms}

    kernel = take("patch_embed.proj.weight", (dim, 3, size, size)).transpose(2, 3, 1, 0)
    names = ("kernel", "bias")
    return {
        "patches": {
            "kernel": kernel.reshape(-1, dim),
            "bias": take("patch_embed.proj.bias", (dim,)),
        },
        "blocks": stacked([block(i) for i in range(config.num_layers)]),
        "final_norm": taken_norm(take, "norm", dim),
        "pre_logits": dict(zip(names, dense("head.0", dim, dim))),
        "head": dict(zip(names, dense("head.2", dim, config.num_classes))),
    }


def _positions(config: VitConfig) -> np.ndarray:
    side = math.isqrt(config.tokens)
    return np.asarray(sincos_2d(side, side, config.model_dim))[None]
