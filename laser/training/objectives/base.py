"""What every objective has: a loss as sums, and the arrays of the batch that it reads."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from laser.training.config import RunConfig
from laser.training.share import Share
from models.families import Parameters

Array = jax.Array
Batch = dict[str, Array]  # the first dim of each is rows
Rows = dict[str, jax.ShapeDtypeStruct]


class Sums(NamedTuple):
    """What micro-batches and devices add up to; the attention range is a maximum.

    Attributes:
      loss: what the gradient is of.
      nll: what is reported as the loss, without z-loss.
      tokens: what both are divided by: targets, or images, or labels.
      attention_range: in nats, see `laser.attention.attention`.
      shares: by name, what is reported divided by `tokens`, as wrong answers give an error rate.
      measured: a tree of other sums, for `Objective.after_step`.
    """

    loss: Array
    nll: Array
    tokens: Array
    attention_range: Array
    shares: dict[str, Array]
    measured: Any = ()

    def add(self, other: "Sums") -> "Sums":
        return Sums(
            self.loss + other.loss,
            self.nll + other.nll,
            self.tokens + other.tokens,
            jnp.maximum(self.attention_range, other.attention_range),
            {name: self.shares[name] + other.shares[name] for name in self.shares},
            jax.tree.map(jnp.add, self.measured, other.measured),
        )

    def over(self, share: Share) -> "Sums":
        """Of all devices."""
        parts = (self.loss, self.nll, self.tokens, self.shares, self.measured)
        loss, nll, tokens, shares, measured = share.total(parts)
        return Sums(loss, nll, tokens, share.largest(self.attention_range), shares, measured)


Loss: TypeAlias = Callable[[Parameters, Batch, Share], tuple[Array, Sums]]


class Objective(NamedTuple):
    """What one kind of model learns.

    Attributes:
      make_loss: from a config to a function of parameters, a batch and a device's share of them.
        It returns the summed loss, and all sums, over the share's rows alone. All that is random is
        in the batch, so that the loss of a row is the same wherever it is computed.
      rows: from a config to the arrays of one row of a batch: name to shape and dtype.
      shares: names of `Sums.shares`.
      nothing_measured: from a config to `Sums.measured` of no rows.
      after_step: from the config, the parameters before a step, those that the optimizer made, and
        the step's sums to the parameters after it: for those that no gradient reaches.
    """

    make_loss: Callable[[RunConfig], Loss]
    rows: Callable[[RunConfig], Rows]
    shares: tuple[str, ...] = ()
    nothing_measured: Callable[[RunConfig], Any] = lambda config: ()
    after_step: Callable[[RunConfig, Parameters, Parameters, Sums], Parameters] = (
        lambda config, old, new, sums: new
    )

    def start(self, config: RunConfig) -> Sums:
        """Of no rows."""
        zero = jnp.float32(0)
        shares = dict.fromkeys(self.shares, zero)
        return Sums(zero, zero, zero, zero, shares, self.nothing_measured(config))
