"""Classification of images: cross-entropy with soft labels, and the share of wrong answers.

Shapes: B images, I side of an image, K classes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from laser.training.config import RunConfig
from laser.training.objectives.base import Batch, Loss, Objective, Rows, Sums
from models.families import structure

Array = jax.Array
ERROR = "error"  # share of images whose likeliest class is another one

# Of ImageNet's values from 0 to 255.
MEAN = 255 * np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = 255 * np.array([0.229, 0.224, 0.225], np.float32)


def _make_loss(config: RunConfig) -> Loss:
    """The loss of batches with `noise`, of training, has dropout and smooth labels.

    What is reported has neither smooth labels nor z-loss; of training it has mixed ones.
    """
    assert config.images is not None
    graph = structure(config.model)
    dtype = jnp.dtype(config.model.dtype)
    smoothing = config.images.label_smoothing

    def loss(params, batch, share):
        model = nnx.merge(graph, params)
        logits_BK, ranges_L = model(pixels(batch), batch.get("noise"), share.gatherer(dtype))
        log_probs_BK = jax.nn.log_softmax(logits_BK)
        weights_B, targets_BK = batch["weights"], targets(batch, logits_BK.shape[1])
        nll_B = -jnp.sum(targets_BK * log_probs_BK, axis=1)
        loss_B = nll_B
        if "noise" in batch:
            loss_B = (1 - smoothing) * nll_B - smoothing * log_probs_BK.mean(axis=1)
        z_B = jnp.square(jax.nn.logsumexp(logits_BK, axis=1))
        total = jnp.sum(weights_B * (loss_B + config.training.z_loss * z_B))
        wrong_B = logits_BK.argmax(1) != targets_BK.argmax(1)
        shares = {ERROR: jnp.sum(weights_B * wrong_B)}
        nll = jnp.sum(weights_B * nll_B)
        sums = Sums(total, nll, weights_B.sum(), ranges_L.max(), shares)
        return total, jax.lax.stop_gradient(sums)

    return loss


def pixels(batch: Batch) -> Array:
    """The images of a batch, mixed with their partners if they have any, of mean 0 and deviation 1.

    (B, I, I, 3) float32.
    """
    images = batch["images"].astype(jnp.float32)
    if "partners" in batch:
        share = batch["shares"][:, None, None, None]
        images = share * images + (1 - share) * batch["partners"].astype(jnp.float32)
    return (images - MEAN) / DEVIATION


def targets(batch: Batch, num_classes: int) -> Array:
    """What each image shows, in shares of it: (B, K) float32."""
    labels_BK = jax.nn.one_hot(batch["labels"], num_classes)
    if "partners" not in batch:
        return labels_BK
    share = batch["shares"][:, None]
    return share * labels_BK + (1 - share) * jax.nn.one_hot(batch["partner_labels"], num_classes)


def _rows(config: RunConfig) -> Rows:
    """As made by data/images/loader.py to train on."""
    assert config.images is not None
    image = ((config.model.image_size, config.model.image_size, 3), jnp.uint8)
    arrays = {"images": image, "labels": ((), jnp.int32), "weights": ((), jnp.float32)}
    arrays["noise"] = ((), jnp.uint32)
    if config.images.mixup:
        arrays |= {"partners": image, "partner_labels": ((), jnp.int32)}
        arrays["shares"] = ((), jnp.float32)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in arrays.items()}


CLASSES = Objective(_make_loss, _rows, (ERROR,))
