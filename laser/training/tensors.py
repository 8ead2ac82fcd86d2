"""The tensors of a state by their names: types and checksums, as checkpoints record them.

A checksum is the wrapping sum of the tensor's 32-bit words: it does not depend on the mesh or the
order of summation, so a restore onto any other mesh is verified bit for bit.
"""

from typing import Any

import jax
import jax.numpy as jnp


def tensor_types(state: Any) -> dict[str, str]:
    """Path of each tensor of a tree → its type, such as "float32[8,300]"."""
    return {name: f"{x.dtype}[{','.join(map(str, x.shape))}]" for name, x in _named(state).items()}


@jax.jit
def checksums(state: Any) -> dict[str, jax.Array]:
    """Path of each tensor → wrapping sum of its 32-bit words, uint32."""

    def words(x):
        if x.dtype.itemsize != 4:
            raise ValueError(f"checkpoints hold 32-bit tensors, got {x.dtype}")
        return jax.lax.bitcast_convert_type(x, jnp.uint32).sum(dtype=jnp.uint32)

    return {name: words(x) for name, x in _named(state).items()}


def _named(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
