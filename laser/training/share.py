"""The work of one device under data and fsdp parallelism, written out instead of left to XLA.

Every device computes its own rows of the batch and asks for the whole weights of a layer when it
comes to the layer; the backward pass asks again and returns their gradient to the devices that own
the parts. Left to itself, XLA's partitioner all-reduces whole gradients, and does not always keep
activations split by rows. The tensor axis, where there is one, is still its work.

Split weights are gathered in the compute dtype, and their gradients are summed in it over the
devices that share them. Sums over micro-batches, over the data axis, and of what is not split are
float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from laser.training import compiler, sharding
from models.families import Parameters

Array = jax.Array
Result = TypeVar("Result")

Axes = tuple[tuple[str, ...], ...]  # of every dim of an array, the mesh axes that split it


def over_batch(
    function: Callable[[Parameters, Any, "Share"], Result],
    params: Parameters,
    batch: Any,
    out: Callable[[Any, Any], Any],
) -> Result:
    """function(params, batch, share) on every device, with its rows and its parts of parameters.

    Without a mesh in context, or on one that does not split the batch, it is called as it is.

    Args:
      function: asks `share` for whole weights, and to add up over devices.
      params: of the model.
      batch: a tree of arrays whose first dim is rows.
      out: from the layouts of parameters and batch to those of the results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or sharding.batch_shards(mesh) == 1:
        return function(params, batch, Share())
    axes = sharding.batch_axes(mesh)
    specs = jax.tree.map(
        functools.partial(_only, axes),
        sharding.parameter_specs(mesh, params),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    rows = PartitionSpec(axes)
    return jax.shard_map(
        lambda params, batch: function(params, batch, Share(axes, specs)),
        in_specs=(specs, rows),
        out_specs=out(specs, rows),
        # Kernels may run only where no axis is left to the compiler, not even one of one device.
        axis_names={name for name in mesh.axis_names if name in axes or mesh.shape[name] == 1},
        check_vma=False,  # sums over devices are stated here; kernels do not say how theirs vary
    )(params, batch)


def _only(axes: Sequence[str], spec: PartitionSpec) -> PartitionSpec:
    kept = (tuple(name for name in names if name in axes) for names in sharding.per_dim(spec))
    return PartitionSpec(*(names or None for names in kept))


@dataclasses.dataclass(frozen=True)
class Share:
    """A device's part of the work within `over_batch`; all of it where nothing is split.

    Attributes:
      axes: mesh axes that split the batch.
      specs: how these split each parameter.
    """

    axes: tuple[str, ...] = ()
    specs: Parameters = dataclasses.field(default_factory=dict)

    def whole(self, name: str, part: Any, dtype: jnp.dtype) -> Any:
        """Parameters from all devices: of 'blocks' one layer's, of another name the tree there.

        What is split arrives in `dtype`; so its gradient goes back, added up over the devices that
        share it.
        """
        if not self.axes:
            return part
        first = 1 if name == "blocks" else 0  # the dim of layers is gone

        def gather(x, spec):
            axes = sharding.per_dim(spec)[first:]
            axes += ((),) * (x.ndim - len(axes))  # a layout leaves out what its last dims have not
            return _gather(x.astype(dtype), axes) if any(axes) else x

        return jax.tree.map(gather, part, self.specs[name])

    def gatherer(self, dtype: jnp.dtype) -> Callable[[str, Any], Any] | None:
        """`whole` for a call of the model; None where there is nothing to gather."""
        return functools.partial(self.whole, dtype=dtype) if self.axes else None

    def total(self, tree: Any) -> Any:
        """Sums over all devices."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def largest(self, x: Array) -> Array:
        """The maximum over all devices."""
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def total_gradient(self, gradient: Parameters) -> Parameters:
        """Sums gradients over the devices that `whole` has not summed over yet."""

        def total(x, spec):
            rest = tuple(name for name in self.axes if name not in sharding.axes_of(spec))
            return jax.lax.psum(x, rest) if rest else x

        return jax.tree.map(total, gradient, self.specs) if self.axes else gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(part: Array, axes: Axes) -> Array:
    """The whole of an array whose dims are split over mesh axes.

    Forms that XLA for TPUs turns into what they say (docs/compiler-notes.md): an all-gather along a
    new first dim of an array of two, over all axes at once or, for a small part, over one after the
    other; and for the gradient a reduce-scatter over one axis after the other. Else it all-reduces:
    twice the bytes. The last dim stays what it is: another one would be another layout, and a copy.
    One that is split would be joined of narrow pieces, which is slower still, so the dim with the
    longest part takes its place (`_order`).
    """
    order = _order(part.shape, axes)
    whole = _gather_in_order(part.transpose(order), tuple(axes[i] for i in order))
    return whole.transpose(np.argsort(order))


def _order(shape: Sequence[int], axes: Axes) -> list[int]:
    """The dims of a part, in the order in which it is gathered."""
    dims = range(len(shape))
    last = max(dims, key=lambda i: (shape[i], i)) if axes[-1] else len(shape) - 1
    return [i for i in dims if i != last] + [last]


def _gather_in_order(part: Array, axes: Axes) -> Array:
    sizes, names = _layout(axes)
    parts = part.reshape(-1, part.shape[-1])
    if part.size * part.dtype.itemsize < compiler.small_part_bytes():
        for name in reversed(names):
            parts = jax.lax.all_gather(parts, name)
    else:
        parts = jax.lax.all_gather(parts, names)
    parts = parts.reshape(*(n for dim in sizes for n in dim), *part.shape)
    parts = parts.transpose(_places(axes, part.ndim))
    return parts.reshape([n * math.prod(s) for n, s in zip(part.shape, sizes)])


def _layout(axes: Axes) -> tuple[list[list[int]], tuple[str, ...]]:
    """Sizes of the mesh axes of each dim, and the names of all."""
    sizes = [[jax.lax.axis_size(name) for name in names] for names in axes]
    return sizes, tuple(name for dim in axes for name in dim)


def _places(axes: Axes, ndim: int) -> list[int]:
    """Where (parts of dim 0, of dim 1, ..., dim 0, dim 1, ...) go to join the parts of each dim."""
    count = sum(map(len, axes))
    order: list[int] = []
    start = 0
    for dim in range(ndim):
        order += [*range(start, start + len(axes[dim])), count + dim]
        start += len(axes[dim])
    return order


def _gather_fwd(part: Array, axes: Axes) -> tuple[Array, None]:
    return _gather(part, axes), None


def _gather_bwd(axes: Axes, _, gradient: Array) -> tuple[Array]:
    sizes = _layout(axes)[0]
    order = _order([n // math.prod(s) for n, s in zip(gradient.shape, sizes)], axes)
    part = _scatter_in_order(gradient.transpose(order), tuple(axes[i] for i in order))
    return (part.transpose(np.argsort(order)),)


def _scatter_in_order(gradient: Array, axes: Axes) -> Array:
    sizes, names = _layout(axes)
    split: list[int] = []
    for n, parts_of_dim in zip(gradient.shape, sizes):
        split += [*parts_of_dim, n // math.prod(parts_of_dim)]
    places = _places(axes, gradient.ndim)
    parts = gradient.reshape(split).transpose([places.index(i) for i in range(len(places))])
    for name in names:
        rows = parts.reshape(jax.lax.axis_size(name), -1, split[-1])
        parts = jax.lax.psum_scatter(rows, name)
    return parts.reshape([n // math.prod(s) for n, s in zip(gradient.shape, sizes)])


_gather.defvjp(_gather_fwd, _gather_bwd)
