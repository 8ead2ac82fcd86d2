"""The device mesh and the one table that says how every parameter is laid out on it.

Axes of a config: `data` holds copies, `fsdp` splits parameters, optimizer state and batch, `tensor`
splits heads, MLP columns and vocabulary. Over several slices of TPUs the copies lie on different
slices. Optimizer moments have the parameters' paths and so their layout.

The mesh itself may have several fsdp axes, `fsdp`, `fsdp_1`, `fsdp_2`: one for each axis of the
torus that TPUs are wired in, because XLA reduce-scatters along one of those only, and because no
dim of the 7.7B divides by 256 (3440 = 16 · 215, 11584 = 64 · 181, 16 heads of 720), while 16 times
16 goes into two of them.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from laser.training.config import RunConfig
from laser.training.devices import check_devices
from models.families import Parameters, abstract_parameters

TENSOR = "tensor"
AXES = ("data", "fsdp", TENSOR)  # of a mesh with one fsdp axis
AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class Rule:
    """How parameters of a path are laid out.

    Attributes:
      pattern: regular expression of the path.
      tensor: the dim that the tensor axis splits, None for none.
      fsdp: dims that fsdp axes may split. The first one that all of them divide takes them all;
        where there is none, each axis is taken by the last one that it divides.
    """

    pattern: str
    tensor: int | None = None
    fsdp: tuple[int, ...] = ()


# First match wins; a parameter that no row matches is an error. The first dim of `blocks` is
# layers. Dims are (V, M), (L, M, heads, D), (L, M, F), (L, F, M); a weight is gathered fastest
# along its first.
PARAMETER_RULES = (
    Rule(r"^embedding$", tensor=0, fsdp=(0, 1)),
    Rule(r"^blocks/attention/(query|key|value|output)$", tensor=2, fsdp=(1, 2, 3)),
    Rule(r"^blocks/mlp/(gate|up)$", tensor=2, fsdp=(1, 2)),
    Rule(r"^blocks/mlp/down$", tensor=1, fsdp=(1, 2)),
    Rule(r"^(patches|pre_logits|head)/kernel$", tensor=1, fsdp=(0, 1)),
    Rule(r"^(patches|pre_logits|head)/bias$", tensor=0),
    Rule(r"^blocks/attention/(query|key|value)_bias$", tensor=1),
    Rule(r"^blocks/mlp/up_bias$", tensor=1),
    Rule(r"^blocks/(attention/output|mlp/down)_bias$"),
    # The Conformer's: (3, 3, channels, M), (bins, M, M); of blocks (L, M, F) and back, (L, M, M)
    # and (L, positions, 1, M).
    Rule(r"^subsampling/(first|second)/kernel$", fsdp=(3, 2)),
    Rule(r"^(subsampling/output|blocks/convolution/(value|gate|output))/kernel$", fsdp=(1, 2)),
    Rule(r"^blocks/(first|second)/up/kernel$", tensor=2, fsdp=(1, 2)),
    Rule(r"^blocks/(first|second)/up/bias$", tensor=1),
    Rule(r"^blocks/(first|second)/down/kernel$", tensor=1, fsdp=(1, 2)),
    Rule(r"^blocks/convolution/(kernel|batch_norm/(mean|variance))$"),
    Rule(r"^(subsampling|blocks/(first|second|convolution))/.*bias$|offset$"),
    Rule(r"^(blocks/.*|final_)norm/(scale|bias)$"),
    Rule(r"^blocks/attention/(lambda_|log_temperature|output_norm_scale)"),
)


def make_mesh(config: RunConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The config's mesh over all devices, neighbours on the mesh being neighbours in the machine.

    Args:
      config: of the run.
      devices: all there are if None. They may lie on several slices, or only be described
        (jax.experimental.topologies).

    Raises:
      ValueError: config and devices do not fit together, or too much would stay unsharded.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", None) for device in devices})
    sizes = check_devices(config, len(devices), slices)
    last_error: Exception | None = None
    for fsdp in _fsdp_factors(config, sizes.fsdp, sizes.tensor, _torus(devices)):
        names = _axis_names(len(fsdp))
        shape = (sizes.data // slices, *fsdp, sizes.tensor)
        try:
            array = _arrange(shape, slices, devices)
        except NotImplementedError as error:  # not a product of the machine's own axes
            last_error = error
            continue
        return Mesh(array, names, axis_types=(AxisType.Auto,) * len(names))
    raise ValueError(
        f"mesh of data={sizes.data}, fsdp={sizes.fsdp}, tensor={sizes.tensor}: {last_error}"
    )


def _torus(devices: Sequence[jax.Device]) -> tuple[int, ...]:
    """Sizes of the axes of a slice of TPUs; () for other devices."""
    coords = np.array([getattr(device, "coords", ()) for device in devices])
    return tuple(int(size) for size in np.ptp(coords, axis=0) + 1) if coords.size else ()


def _arrange(shape: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as an array; NotImplementedError if an axis is no product of physical axes."""
    if slices > 1:
        across = (slices,) + (1,) * (len(shape) - 1)
        return mesh_utils.create_hybrid_device_mesh(shape, across, devices)
    return mesh_utils.create_device_mesh(shape, devices)


