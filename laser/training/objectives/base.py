"""What every objective has: a loss as sums, and the arrays of the batch that it reads."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

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
    """

    loss: Array
    nll: Array
    tokens: Array
    attention_range: Array
    shares: dict[str, Array]

    def add(self, other: "Sums") -> "Sums":
        return Sums(
            self.loss + other.loss,
            self.nll + other.nll,
            self.tokens + other.tokens,
            jnp.maximum(self.attention_range, other.attention_range),
            {name: self.shares[name] + other.shares[name] for name in self.shares},
        )

    def over(self, share: Share) -> "Sums":
        """Of all devices."""
        loss, nll, tokens, shares = share.total((self.loss, self.nll, self.tokens, self.shares))
        return Sums(loss, nll, tokens, share.largest(self.attention_range), shares)


Loss: TypeAlias = Callable[[Parameters, Batch, Share], tuple[Array, Sums]]


class Objective(NamedTuple):
    """What one kind of model learns.

    Attributes:
      make_loss: from a config to a function of parameters, a batch and a device's share of them.
        It returns the summed loss, and all sums, over the share's rows alone. All that is random is
        in the batch, so that the loss of a row is the same wherever it is computed.
      rows: from a config to the arrays of one row of a batch: name to shape and dtype.
      shares: names of `Sums.shares`.
    """

    make_loss: Callable[[RunConfig], Loss]
    rows: Callable[[RunConfig], Rows]
    shares: tuple[str, ...] = ()

    def start(self) -> Sums:
        """Of no rows."""
        zero = jnp.float32(0)
        return Sums(zero, zero, zero, zero, dict.fromkeys(self.shares, zero))
