"""One training step and one evaluation step as pure functions of the state and a batch.

Losses (laser/training/objectives) are sums over targets and are divided once, by the targets of the
whole step, so that micro-batches, hosts and padding change nothing. A step whose loss or gradient
is not finite leaves parameters and optimizer as they were and is counted; on request also one whose
gradient is far larger than the last ones.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from laser.training import optimizer
from laser.training.config import RunConfig
from laser.training.objectives.base import Batch, Sums
from laser.training.objectives.registry import objective
from laser.training.share import Share, over_batch
from models.families import Parameters, init_parameters
from models.stack import product_precision

Array = jax.Array
NORMS = 128  # of the last gradients, to tell what is usual


class TrainState(NamedTuple):
    """All that a checkpoint holds. The order of the data follows from `step`."""

    step: Array  # int32, steps done
    params: Parameters
    opt_state: optax.OptState
    skipped: Array  # int32, steps without an update since the start
    skipped_in_a_row: Array  # int32
    recent_norms: Array  # (NORMS,) float32, of gradients, the newest last; inf before the start


def init_state(config: RunConfig) -> TrainState:
    """The state before the first step, a function of the config alone."""
    params = init_parameters(config.model, config.training.seed)
    zero = jnp.zeros((), jnp.int32)
    opt_state = optimizer.make_optimizer(config.optimizer).init(params)
    norms = jnp.full(NORMS, jnp.inf, jnp.float32)
    return TrainState(zero, params, opt_state, zero, zero, norms)


def make_gradient(config: RunConfig) -> Callable[[Parameters, Batch], tuple[Parameters, Sums]]:
    """(parameters, batch) -> (gradients of the summed loss, sums) of all devices of the mesh.

    Gradients are float32, as the parameters. docs/precision.md says which of the sums that they
    come from are made in float32.
    """
    gradient = jax.grad(objective(config).make_loss(config), has_aux=True)
    start = functools.partial(objective(config).start, config)
    micro_batches = config.training.accumulation

    def over_micro_batches(params, batch, share):
        grads, sums = _accumulate(gradient, params, batch, share, start, micro_batches)
        return share.total_gradient(grads), sums.over(share)

    def gradients(params, batch):
        with product_precision(config.model):
            return over_batch(
                over_micro_batches, params, batch, lambda specs, _: (specs, PartitionSpec())
            )

    return gradients


def make_train_step(config: RunConfig) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """The function that train.py jits: (state, batch) -> (state, metrics).

    The metrics are float32 scalars: loss (nats per token, without z-loss) and the objective's
    shares, gradient_norm, parameter_norm, learning_rate, attention_range, skipped_steps,
    skipped_in_a_row.
    """
    gradient = make_gradient(config)
    update = optimizer.make_optimizer(config.optimizer).update
    schedule = optimizer.learning_rate(config.optimizer, config.training.steps)
    limit = config.training.skip_gradient_norm

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        grads, sums = gradient(state.params, batch)
        tokens = jnp.maximum(sums.tokens, 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        grad_norm = optax.tree.norm(grads)
        rate = schedule(state.step)
        updates, opt_state = update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        params = objective(config).after_step(config, state.params, params, sums)
        good = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
        good, norms = _judged(good, grad_norm, state.recent_norms, limit)
        keep = functools.partial(jnp.where, good)
        bad = 1 - good.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
            recent_norms=norms,
        )
        metrics = {
            "loss": sums.nll / tokens,
            "gradient_norm": grad_norm,
            "parameter_norm": optax.tree.norm(state.params),
            "learning_rate": rate,
            "attention_range": sums.attention_range,
            "skipped_steps": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        } | {name: x / tokens for name, x in sums.shares.items()}
        return state, jax.tree.map(lambda x: x.astype(jnp.float32), metrics)

    return train_step


def _judged(good: Array, norm: Array, recent: Array, limit: float) -> tuple[Array, Array]:
    """Whether a step counts, also by the size of its gradient, and the last norms with it.

    Up to `limit` times the median of the last ones it does, and as long as half of them are yet to
    come; a limit of 0 is none. Norms of skipped steps are among them: gradients that stay large
    become the usual ones.
    """
    newer = jnp.where(jnp.isfinite(norm), jnp.append(recent[1:], norm), recent)
    if not limit:
        return good, newer
    usual = jnp.sort(recent)[NORMS // 2]
    return good & (norm <= limit * usual), newer


def _accumulate(gradient, params, batch: Batch, share: Share, start, micro_batches: int):
    """Sums of gradients and of `Sums` over micro-batches, in order."""
    if micro_batches == 1:
        return gradient(params, batch, share)

    def add(carry, micro_batch):
        grads, sums = carry
        more_grads, more_sums = gradient(params, micro_batch, share)
        return (jax.tree.map(jnp.add, grads, more_grads), sums.add(more_sums)), None

    zero = (jax.tree.map(jnp.zeros_like, params), start())
    return jax.lax.scan(add, zero, _split(batch, micro_batches))[0]


def _split(batch: Batch, micro_batches: int) -> Batch:
    """One micro-batch after the other: rows i, i + n, i + 2n, ..."""
    return jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)


def make_eval_step(config: RunConfig) -> Callable[[Parameters, Batch], Sums]:
    """(parameters, batch) -> sums over the batch, in as many micro-batches as a training step."""
    loss = objective(config).make_loss(config)
    micro_batches = config.training.accumulation

    def sums(params, batch, share):
        def add(total, micro_batch):
            return total.add(loss(params, micro_batch, share)[1]), None

        if micro_batches == 1:
            return loss(params, batch, share)[1].over(share)
        start = objective(config).start(config)
        return jax.lax.scan(add, start, _split(batch, micro_batches))[0].over(share)

    def of_batch(params, batch):
        with product_precision(config.model):
            return over_batch(sums, params, batch, lambda *_: PartitionSpec())

    return of_batch
