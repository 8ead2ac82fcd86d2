"""The device mesh and the one table that says how every parameter is laid out on it.

Mesh axes: `data` holds copies, `fsdp` splits parameters, optimizer state and batch, `tensor` splits
heads, MLP columns and vocabulary. Optimizer moments have the parameters' paths and so their layout.
"""

import functools
import math
import re
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from laser.training.config import RunConfig, check_devices

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# First match wins; a parameter that no row matches is an error. The first dim of `blocks` is
# layers.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"^embedding$", PartitionSpec("tensor", "fsdp")),
    (r"^blocks/attention/(query|key|value)$", PartitionSpec(None, "fsdp", "tensor", None)),
    (r"^blocks/attention/output$", PartitionSpec(None, "tensor", None, "fsdp")),
    (r"^blocks/mlp/up$", PartitionSpec(None, "fsdp", "tensor")),
    (r"^blocks/mlp/down$", PartitionSpec(None, "tensor", "fsdp")),
    (r"^(blocks/.*|final_)norm/(scale|bias)$", PartitionSpec()),
    (r"^blocks/attention/(lambda_|log_temperature|output_norm_scale)", PartitionSpec()),
)


def make_mesh(config: RunConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The config's mesh over all devices; ValueError where they do not fit together."""
    devices = jax.devices() if devices is None else devices
    mesh = check_devices(config, len(devices))
    shape = (mesh.data, mesh.fsdp, mesh.tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def single_device_mesh() -> Mesh:
    """The mesh of the first device alone."""
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((1,) * len(AXES), AXES, axis_types=axis_types, devices=jax.devices()[:1])


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function`, to be jitted, traced with `mesh` in context: kernels ask for it to be split."""

    @functools.wraps(function)
    def traced(*arguments):
        with use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def parameter_spec(path: str) -> PartitionSpec:
    """The table's entry for a parameter path such as 'blocks/mlp/up'."""
    for pattern, spec in PARAMETER_RULES:
        if re.search(pattern, path):
            return spec
    raise ValueError(f"parameter {path!r}: no row of PARAMETER_RULES in {__name__} matches it")


def state_shardings(mesh: Mesh, state):
    """A NamedSharding for every leaf of a TrainState, or of parameters; scalars are replicated.

    Args:
      mesh: of `make_mesh`.
      state: a tree of arrays or ShapeDtypeStructs.

    Raises:
      ValueError: a dim that its mesh axes do not divide, or a parameter without a rule.
    """

    def sharding(path, leaf):
        if leaf.ndim == 0 and not _has_parameter_path(path):
            return NamedSharding(mesh, PartitionSpec())
        name = "/".join(key.key for key in path if hasattr(key, "key"))
        spec = parameter_spec(name)
        _check_divides(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def _has_parameter_path(path) -> bool:
    return any(hasattr(key, "key") for key in path)


def _check_divides(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    for dim, axis in zip(shape, spec, strict=False):
        if axis is not None and dim % mesh.shape[axis]:
            divisor = math.gcd(dim, mesh.shape[axis])
            raise ValueError(
                f"mesh.{axis}={mesh.shape[axis]} does not divide dim {dim} of parameter {name} "
                f"{shape}; use a divisor of {dim}, such as {divisor}"
            )
