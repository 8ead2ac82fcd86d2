"""Transcripts of recordings: connectionist temporal classification (CTC), arXiv 1211.3711.

The loss is a sum over recordings, divided by the number of labels, as AlgoPerf does. Padding has no
part in it, nor has a row without a recording.

A micro-batch is normalised by its own moments, as a smaller batch would be. What evaluation uses
moves once a step, by their mean over the step's micro-batches, weighted by positions.

Shapes: B recordings, T positions, U labels.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from laser.training.config import RunConfig
from laser.training.objectives.base import Batch, Loss, Objective, Rows, Sums
from laser.training.share import Share
from models import conformer
from models.conformer import BLANK, Moments, Outputs
from models.families import Parameters, structure
from models.stack import product_precision

Array = jax.Array


def _outputs(config: RunConfig, params: Parameters, batch: Batch, share: Share) -> Outputs:
    model = nnx.merge(structure(config.model), params)
    return model(
        batch["inputs"],
        batch["frames"],
        batch.get("noise"),
        share.gatherer(jnp.dtype(config.model.dtype)),
        share.total,
    )


def _make_loss(config: RunConfig) -> Loss:
    """Batches with `noise`, of training, have dropout, and batch norm goes by their moments."""

    def loss(params, batch, share):
        outputs = _outputs(config, params, batch, share)
        valid_BT = conformer.within(outputs.logits_BTV.shape[1], outputs.positions_B)
        valid_BU = conformer.within(batch["targets"].shape[1], batch["labels"])
        # optax sums in another order where what lies beyond a transcript repeats its last label.
        targets_BU = jnp.where(valid_BU, batch["targets"], BLANK)
        nll = optax.ctc_loss(
            outputs.logits_BTV, 1.0 - valid_BT, targets_BU, 1.0 - valid_BU, blank_id=BLANK
        ).sum()
        positions = valid_BT.sum().astype(jnp.float32)
        moments = jax.tree.map(lambda x: x * positions, outputs.moments)
        labels = valid_BU.sum().astype(jnp.float32)
        sums = Sums(nll, nll, labels, outputs.ranges_L.max(), {}, (positions, moments))
        return nll, jax.lax.stop_gradient(sums)

    return loss


def greedy_paths(config: RunConfig, params: Parameters, batch: Batch, share: Share) -> Array:
    """The likeliest label of every position, the blank beyond a recording: (B, T) int32."""
    with product_precision(config.model):
        outputs = _outputs(config, params, batch, share)
    valid_BT = conformer.within(outputs.logits_BTV.shape[1], outputs.positions_B)
    return jnp.where(valid_BT, outputs.logits_BTV.argmax(axis=-1), BLANK).astype(jnp.int32)


def _rows(config: RunConfig) -> Rows:
    """As made by data/speech/batches.py to train on."""
    frames = config.data.seq_len
    return {
        "inputs": jax.ShapeDtypeStruct((frames, config.model.mel_bins), jnp.float32),
        "frames": jax.ShapeDtypeStruct((), jnp.int32),
        "targets": jax.ShapeDtypeStruct((conformer.num_positions(frames),), jnp.int32),
        "labels": jax.ShapeDtypeStruct((), jnp.int32),
        "noise": jax.ShapeDtypeStruct((), jnp.uint32),
    }


def _nothing_measured(config: RunConfig) -> tuple[Array, Moments]:
    shape = (config.model.num_layers, config.model.model_dim)
    return jnp.float32(0), Moments(jnp.zeros(shape), jnp.zeros(shape))


def _after_step(config: RunConfig, old: Parameters, new: Parameters, sums: Sums) -> Parameters:
    positions, moments = sums.measured
    means = jax.tree.map(lambda x: x / jnp.maximum(positions, 1), moments)
    return conformer.moved(config.model, old, new, means)


TRANSCRIPTS = Objective(_make_loss, _rows, (), _nothing_measured, _after_step)
