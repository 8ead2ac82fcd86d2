"""Language models: the next token (decoder), or the masked ones (BERT)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from laser.training.config import RunConfig
from laser.training.loss import chunk_length, cross_entropy
from laser.training.objectives.base import Loss, Objective, Rows, Sums
from models.families import structure

Array = jax.Array
ERROR = "error"  # share of targets that are not the likeliest token


def _make_loss(config: RunConfig, count_errors: bool) -> Loss:
    graph = structure(config.model)
    dtype = jnp.dtype(config.model.dtype)

    def loss(params, batch, share):
        model = nnx.merge(graph, params)
        hidden_BTM, ranges_L = model(
            batch["inputs"], batch.get("segment_ids"), whole=share.gatherer(dtype)
        )
        hidden_BTM, embedding = _gradients_together(hidden_BTM, params["embedding"])
        total, nll, *errors = cross_entropy(
            hidden_BTM,
            share.whole("embedding", embedding, dtype),
            batch["targets"],
            batch["weights"],
            config.model.logits_soft_cap,
            config.training.z_loss,
            chunk_length(*batch["targets"].shape),
            count_errors,
        )
        shares = dict(zip([ERROR], errors))
        sums = Sums(total, nll, batch["weights"].sum(), ranges_L.max(), shares)
        return total, jax.lax.stop_gradient(sums)

    return loss


@jax.custom_vjp
def _gradients_together(*arrays: Array) -> tuple[Array, ...]:
    """The arrays as they are. Their gradients are all complete before one of them is used.

    Else XLA puts off what the embedding's gradient still needs until after the blocks' backward
    pass, and keeps the whole of it in float32 meanwhile: 250 MiB of the 2.2B.
    """
    return arrays


_gradients_together.defvjp(
    lambda *arrays: (arrays, None), lambda _, gradients: jax.lax.optimization_barrier(gradients)
)


def _rows(config: RunConfig) -> Rows:
    """As made by data/reading/loader.py."""
    names = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.segment_ids:
        names["segment_ids"] = jnp.int32
    shape = (config.data.seq_len,)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in names.items()}


NEXT_TOKEN = Objective(functools.partial(_make_loss, count_errors=False), _rows)
MASKED_TOKENS = Objective(functools.partial(_make_loss, count_errors=True), _rows, (ERROR,))
