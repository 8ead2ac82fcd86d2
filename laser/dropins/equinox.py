"""equinox.nn.MultiheadAttention with LASER: the same constructor and parameters, and its call with
`is_causal` added.

Equinox writes its layers for one example and calls them under jax.vmap. There a choice between two
paths becomes both of them, and LASER's slow exact path would always run. So a batch by vmap becomes
the batch of `dot_product_attention` here, forward and backward.
"""

import functools

import equinox
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from laser.attention import dot_product_attention

Array = jax.Array


class MultiheadAttention(equinox.nn.MultiheadAttention):
    """log(softmax(Q Kᵀ / √D) exp(V)) of each head (arXiv 2411.03493) between the projections."""

    def __call__(  # type: ignore[override]  # without `deterministic`, which is deprecated there
        self,
        query: Array,
        key_: Array,
        value: Array,
        mask: Array | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        process_heads=None,
        is_causal: bool = False,
    ) -> Array:
        """As equinox.nn.MultiheadAttention, with LASER, and `is_causal`.

        Args:
          query: (T, query_size).
          key_: (S, key_size).
          value: (S, value_size).
          mask: (T, S) or (num_heads, T, S) bool, True where a key is seen.
          key: of no effect without dropout.
          inference: no dropout.
          process_heads: a function of the heads of query, key and value that returns them changed,
            such as rotated.
          is_causal: query t sees no key after t; a mask would take XLA's path in place of a kernel.

        Returns:
          (T, output_size).

        Raises:
          ValueError: dropout outside of inference, or shapes that do not fit.
        """
        inference = self.dropout.inference if inference is None else inference
        if self.dropout.p and not inference:
            raise ValueError(
                f"dropout_p={self.dropout.p}: LASER has no dropout of probabilities; make the "
                "layer with dropout_p=0, or call it with inference=True"
            )
        heads = (
            self._project(self.query_proj, query),
            self._project(self.key_proj, key_),
            self._project(self.value_proj, value),
        )
        if process_heads is not None:
            heads = process_heads(*heads)
        if mask is not None:
            mask = jnp.asarray(mask, bool)
            mask = mask[None] if mask.ndim == 3 else mask[None, None]
        out = _attention(*(x[None] for x in heads), mask, is_causal)[0]
        return jax.vmap(self.output_proj)(out.reshape(out.shape[0], -1))


def _as_one_batch(function):
    """`function` of arrays (B, ...), of which vmap makes longer batches."""
    function = custom_vmap(function)

    @function.def_vmap
    def rule(axis_size, in_batched, *arguments):
        def merged(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = function(*jax.tree.map(merged, arguments, tuple(in_batched)))
        split = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), out)
        return split, jax.tree.map(lambda _: True, out)

    return function


def _laser(is_causal, query, key, value, mask):
    return dot_product_attention(query, key, value, mask=mask, is_causal=is_causal, kind="laser")


def _vjp(is_causal, query, key, value, mask, d_out):
    _, vjp = jax.vjp(lambda *arrays: _laser(is_causal, *arrays, mask), query, key, value)
    return vjp(d_out)


@functools.cache
def _forward(is_causal: bool):
    return _as_one_batch(functools.partial(_laser, is_causal))


@functools.cache
def _gradients(is_causal: bool):
    return _as_one_batch(functools.partial(_vjp, is_causal))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    query: Array, key: Array, value: Array, mask: Array | None, is_causal: bool
) -> Array:
    """(1, T, N, D), (1, S, N, D), (1, S, N, D_v) and (1, N or 1, T, S) -> (1, T, N, D_v)."""
    return _forward(is_causal)(query, key, value, mask)


def _attention_fwd(query, key, value, mask, is_causal):
    return _forward(is_causal)(query, key, value, mask), (query, key, value, mask)


def _attention_bwd(is_causal, arguments, d_out):
    return *_gradients(is_causal)(*arguments, d_out), None


_attention.defvjp(_attention_fwd, _attention_bwd)
