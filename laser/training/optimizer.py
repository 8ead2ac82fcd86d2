"""AdamW and LAMB by optax, with what PAX does around them.

Everything that is "per tensor" (the clip of the update's RMS, LAMB's trust ratio) is per layer of
the stacked blocks, so that scanning the layers does not change the optimizer. The learning rate is
left out: the step multiplies by `learning_rate(step)`, which stays right when a bad step is
skipped.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from laser.training.config import OptimizerConfig

Array = jax.Array


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then a cosine to 0, by the number of steps done before.

    The zeros at both ends fall before the first step and after the last, so that every step trains.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps + 1,
        end_value=0.0,
    )
    return lambda steps_done: schedule(steps_done + 1)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to updates of the size of a learning rate of 1; subtract them times the rate.

    clip by global norm → Adam with bias correction → clip of the update's RMS per tensor (praxis'
    sharded_adam) → decoupled decay of the matrices → for LAMB the trust ratio (arXiv 1904.00962).
    """
    parts = []
    if config.clip_grad_norm:
        parts.append(optax.clip_by_global_norm(config.clip_grad_norm))
    # Where (1 - b2) g² is below float32's normal numbers it is lost to the second moment, and the
    # first would be divided by eps alone. This much under the root keeps such an update below 1,
    # and is nothing beside any other second moment.
    lost = float(jnp.finfo(jnp.float32).tiny) / (1 - config.b2)
    parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, eps_root=lost))
    if config.clip_update_rms:
        parts.append(_per_tensor(_clip_rms(config.clip_update_rms)))
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=matrices))
    if config.name == "lamb":
        parts.append(_per_tensor(_trust_ratio))
    return optax.chain(*parts)


def is_stacked(path: tuple) -> bool:
    """Whether a parameter at this tree path has a leading dim of layers."""
    return path[0].key == "blocks"


def matrices(params) -> object:
    """True for what weight decay applies to: tensors of two dims or more besides the layers'.

    Norms, temperatures and lambdas are left alone.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim - is_stacked(path) >= 2 and not _is_lambda(path), params
    )


def _is_lambda(path: tuple) -> bool:
    return path[-1].key.startswith("lambda")


def _per_tensor(function: Callable[[Array, Array], Array]) -> optax.GradientTransformation:
    """Applies function(update, parameter) to every tensor, layer by layer in stacked ones."""

    def of_leaf(path, update, param):
        return (jax.vmap(function) if is_stacked(path) else function)(update, param)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(of_leaf, updates, params)
    )


def _clip_rms(threshold: float) -> Callable[[Array, Array], Array]:
    def clip(update, param):
        del param
        rms = jnp.sqrt(jnp.mean(jnp.square(update)))
        return update / jnp.maximum(1.0, rms / threshold)

    return clip


def _trust_ratio(update: Array, param: Array) -> Array:
    """update · |param| / |update|, with a ratio of 1 where either norm is 0 (as optax.lamb)."""
    param_norm, update_norm = jnp.linalg.norm(param), jnp.linalg.norm(update)
    usable = (param_norm > 0) & (update_norm > 0)
    return update * jnp.where(usable, param_norm / jnp.where(usable, update_norm, 1.0), 1.0)
