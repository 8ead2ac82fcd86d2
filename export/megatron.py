"""BERT as transformers' MegatronBertForMaskedLM, and back, for standard attention.

Megatron's BERT has the norm before each layer and none after the embedding, as ours. Two things are
put into its weights. Its positions are a table. And its head is more than ours: a dense layer, the
activation and a LayerNorm before the product with the vocabulary. So the last norm of the encoder
only normalises, after which no entry lies further from 0 than the root of M; the dense layer adds
that and FLAT, where GELU and ReLU leave a number as it is; and the head's LayerNorm, which has the
parameters of our last norm, takes it off again. Logits agree up to rounding.

Shapes: M model dim, F MLP dim.
"""

import math

import numpy as np

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
from models.config import ModelConfig
from models.families import Parameters

FLAT = 8.0  # from here on GELU of a number is the number, in float32
WORDS = "bert.embeddings.word_embeddings.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"
HEAD = "cls.predictions"


def to_megatron(config: ModelConfig, params: Parameters, length: int) -> Tensors:
    """Its tensors, of a table with so many positions."""
    size = config.model_dim
    tensors = {
        WORDS: scaled(params["embedding"], size),
        f"{HEAD}.decoder.weight": params["embedding"],
        **norm(f"{HEAD}.transform.LayerNorm", params["final_norm"]),
        POSITIONS: positions_table(config, length),
        **_fixed(config),
    }
    for i, layer in enumerate(layers_of(params)):
        prefix, attention = f"bert.encoder.layer.{i}", layer["attention"]
        weights = {
            f"attention.self.{name}": attention[name].reshape(size, size).T
            for name in ("query", "key", "value")
        }
        weights["attention.output.dense"] = attention["output"].reshape(size, size)
        weights["intermediate.dense"] = layer["mlp"]["up"].T
        weights["output.dense"] = layer["mlp"]["down"].T
        for name, weight in weights.items():
            tensors[f"{prefix}.{name}.weight"] = weight
            tensors[f"{prefix}.{name}.bias"] = np.zeros(len(weight), np.float32)
        tensors |= norm(f"{prefix}.attention.ln", layer["attention_norm"])
        tensors |= norm(f"{prefix}.ln", layer["mlp_norm"])
    return tensors


def from_megatron(config: ModelConfig, take: Take, length: int) -> Parameters:
    """The way back, bit for bit. Raises ValueError as `take`, or where our model has no place."""
    size, hidden = config.model_dim, config.mlp_dim
    heads = (size, config.num_heads, config.head_dim)
    embedding = taken_embedding(take, config, f"{HEAD}.decoder.weight", WORDS)
    require_sines(take, POSITIONS, positions_table(config, length))
    for name, fixed in _fixed(config).items():
        require_equal(take, name, fixed)

    def weight(name: str, rows: int, columns: int) -> np.ndarray:
        require_equal(take, f"{name}.bias", np.zeros(rows, np.float32))
        return take(f"{name}.weight", (rows, columns))

    def layer(i: int) -> Parameters:
        prefix = f"bert.encoder.layer.{i}"
        attention = {
            name: weight(f"{prefix}.attention.self.{name}", size, size).T.reshape(heads)
            for name in ("query", "key", "value")
        }
        output = weight(f"{prefix}.attention.output.dense", size, size)
        return {
            "attention": {**attention, "output": output.reshape(heads)},
            "mlp": {
                "up": weight(f"{prefix}.intermediate.dense", hidden, size).T,
                "down": weight(f"{prefix}.output.dense", size, hidden).T,
            },
            "attention_norm": taken_norm(take, f"{prefix}.attention.ln", size),
            "mlp_norm": taken_norm(take, f"{prefix}.ln", size),
        }

    return {
        "embedding": embedding,
        "final_norm": taken_norm(take, f"{HEAD}.transform.LayerNorm", size),
        "blocks": stacked([layer(i) for i in range(config.num_layers)]),
    }


def _fixed(config: ModelConfig) -> Tensors:
    """What Megatron's has and ours has not."""
    size, zeros = config.model_dim, np.zeros(config.vocab_size, np.float32)
    return {
        "bert.embeddings.token_type_embeddings.weight": np.zeros((1, size), np.float32),
        "bert.encoder.ln.weight": np.ones(size, np.float32),
        "bert.encoder.ln.bias": np.zeros(size, np.float32),
        f"{HEAD}.transform.dense.weight": np.eye(size, dtype=np.float32),
        f"{HEAD}.transform.dense.bias": np.full(size, math.sqrt(size) + FLAT, np.float32),
        f"{HEAD}.decoder.bias": zeros,
        f"{HEAD}.bias": zeros,
    }
