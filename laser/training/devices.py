"""How a config fits a number of devices: the mesh that it asks for, and the batch on it."""

import dataclasses
import math
from typing import Any

from laser.training.config import MeshConfig, RunConfig, check_tensor_axis
from laser.training.fields import multiples
from models.config import require


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> MeshConfig:
    """Puts a number in place of -1. Raises ValueError unless the axes multiply to the devices."""
    axes = mesh.axes()
    fixed = math.prod(size for size in axes.values() if size != -1)
    text = " x ".join(f"mesh.{name}={size}" for name, size in axes.items())
    if -1 not in axes.values():
        require(
            fixed == num_devices,
            f"{text} is a mesh of {fixed} devices, but there are {num_devices}; set one axis to -1",
        )
        return mesh
    require(
        num_devices % fixed == 0,
        f"{text}: {num_devices} devices do not divide by {fixed}; change an axis that is not -1",
    )
    filled: dict[str, Any] = {
        name: num_devices // fixed if size == -1 else size for name, size in axes.items()
    }
    return dataclasses.replace(mesh, **filled)


def check_devices(config: RunConfig, num_devices: int, slices: int = 1) -> MeshConfig:
    """The mesh of a run on so many devices. Raises ValueError if model or batch do not fit."""
    mesh = resolve_mesh(config.mesh, num_devices)
    require(
        mesh.data % slices == 0,
        f"mesh.data={mesh.data}: must be a multiple of {slices}, the number of slices, which hold "
        f"copies of the parameters; use --config.mesh.data={slices}",
    )
    check_tensor_axis(config.model, mesh.tensor)
    training = config.training
    rows, shards = training.batch_size // training.accumulation, mesh.data * mesh.fsdp
    require(
        rows % shards == 0,
        f"training.batch_size={training.batch_size} / training.accumulation="
        f"{training.accumulation} = {rows} rows: must be a multiple of mesh.data={mesh.data} x "
        f"mesh.fsdp={mesh.fsdp} = {shards}; use a batch_size of "
        f"{multiples(training.batch_size, shards * training.accumulation)}",
    )
    return mesh
