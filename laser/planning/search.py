"""Looks for the mesh, the number of micro-batches and the remat policy that make a step fastest.

Candidates are ranked by what is counted by hand, and compiled in that order until a few fit: a
program that does not fit is refused within seconds, one that does takes the compiler a minute, and
with its layers unrolled some.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args, get_type_hints

from laser.planning.plan import Plan, TooLarge, estimated_peak_gib, make_plan
from laser.planning.topologies import Topology
from laser.training import roofline
from laser.training.config import MeshConfig, RunConfig
from laser.training.devices import check_devices
from laser.training.hardware import CHIPS

LARGEST_TENSOR = 8
SLACK = 1.3  # the hand-counted peak may be too high by this factor before a candidate is left out
TRIES = 12  # programs that do not fit, before giving up

Candidate = tuple[RunConfig, MeshConfig]
Log = Callable[[str], None]


def candidates(config: RunConfig, topology: Topology, attention: str) -> list[Candidate]:
    """All that could fit, the fastest by hand-counted bounds first.

    Args:
      config: whose mesh, accumulation and remat policy are varied.
      topology: the slices.
      attention: implementation of attention, chunked or pallas.
    """
    chip = CHIPS[topology.device_kind]

    def cost(candidate: Candidate) -> tuple[float, float]:
        bound = roofline.analytic_bound(*candidate, chip, attention)
        # The largest of the three decides; what it leaves to the others does not overlap wholly.
        rest = bound.compute + bound.memory + bound.interconnect - bound.seconds
        return bound.seconds + 0.1 * rest, estimated_peak_gib(*candidate)

    capacity = chip.hbm_gib * SLACK
    possible = [
        candidate
        for candidate in _variants(config, topology)
        if estimated_peak_gib(*candidate) <= capacity
    ]
    return sorted(possible, key=cost)


def _variants(config: RunConfig, topology: Topology) -> Iterator[Candidate]:
    rows = config.training.batch_size
    policies = get_args(get_type_hints(type(config.model))["remat"])
    for mesh in _meshes(topology):
        for accumulation in _powers_of_two(rows // (mesh.data * mesh.fsdp)):
            for remat in policies:
                variant = _with(config, mesh, accumulation, remat)
                if variant is not None:
                    yield variant, mesh


def _meshes(topology: Topology) -> Iterator[MeshConfig]:
    per_slice = topology.chips // topology.slices
    for tensor in _powers_of_two(min(LARGEST_TENSOR, per_slice)):
        for copies in _powers_of_two(per_slice // tensor):
            fsdp = per_slice // tensor // copies
            yield MeshConfig(data=copies * topology.slices, fsdp=fsdp, tensor=tensor)


def _powers_of_two(largest: int) -> Iterator[int]:
    power = 1
    while power <= largest:
        yield power
        power *= 2


def _with(config: RunConfig, mesh: MeshConfig, accumulation: int, remat: Any) -> RunConfig | None:
    """The config with another layout, or None if they do not fit together."""
    try:
        mesh = dataclasses.replace(config.mesh, data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor)
        training = dataclasses.replace(config.training, accumulation=accumulation)
        model = dataclasses.replace(config.model, remat=remat)
        variant = dataclasses.replace(config, mesh=mesh, training=training, model=model)
        check_devices(variant, mesh.data * mesh.fsdp * mesh.tensor)
    except ValueError:
        return None
    return variant


def search(
    config: RunConfig, topology: Topology, devices: Sequence, attention: str, wanted: int, log: Log
) -> list[tuple[RunConfig, Plan]]:
    """Compiles candidates in order until `wanted` of them fit. The fastest by its bounds first."""
    found: list[tuple[RunConfig, Plan]] = []
    too_large = 0
    impossible: set[MeshConfig] = set()
    for candidate, mesh in candidates(config, topology, attention):
        if mesh in impossible:
            continue
        try:
            plan = make_plan(candidate, topology, devices)
        except ValueError:  # not of the torus' own axes, or it does not divide the parameters
            impossible.add(mesh)
            log(f"no such mesh: {' '.join(flags(candidate)[:3])}")
            continue
        if isinstance(plan, TooLarge) or plan.fits is False:
            too_large += 1
            log(f"does not fit: {' '.join(flags(candidate))}")
        else:
            found.append((candidate, plan))
            fits = "fits in" if plan.fits else "on simulated CPUs, without libtpu, takes"
            log(f"{fits} {plan.peak_gib:.2f} GiB: {' '.join(flags(candidate))}")
        if len(found) == wanted or too_large == TRIES:
            break

    def time(entry: tuple[RunConfig, Plan]) -> tuple[float, float]:
        bound = entry[1].bound
        return max(bound.values()), sum(bound.values())

    return sorted(found, key=time)


def flags(config: RunConfig) -> list[str]:
    """The command-line flags that give the layout of a candidate, as it was planned."""
    return [
        f"--config.mesh.data={config.mesh.data}",
        f"--config.mesh.fsdp={config.mesh.fsdp}",
        f"--config.mesh.tensor={config.mesh.tensor}",
        f"--config.training.accumulation={config.training.accumulation}",
        f"--config.model.remat={config.model.remat}",
        f"--config.model.unroll={config.model.unroll}",
    ]