def _axis_names(num_fsdp: int) -> tuple[str, ...]:
    return ("data", "fsdp", *(f"fsdp_{i}" for i in range(1, num_fsdp)), TENSOR)


def _fsdp_factors(
    config: RunConfig, fsdp: int, tensor: int, torus: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Ways to split the fsdp axis under which the parameters divide, the best one first.

    That is along the axes of the torus, else as few as possible.
    """
    params = abstract_parameters(config.model)
    shares = {}
    for factors in _factorizations(fsdp):
        mesh = AbstractMesh((1, *factors, tensor), _axis_names(len(factors)))
        shares[factors] = unsharded_share(mesh, params)
    best = min(shares, key=lambda factors: shares[factors])
    if shares[best] > config.mesh.max_unsharded:
        mesh = AbstractMesh((1, *best, tensor), _axis_names(len(best)))
        sizes = unsharded(mesh, params)
        worst = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"mesh.fsdp={fsdp} leaves {100 * shares[best]:.1f} % of the parameters' bytes "
            f"unsharded (mesh.max_unsharded={config.mesh.max_unsharded}), {worst} "
            f"{_leaves(params)[worst].shape} most of all; use a mesh.fsdp that divides its dims"
        )
    usable = [f for f in shares if shares[f] <= max(shares[best], 0.1 * config.mesh.max_unsharded)]

    def along_torus(factors):
        return not collections.Counter(factors) - collections.Counter(torus)

    return sorted(usable, key=lambda f: (not along_torus(f), len(f), max(f)))


def _factorizations(number: int) -> Iterator[tuple[int, ...]]:
    """(number,) and all its products of up to three factors, in any order."""
    yield (number,)
    for a in range(2, number):
        if number % a == 0:
            yield (a, number // a)
            rest = number // a
            yield from ((a, b, rest // b) for b in range(2, rest) if rest % b == 0)


def single_device_mesh() -> Mesh:
    """The mesh of the first device alone."""
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((1,) * len(AXES), AXES, axis_types=axis_types, devices=jax.devices()[:1])


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function`, to be jitted, traced with `mesh` in context: `over_batch` and kernels ask it."""

    @functools.wraps(function)
    def traced(*arguments):
        with use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def batch_axes(mesh: AnyMesh) -> tuple[str, ...]:
    """The mesh axes that split the rows of a batch."""
    return tuple(name for name in mesh.axis_names if name != TENSOR)


def batch_shards(mesh: AnyMesh) -> int:
    """In how many parts a batch is split."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first dim is rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def parameter_rule(path: str) -> Rule:
    """The table's row for a parameter path such as 'blocks/mlp/up'."""
    for rule in PARAMETER_RULES:
        if re.search(rule.pattern, path):
            return rule
    raise ValueError(f"parameter {path!r}: no row of PARAMETER_RULES in {__name__} matches it")


def parameter_spec(mesh: AnyMesh, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The layout of a parameter. An fsdp axis that divides none of its dims holds copies of it.

    Raises:
      ValueError: a parameter without a rule, or a dim that the tensor axis does not divide.
    """
    rule = parameter_rule(path)
    axes: list[tuple[str, ...]] = [()] * len(shape)
    left = list(shape)
    if rule.tensor is not None and mesh.shape[TENSOR] > 1:
        _check_divides(path, shape, rule.tensor, mesh.shape[TENSOR])
        left[rule.tensor] //= mesh.shape[TENSOR]
    names = [name for name in batch_axes(mesh)[1:] if mesh.shape[name] > 1]
    whole = math.prod(mesh.shape[name] for name in names)
    for_all = next((dim for dim in rule.fsdp if left[dim] % whole == 0), None)
    for name in names:
        size = mesh.shape[name]
        one = next((dim for dim in reversed(rule.fsdp) if left[dim] % size == 0), None)
        dim = one if for_all is None else for_all
        if dim is not None:
            axes[dim] += (name,)
            left[dim] //= size
    if rule.tensor is not None and mesh.shape[TENSOR] > 1:
        axes[rule.tensor] += (TENSOR,)  # last, so that fsdp shards are contiguous
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in axes))


def _check_divides(name: str, shape: tuple[int, ...], dim: int, size: int) -> None:
    if shape[dim] % size:
        raise ValueError(
            f"mesh.{TENSOR}={size} does not divide dim {shape[dim]} of parameter {name} {shape}; "
            f"use a divisor of {shape[dim]}, such as {math.gcd(shape[dim], size)}"
        )


def parameter_specs(mesh: AnyMesh, params: Parameters) -> Parameters:
    """The layout of every parameter, in a tree of their structure."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: parameter_spec(mesh, name_of(path), leaf.shape), params
    )


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A NamedSharding for every leaf of a TrainState, or of parameters; counters are replicated.

    Args:
      mesh: of `make_mesh`.
      state: a tree of arrays or ShapeDtypeStructs.

    Raises:
      ValueError: as `parameter_spec`.
    """

    def sharding(path, leaf):
        if not name_of(path):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, parameter_spec(mesh, name_of(path), leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def described(abstract: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with their shardings, from a tree of each."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def placed(array: np.ndarray, where: NamedSharding) -> jax.Array:
    """A global array of which every host makes its own part."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def name_of(path: tuple) -> str:
    """The name of a parameter at this tree path, such as 'blocks/mlp/up'; also of its moments."""
    return "/".join(key.key for key in path if hasattr(key, "key"))


def _leaves(params: Parameters) -> dict[str, Any]:
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def unsharded(mesh: AnyMesh, params: Parameters) -> dict[str, int]:
    """Path → bytes of the parameters that some fsdp axis of more than one device does not split."""
    wanted = {name for name in batch_axes(mesh)[1:] if mesh.shape[name] > 1}
    found = {}
    for name, leaf in _leaves(params).items():
        if wanted - set(axes_of(parameter_spec(mesh, name, leaf.shape))):
            found[name] = leaf.size * leaf.dtype.itemsize
    return found


def unsharded_share(mesh: AnyMesh, params: Parameters) -> float:
    """The share of the parameters' bytes, and so of the state's, that is in `unsharded`: 0 to 1."""
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in _leaves(params).values())
    return sum(unsharded(mesh, params).values()) / total


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes that a layout uses, in order."""
    return tuple(name for names in per_dim(spec) for name in names)


def per_dim(spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of every dim."""
    return tuple((names,) if isinstance(names, str) else tuple(names or ()) for names in spec)
