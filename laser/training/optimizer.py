"""AdamW, NAdamW, LAMB and Muon by optax, with what PAX does around them.

Everything that is "per tensor" (the clip of the update's RMS, LAMB's trust ratio) is per layer of
the stacked blocks, so that scanning the layers does not change the optimizer. The learning rate is
left out: the step multiplies by `learning_rate(step)`, which stays right when a bad step is
skipped.

Muon orthogonalises whole matrices, and devices have parts of them. So before it a matrix' parts
come together, the layers spread over as many devices as divide them, and what it makes goes back to
the devices that own the parts: float32, once each way, over one axis of the mesh after the other.
Its momentum stays where the parameters are.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import NamedSharding, PartitionSpec

from laser.training import sharding
from laser.training.config import OptimizerConfig

Array = jax.Array

# Of a Muon update's entries, about that of AdamW's, so that one learning rate and decay serve both
# (arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate by the number of steps done before: linear warm-up from 0 to the peak, then ...

    ... as `cosine` a cosine to 0, as `wsd` (warmup-stable-decay, arXiv 2404.06395) the peak, and a
    line to 0 in the last `decay_steps`. The zeros at both ends fall before the first step and after
    the last, so that every step trains.
    """
    if config.schedule == "wsd":
        peak, start = config.learning_rate, steps + 1 - config.decay_steps
        parts = [
            optax.linear_schedule(0.0, peak, config.warmup_steps),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, config.decay_steps),
        ]
        schedule = optax.join_schedules(parts, [config.warmup_steps, start])
    else:
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
    With Muon the layers' matrices have its update in place of Adam's, of root mean square 0.2.
    NAdamW has Nesterov's first moment (Dozat 2016) and decays every parameter, as AlgoPerf's does,
    which corrects both terms of that moment for the same step; that is all they differ in.
    """
    parts = []
    if config.clip_grad_norm:
        parts.append(optax.clip_by_global_norm(config.clip_grad_norm))
    # Where (1 - b2) g² is below float32's normal numbers it is lost to the second moment, and the
    # first would be divided by eps alone. This much under the root keeps such an update below 1,
    # and is nothing beside any other second moment.
    lost = float(jnp.finfo(jnp.float32).tiny) / (1 - config.b2)
    nesterov = config.name == "nadamw"
    adam = optax.scale_by_adam(
        b1=config.b1, b2=config.b2, eps=config.eps, eps_root=lost, nesterov=nesterov
    )
    if config.name == "muon":
        muon = optax.chain(_momentum(config.muon_momentum), optax.stateless(_orthogonalised))
        parts.append(optax.masked(muon, layer_matrices))
        parts.append(
            optax.masked(adam, lambda tree: jax.tree.map(lambda x: not x, layer_matrices(tree)))
        )
    else:
        parts.append(adam)
    if config.clip_update_rms:
        parts.append(_per_tensor(_clip_rms(config.clip_update_rms)))
    decayed = None if nesterov else matrices
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    if config.name == "lamb":
        parts.append(_per_tensor(_trust_ratio))
    return optax.chain(*parts)


def is_stacked(path: tuple) -> bool:
    """Whether a parameter at this tree path has a leading dim of layers."""
    return path[0].key == "blocks"


def matrices(params) -> object:
    """True for what weight decay applies to: tensors of two dims or more besides the layers'.

    Norms, biases, temperatures and lambdas are left alone.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim - is_stacked(path) >= 2 and not _is_vector(path), params
    )


def layer_matrices(params) -> Any:
    """True for what Muon updates: the matrices of the layers, and not the embedding."""
    return jax.tree_util.tree_map_with_path(
        lambda path, matrix: matrix and is_stacked(path), matrices(params)
    )


def _is_vector(path: tuple) -> bool:
    """Whether it is a vector of each head, which has two dims because there are several heads."""
    return path[-1].key.startswith("lambda") or path[-1].key.endswith("bias")


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


