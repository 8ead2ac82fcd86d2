"""Vision transformers as timm's `VisionTransformer`, and back, for standard attention.

timm's has the mean over tokens and no token for the class on request; the table of positions, which
is fixed here, is a parameter there; and its head becomes the dense layer, tanh and the head:

    model = timm.models.VisionTransformer(**arguments(config))
    dim = config.model_dim
    model.head = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.num_classes))
    model.load_state_dict({name: torch.tensor(x) for name, x in to_timm(config, params).items()})

Its images are (batch, 3, side, side) of the values of laser/training/objectives/images.py.
"""

import math
from typing import Any

import numpy as np

from models.config import VitConfig, require
from models.vit import Parameters, sincos_2d

Tensors = dict[str, np.ndarray]
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
        "mlp_ratio": config.mlp_dim / config.model_dim,
        "qk_norm": attention.qk_norm,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
        "act_layer": "gelu_tanh",
    }


def to_timm(config: VitConfig, params: Parameters) -> Tensors:
    """timm's tensors of parameters that are stacked by layer. Raises ValueError as `arguments`."""
    arguments(config)
    size, dim, side = config.patch_size, config.model_dim, math.isqrt(config.tokens)
    kernel = np.asarray(params["patches"]["kernel"]).reshape(size, size, 3, dim)
    tensors = {
        "patch_embed.proj.weight": kernel.transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": params["patches"]["bias"],
        "pos_embed": sincos_2d(side, side, dim)[None],
        **_norm("norm", params["final_norm"]),
        "head.0.weight": params["pre_logits"]["kernel"].T,
        "head.0.bias": params["pre_logits"]["bias"],
        "head.2.weight": params["head"]["kernel"].T,
        "head.2.bias": params["head"]["bias"],
    }
    for i in range(config.num_layers):
        block = {name: _layer(part, i) for name, part in params["blocks"].items()}
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
            layer |= _norm(theirs, block[ours])
        for theirs, ours in QK_NORMS.items() if config.attention.qk_norm else ():
            layer |= _norm(theirs, attention[ours])
        tensors |= {f"blocks.{i}.{name}": tensor for name, tensor in layer.items()}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def from_timm(config: VitConfig, tensors: Tensors) -> Parameters:
    """The way back, bit for bit. Raises ValueError as `arguments`, or for a missing tensor."""
    arguments(config)
    shape = (config.model_dim, config.num_heads, config.head_dim)

    def get(name: str) -> np.ndarray:
        require(name in tensors, f"{name}: no such tensor")
        return np.asarray(tensors[name])

    def norm(name: str) -> Parameters:
        return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

    def dense(name: str) -> Parameters:
        return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}

    def block(i: int) -> Parameters:
        at = f"blocks.{i}"
        weights = np.split(get(f"{at}.attn.qkv.weight"), 3)
        biases = np.split(get(f"{at}.attn.qkv.bias"), 3)
        attention: Parameters = {"output": get(f"{at}.attn.proj.weight").reshape(shape)}
        attention["output_bias"] = get(f"{at}.attn.proj.bias")
        for name, weight, bias in zip(("query", "key", "value"), weights, biases):
            attention |= {name: weight.T.reshape(shape), f"{name}_bias": bias.reshape(shape[1:])}
        for theirs, ours in QK_NORMS.items() if config.attention.qk_norm else ():
            attention[ours] = norm(f"{at}.{theirs}")
        mlp: Parameters = {}
        for theirs, ours in (("fc1", "up"), ("fc2", "down")):
            mlp[ours] = get(f"{at}.mlp.{theirs}.weight").T
            mlp[f"{ours}_bias"] = get(f"{at}.mlp.{theirs}.bias")
        norms = {ours: norm(f"{at}.{theirs}") for theirs, ours in NORMS.items()}
        return {"attention": attention, "mlp": mlp, **norms}

    kernel = get("patch_embed.proj.weight").transpose(2, 3, 1, 0)
    patches = {"kernel": kernel.reshape(-1, config.model_dim), "bias": get("patch_embed.proj.bias")}
    return {
        "patches": patches,
        "blocks": _stacked([block(i) for i in range(config.num_layers)]),
        "final_norm": norm("norm"),
        "pre_logits": dense("head.0"),
        "head": dense("head.2"),
    }


def _norm(name: str, params: Parameters) -> Tensors:
    return {f"{name}.weight": params["scale"], f"{name}.bias": params["bias"]}


def _layer(tree: Any, index: int) -> Any:
    if isinstance(tree, dict):
        return {name: _layer(part, index) for name, part in tree.items()}
    return np.asarray(tree[index])


def _stacked(trees: list[Any]) -> Any:
    if isinstance(trees[0], dict):
        return {name: _stacked([tree[name] for tree in trees]) for name in trees[0]}
    return np.stack(trees)
