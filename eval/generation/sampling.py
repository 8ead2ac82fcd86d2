"""How the next token is chosen from its logits.

Shapes: B rows, V vocabulary.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from models.config import require


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ValueError for values without a meaning.

    temperature: logits are divided by it; 0 takes the likeliest token always.
    top_k: only the k likeliest tokens are drawn from; 0 for all.
    top_p: only the likeliest tokens that together have this probability are drawn from; 1 for all.
      It counts among those that top_k leaves.
    seed: the draws are a function of it and the prompt's place in the list.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        require(
            0 <= self.temperature < float("inf"),
            f"temperature={self.temperature}: must be 0 (the likeliest token) or positive",
        )
        require(self.top_k >= 0, f"top_k={self.top_k}: must be 0 (all tokens) or positive")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1 (all)")
        require(0 <= self.seed < 2**31, f"seed={self.seed}: must be from 0 to {2**31 - 1}")

    @property
    def mode(self) -> Literal["greedy", "all", "some"]:
        if self.temperature == 0:
            return "greedy"
        return "some" if self.top_k or self.top_p < 1 else "all"


GREEDY = Sampling()


def choose(logits_BV, keys_B, temperature, top_k, top_p, *, mode: str):
    """The next token of each row, (B,) int32. Arguments as in `Sampling`; top_k and top_p count in
    mode "some" alone, temperature not in mode "greedy"."""
    if mode == "greedy":
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature  # finite
    if mode == "some":
        logits_BV = keep_likeliest(logits_BV, top_k, top_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def keep_likeliest(logits_BV, top_k, top_p):
    """-inf in place of all but the top_k largest, and of all but the likeliest of those that have a
    probability of top_p together. Equal logits stay or go together."""
    vocabulary = logits_BV.shape[-1]
    ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    rank = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary) - 1
    limit_B1 = jax.lax.dynamic_slice_in_dim(ordered_BV, rank, 1, axis=-1)
    ordered_BV = jnp.where(ordered_BV >= limit_B1, ordered_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(ordered_BV, axis=-1)
    likelier_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    needed_BV = (likelier_BV < top_p) | (top_p >= 1)
    smallest_B1 = jnp.where(needed_BV, ordered_BV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= jnp.maximum(limit_B1, smallest_B1), logits_BV, -jnp.inf)