class MomentumState(NamedTuple):
    """Steps so far, int32, and the running mean of the gradients."""

    steps: Array
    mean: Any


def _momentum(beta: float) -> optax.GradientTransformation:
    """Nesterov's momentum with bias correction, as in optax.contrib.scale_by_muon."""

    def init(params):
        return MomentumState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(gradients, state, params=None):
        del params
        mean = optax.tree.update_moment(gradients, state.mean, beta, 1)
        count = optax.safe_increment(state.steps)
        ahead = optax.tree.bias_correction(mean, beta, optax.safe_increment(count))
        now = optax.tree.bias_correction(gradients, beta, count)
        updates = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        return updates, MomentumState(count, mean)

    return optax.GradientTransformation(init, update)


def _orthogonalised(updates, params):
    """UVᵀ in place of each matrix USVᵀ, nearly, with entries of root mean square `MUON_RMS`."""
    del params
    # Without momentum of its own, which would want matrices that are whole.
    newton_schulz = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=_dimension_numbers
    )
    whole = _moved(updates, _to_whole)
    orthogonal, _ = newton_schulz.update(whole, newton_schulz.init(whole))

    def scaled(path, x):
        rows, columns = (math.prod(x.shape[dim] for dim in dims) for dims in _matrix_dims(path))
        return x * (MUON_RMS * math.sqrt(max(rows, columns)))

    scaled_updates = jax.tree_util.tree_map_with_path(scaled, orthogonal)
    return _moved(scaled_updates, lambda *where: _to_whole(*where)[::-1])


def _matrix_dims(path: tuple) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dims of a stacked parameter that its matrix sums over, and those of its result."""
    if path[-1].key == "output":  # (L, M, H, D), from heads to M
        return (2, 3), (1,)
    return (1,), (2, 3) if path[-2].key == "attention" else (2,)


def _dimension_numbers(tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: optax.contrib.MuonDimensionNumbers(*_matrix_dims(path)), tree
    )


def _moved(tree, layouts: Callable[..., list[PartitionSpec]]):
    """The arrays from the first of their layouts to the last, on the mesh in context.

    `layouts` is called with the mesh, a parameter's path and its shape.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree

    def move(path, x):
        first, *rest = (
            NamedSharding(mesh, spec) for spec in layouts(mesh, sharding.name_of(path), x.shape)
        )
        # Else XLA moves what the array is a sum of: twice as much.
        x = jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(x, first))
        for layout in rest:
            x = jax.lax.with_sharding_constraint(x, layout)
        return x

    return jax.tree_util.tree_map_with_path(move, tree)


def _to_whole(mesh, path: str, shape: tuple[int, ...]) -> list[PartitionSpec]:
    """Layouts from that of a stacked parameter to layers that are whole.

    One axis leaves its dim at a time, the innermost first, as an all-to-all to the layers if it
    divides what is left of them and an all-gather if not. XLA has no other way for two at once than
    to gather the array on every device.
    """
    axes = [list(names) for names in sharding.per_dim(sharding.parameter_spec(mesh, path, shape))]
    layers, left = [], shape[0]
    for name in reversed((*sharding.batch_axes(mesh)[1:], sharding.TENSOR)):
        if mesh.shape[name] > 1 and left % mesh.shape[name] == 0:
            layers.append(name)
            left //= mesh.shape[name]
    layouts = [_spec(axes)]
    while split := [names for names in axes[1:] if names]:
        # First those that spread: what is gathered afterwards has fewer layers.
        name = next((names for names in split if names[-1] in layers), split[0]).pop()
        axes[0] += [name] if name in layers else []
        layouts.append(_spec(axes))
    axes[0] += [name for name in layers if name not in axes[0]]  # of copies, each takes a part
    return [*layouts, _spec(axes)]


def _spec(axes: list[list[str]]) -> PartitionSpec:
    return PartitionSpec(*(tuple(names) or None for names in axes))
