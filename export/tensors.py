"""What the layouts share: tensors by name, and what a reader asks of them.

Shapes: M model dim, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig, require
from models.decoder import sinusoidal
from models.families import Parameters

Tensors = dict[str, np.ndarray]
# Gives a tensor of a shape by its name, or says what is wrong with it.
Take = Callable[[str, tuple[int, ...]], np.ndarray]


def layers_of(params: Parameters) -> list[Parameters]:
    """The blocks one by one, of parameters that are stacked by layer."""
    count = len(jax.tree.leaves(params["blocks"])[0])
    return [jax.tree.map(lambda x, i=i: np.asarray(x[i]), params["blocks"]) for i in range(count)]


def stacked(layers: list[Parameters]) -> Any:
    """The way back from `layers_of`."""
    return jax.tree.map(lambda *xs: np.stack(xs), *layers)


def scaled(embedding_VM: np.ndarray, size: int) -> np.ndarray:
    """As our models of text scale what they look up."""
    return embedding_VM * np.float32(math.sqrt(size))


def positions_table(config: ModelConfig, length: int) -> np.ndarray:
    """(length, M)."""
    return np.asarray(sinusoidal(jnp.arange(length)[None], config.model_dim)[0])


def norm(prefix: str, params: Parameters) -> Tensors:
    """A LayerNorm's or RMSNorm's tensors."""
    names = {"weight": "scale", "bias": "bias"}
    return {f"{prefix}.{name}": params[ours] for name, ours in names.items() if ours in params}


def taken_norm(take: Take, prefix: str, size: int, bias: bool = True) -> Parameters:
    """The way back from `norm`."""
    scale = {"scale": take(f"{prefix}.weight", (size,))}
    return {**scale, "bias": take(f"{prefix}.bias", (size,))} if bias else scale


def taken_embedding(
    take: Take, config: ModelConfig, output_name: str, input_name: str
) -> np.ndarray:
    """(V, M), of which theirs are two. Raises ValueError unless they are one but for its scale."""
    embedding = take(output_name, (config.vocab_size, config.model_dim))
    require_equal(take, input_name, scaled(embedding, config.model_dim))
    return embedding


def require_sines(take: Take, name: str, expected: np.ndarray) -> None:
    """Of positions: other machines may round sines of large angles in another way."""
    require_equal(take, name, expected, tolerance=0.01)


def require_equal(
    take: Take,
    name: str,
    expected: np.ndarray,
    tolerance: float = 0.0,
) -> None:
    """Raises ValueError if a tensor has not the values that follow from the config."""
    require(
        np.allclose(take(name, expected.shape), expected, rtol=0, atol=tolerance),
        f"tensor {name} has other values than our architecture fixes there: trained elsewhere?",
    )
