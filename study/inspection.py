"""What the attention of a trained model looks like, on text that it was not trained on.

The queries, keys and values of every layer are those of the run's own forward pass, in float32, of
one row and one layer at a time: those of all layers of a large model fill no machine's memory.
Shapes: B batch, T positions, H heads, D head size.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eval.run import mesh_of
from laser.attention import attention, reference
from laser.training import sharding
from laser.training.config import RunConfig
from laser.training.step import make_gradient
from models.config import ModelConfig
from models.decoder import embed, positions
from models.families import Parameters
from models.layers import Block

SMALL = (1e-3, 1e-7)
BINS = 60
PROJECTIONS = ("query", "key", "value")
Captured = tuple[jax.Array, jax.Array, jax.Array]


def capture(
    model: ModelConfig, params: Parameters, tokens_BT: np.ndarray
) -> Iterator[list[Captured]]:
    """Of each layer, and in it of each row, (query, key, value) of each map of attention, each
    (1, T, H, ·)."""
    model = dataclasses.replace(model, dtype="float32")
    where = positions((1, tokens_BT.shape[1]), None, None)
    embedding = jnp.asarray(params["embedding"])
    rows = [embed(model, embedding, jnp.asarray(row[None]), where) for row in tokens_BT]
    graph = nnx.graphdef(nnx.eval_shape(lambda: Block(model, nnx.Rngs(params=0))))

    @jax.jit
    def run(x_BTM, layer, weights):
        block = nnx.merge(graph, weights)
        queries, keys, value = block.attention.project(block.attention_norm(x_BTM), where)
        each = functools.partial(jnp.repeat, repeats=model.num_heads // model.kv_heads, axis=2)
        projected = queries, [each(key) for key in keys], each(value)
        return block(x_BTM, layer, where, None, None)[0], projected

    for layer in range(model.num_layers):
        weights = jax.tree.map(lambda x, i=layer: x[i], params["blocks"])
        for i, x_BTM in enumerate(rows):
            rows[i], (queries, keys, value) = run(x_BTM, jnp.asarray(layer), weights)
            yield [(query, key, value) for query, key in zip(queries, keys)]


def log_probabilities(model: ModelConfig, query: jax.Array, key: jax.Array) -> jax.Array:
    """Of every pair that a causal query sees, flat."""
    options = _options(model)
    log_probs = reference.log_probabilities(query, key, **options)
    seen = reference.visible(query.shape[1], True, None)
    return log_probs[jnp.broadcast_to(seen, log_probs.shape)]


def probabilities(model: ModelConfig, captured: Iterable[Sequence[Captured]]) -> dict[str, Any]:
    """Shares of small probabilities, and histograms of a and of a (1 - a) by their logarithm."""
    edges = np.linspace(-12, 0, BINS + 1)
    counts = {"a": np.zeros(BINS), "a (1 - a)": np.zeros(BINS)}
    small = np.zeros(len(SMALL))
    slopes = np.zeros(len(SMALL))
    total = 0
    for maps in captured:
        for query, key, _ in maps:
            a = np.exp(np.asarray(log_probabilities(model, query, key), np.float64))
            total += a.size
            for name, values in (("a", a), ("a (1 - a)", a * (1 - a))):
                logs = np.log10(np.maximum(values, 1e-12))
                counts[name] += np.histogram(logs, edges)[0]
            small += [np.count_nonzero(a < limit) for limit in SMALL]
            slopes += [np.count_nonzero(a * (1 - a) < limit) for limit in SMALL]
    return {
        "pairs": total,
        "a": dict(zip(map(str, SMALL), (small / total).tolist())),
        "a (1 - a)": dict(zip(map(str, SMALL), (slopes / total).tolist())),
        "edges": edges.tolist(),
        "histogram": {name: (count / total).tolist() for name, count in counts.items()},
    }


def reconstruction(
    model: ModelConfig, captured: Iterable[Sequence[Captured]]
) -> dict[str, tuple[float, float]]:
    """Relative error of attention outputs in bfloat16 (paper, appendix A.5, does not say of what
    norm): ‖rounded - exact‖ / ‖exact‖, Frobenius, mean and deviation over rows, layers and maps, as
    the paper's are over 4,800 cached inputs of one row and layer each.

    Rounded are queries, keys and values and what the formula computes from them, as XLA compiles
    it, which may keep more precision between operations that it fuses. Exact is what
    float32 gives of what was not rounded: the formula itself for standard attention, this
    repository's form of it for LASER.
    """
    errors: dict[str, list[float]] = {}
    measure = jax.jit(functools.partial(_errors, model))
    for maps in captured:
        for arrays in maps:
            for name, error in measure(arrays).items():
                errors.setdefault(name, []).append(float(error))
    return {name: (float(np.mean(e)), float(np.std(e))) for name, e in errors.items()}


def _errors(model: ModelConfig, arrays: Captured) -> dict[str, jax.Array]:
    options = _options(model)
    log_probs = reference.log_probabilities(*arrays[:2], **options)
    exact = {
        "standard": reference.standard(log_probs, arrays[2]),
        "laser": _laser(model, arrays),
    }
    query, key, value = (x.astype(jnp.bfloat16) for x in arrays)
    rounded_logits = reference.log_probabilities(
        query.astype(jnp.float32), key.astype(jnp.float32), **options
    )
    probs = jnp.exp(rounded_logits).astype(jnp.bfloat16)

    def mean(values):
        return jnp.einsum("bhts,bshd->bthd", probs, values)

    top = value.max(axis=1, keepdims=True)
    found = {
        "standard": ("standard", mean(value)),
        "laser without the trick": ("laser", jnp.log(mean(jnp.exp(value)))),
        "laser with the trick": ("laser", jnp.log(mean(jnp.exp(value - top))) + top),
        "laser, this repository": ("laser", _laser(model, (query, key, value))),
    }
    return {
        name: jnp.linalg.norm(output.astype(jnp.float32) - exact[kind])
        / jnp.linalg.norm(exact[kind])
        for name, (kind, output) in found.items()
    }


def _laser(model: ModelConfig, arrays: Captured) -> jax.Array:
    options = {name: value for name, value in _options(model).items() if name != "segment_ids"}
    return attention(*arrays, kind="laser", **options)


def make_gradient_norms(
    config: RunConfig, batch: Mapping[str, Any]
) -> Callable[[Parameters], dict[str, Any]]:
    """From parameters to norms of the gradient of the mean loss on a batch: of all parameters, and
    of each layer's Q, K and V weights."""
    mesh = mesh_of(config)
    rows = dataclasses.replace(config.training, batch_size=len(batch["inputs"]), accumulation=1)
    config = dataclasses.replace(config, training=rows)
    gradient = jax.jit(sharding.on_mesh(mesh, make_gradient(config)))

    def norms(params: Parameters) -> dict[str, Any]:
        grads, sums = jax.device_get(gradient(params, batch))
        grads = jax.tree.map(lambda x: x / sums.tokens, grads)
        weights = grads["blocks"]["attention"]
        layers = {
            name: [float(np.linalg.norm(layer)) for layer in weights[name]] for name in PROJECTIONS
        }
        squares = sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(grads))
        return {"all": squares**0.5, "layers": layers}

    return norms


def _options(model: ModelConfig) -> dict[str, Any]:
    return {
        "logits_scale": 1 / (model.attention.temperature * model.query_dim**0.5),
        "causal": True,
        "segment_ids": None,
        "logits_soft_cap": model.attention.soft_cap,
    }
