"""What is known of a run before it is started: the numbers of one compiled train step."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from laser.attention.kernels.blocks import block_sizes, vmem_limit
from laser.planning.collectives import Collective
from laser.planning.compile import GIB, Compiled, OutOfMemory, compile_step
from laser.planning.schedule import Links, Schedule, read_schedule
from laser.planning.topologies import CORES_PER_CHIP, Topology, has_libtpu
from laser.training import roofline, sharding
from laser.training.config import MeshConfig, RunConfig
from laser.training.devices import check_devices
from laser.training.hardware import CHIPS
from models.families import abstract_parameters

COPY = "slices"  # stands for the network between slices among the torus' axes


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same mesh axes."""

    kind: str
    axes: str
    dtype: str
    count: int
    gib: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a described slice. GiB are of a chip, seconds and FLOPs of a step.

    Attributes:
      topology, rented_as, chips: the slices.
      mesh: sizes of all mesh axes.
      accumulation, remat, unroll, attention: of the config; the implementation that was compiled.
      fits: None if it cannot be known, without libtpu.
      capacity_gib, peak_gib: what a program may use and what this one does.
      parameters_gib, optimizer_gib, kept_gib, temporaries_gib: parts of it; `kept` lies within
        `temporaries`, but for what the tensor axis splits of it.
      model_flops, recomputed_flops: all chips.
      traffic: collectives that move more than a thousandth of all bytes.
      bound, binding: seconds by resource, and which of them is the largest.
      mfu, tokens_per_second: that the bound allows.
      hours, chip_hours: of the config's steps, at the bound; None if it counts in epochs, whose
        number of steps the data decide.
      unsharded: share of the parameters' bytes that fsdp does not split.
      schedule, schedule_mfu, schedule_hours: of the compiled program, and the MFU and the hours of
        all steps by its seconds; None without libtpu, and the hours as those at the bound.
      compile_seconds, compile_gb: of the plan itself.
    """

    topology: str
    rented_as: str
    slices: int
    chips: int
    mesh: dict[str, int]
    accumulation: int
    remat: str
    unroll: bool
    attention: str
    fits: bool | None
    capacity_gib: float
    peak_gib: float
    parameters_gib: float
    optimizer_gib: float
    kept_gib: float
    temporaries_gib: float
    model_flops: float
    recomputed_flops: float
    traffic: list[Traffic]
    bound: dict[str, float]
    binding: str
    mfu: float
    tokens_per_second: float
    hours: float | None
    chip_hours: float | None
    unsharded: float
    compile_seconds: float
    compile_gb: float
    schedule: Schedule | None
    schedule_mfu: float | None
    schedule_hours: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def seconds(self) -> float:
        return self.bound[self.binding]


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A run that does not fit, and how much the compiler asked for (0: it does not say)."""

    needed_gib: float
    capacity_gib: float


def make_plan(config: RunConfig, topology: Topology, devices: Sequence) -> Plan | TooLarge:
    """Compiles the config's train step for the slices.

    Raises:
      ValueError: the config does not fit so many devices.
    """
    try:
        mesh, compiled = compile_step(config, devices)
    except OutOfMemory as error:
        return TooLarge(error.needed, error.available)
    sizes = check_devices(config, len(devices))
    return _plan(config, topology, sizes, mesh, compiled)


def _plan(
    config: RunConfig, topology: Topology, sizes: MeshConfig, mesh: Mesh, compiled: Compiled
) -> Plan:
    chip = CHIPS[topology.device_kind]
    bound = roofline.analytic_bound(config, sizes, chip, compiled.attention)
    interconnect, between = _network_seconds(topology, mesh, compiled.collectives)
    bound = dataclasses.replace(bound, interconnect=interconnect, slices=between)
    tokens = config.training.batch_size * config.data.seq_len
    steps = config.training.steps
    hours = bound.seconds * steps / 3600 if steps else None
    known = has_libtpu()
    schedule = _schedule(config, topology, mesh, compiled) if known else None
    peak = compiled.peak / GIB
    params = abstract_parameters(config.model)
    return Plan(
        topology=topology.name,
        rented_as=topology.rented_as,
        slices=topology.slices,
        chips=topology.chips,
        mesh=dict(mesh.shape),
        accumulation=config.training.accumulation,
        remat=config.model.remat,
        unroll=config.model.unroll,
        attention=compiled.attention,
        fits=peak <= chip.hbm_gib if known else None,
        capacity_gib=chip.hbm_gib,
        peak_gib=peak,
        parameters_gib=compiled.parameters / GIB,
        optimizer_gib=compiled.optimizer / GIB,
        kept_gib=compiled.kept / GIB,
        temporaries_gib=compiled.temporaries / GIB,
        model_flops=roofline.model_flops(config),
        recomputed_flops=roofline.recomputed_flops(config, compiled.attention),
        traffic=_traffic(compiled.collectives),
        bound=dataclasses.asdict(bound),
        binding=bound.binding,
        mfu=roofline.mfu(config, topology.chips, chip, bound.seconds),
        tokens_per_second=tokens / bound.seconds,
        hours=hours,
        chip_hours=None if hours is None else hours * topology.chips,
        unsharded=sharding.unsharded_share(mesh, params),
        compile_seconds=compiled.seconds,
        compile_gb=compiled.gb,
        schedule=schedule,
        schedule_mfu=(
            roofline.mfu(config, topology.chips, chip, schedule.seconds) if schedule else None
        ),
        schedule_hours=schedule.seconds * steps / 3600 if schedule and steps else None,
    )


def _schedule(config: RunConfig, topology: Topology, mesh: Mesh, compiled: Compiled) -> Schedule:
    chip = CHIPS[topology.device_kind]
    cores = CORES_PER_CHIP[topology.chip]
    bundles = {name: count / cores for name, count in compiled.bundles.items()}
    if not _one_block(config, topology):
        bundles = {}  # of which a causal mask leaves out some: their roofline counts right
    links = _links(topology, mesh)
    return read_schedule(compiled.module, dict(mesh.shape), chip, links, bundles)


def _one_block(config: RunConfig, topology: Topology) -> bool:
    """Whether the attention kernels take a row and head in one step."""
    model, length = config.model, config.data.seq_len
    itemsize = 2 if model.dtype == "bfloat16" else 4
    grouped = model.kv_heads != model.num_heads
    limit = vmem_limit(topology.device_kind)
    sizes = block_sizes(length, model.query_dim, model.head_dim, itemsize, grouped, limit)
    return length <= sizes.block


def _links(topology: Topology, mesh: Mesh) -> Links:
    """From mesh axes to the axes of the torus, and the bytes/s that a chip receives along them."""
    chip = CHIPS[topology.device_kind]
    along = {name: _torus_axes(mesh, topology, i) for i, name in enumerate(mesh.axis_names)}

    counts = _link_counts(topology)

    def links(axes: tuple[str, ...]) -> tuple[frozenset, float]:
        held: frozenset = frozenset().union(*(along[name] for name in axes))
        if COPY in held:
            return held, chip.slice_bandwidth
        return held, chip.link_bandwidth * sum(counts[axis] for axis in held)

    return links


def _link_counts(topology: Topology) -> dict[int, int]:
    """Axis of the torus → links of a chip along it: two where the axis closes to a ring."""
    return {axis: 2 if closes else 1 for axis, closes in enumerate(topology.wrap)}


def _traffic(found: Sequence[Collective]) -> list[Traffic]:
    sums: dict[tuple[str, str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for one in found:
        key = (one.kind, " ".join(one.axes), one.dtype)
        sums[key][0] += one.count
        sums[key][1] += one.bytes / GIB
    total = sum(gib for _, gib in sums.values())
    rows = [Traffic(*key, int(count), gib) for key, (count, gib) in sums.items()]
    return sorted((row for row in rows if row.gib > total / 1000), key=lambda row: -row.gib)


def _network_seconds(
    topology: Topology, mesh: Mesh, found: Sequence[Collective]
) -> tuple[float, float]:
    """Lower bounds from links within a slice, and from the network between slices (0: unknown)."""
    chip = CHIPS[topology.device_kind]
    along = {name: _torus_axes(mesh, topology, i) for i, name in enumerate(mesh.axis_names)}
    links = {axis: n for axis, n in _link_counts(topology).items() if topology.shape[axis] > 1}
    received: dict[frozenset[int], float] = collections.defaultdict(float)
    between = 0.0
    for one in found:
        axes: frozenset = frozenset().union(*(along[name] for name in one.axes))
        if COPY in axes:
            between += one.bytes
        elif axes:
            received[axes] += one.bytes
    inside = roofline.torus_seconds(received, links, chip.link_bandwidth)
    return inside, between / chip.slice_bandwidth if chip.slice_bandwidth else 0.0


def _torus_axes(mesh: Mesh, topology: Topology, axis: int) -> frozenset:
    """The axes of the torus that a step along a mesh axis changes."""
    lines = np.moveaxis(mesh.devices, axis, 0).reshape(mesh.devices.shape[axis], -1)[:, 0]
    if not hasattr(lines[0], "coords"):  # simulated devices: as if along all of the torus
        return frozenset(range(len(topology.shape))) if len(lines) > 1 else frozenset()
    coords = np.array([device.coords for device in lines])
    changed = {i for i in range(coords.shape[1]) if len(set(coords[:, i])) > 1}
    slices = {getattr(device, "slice_index", 0) for device in lines}
    return frozenset(changed | ({COPY} if len(slices) > 1 else set()))


def estimated_peak_gib(config: RunConfig, mesh: MeshConfig) -> float:
    """A guess without compiling, to leave out what cannot fit.

    State, kept activations, and what a layer needs at a time: its weights and their gradient twice,
    the widest activation in float32 thrice; or for the loss two chunks of logits and the embedding.
    """
    model = config.model
    layers = roofline.parameter_count(model) - model.outer_weights
    itemsize = 2 if model.dtype == "bfloat16" else 4
    widest = max(model.mlp_dim, model.num_heads * model.head_dim)
    layer = 4 * itemsize * layers / model.num_layers / mesh.tensor
    layer += 12 * roofline.tokens_per_chip(config, mesh) * widest / mesh.tensor
    embedding = 3 * 4 * model.outer_weights / mesh.tensor
    gradient = 0.0
    if config.training.accumulation > 1:
        gradient = 4 * roofline.parameter_count(model) / (mesh.fsdp * mesh.tensor)
    total = roofline.state_bytes(config, mesh) + roofline.kept_bytes(config, mesh) + gradient
    return (total + max(layer, embedding)) / GIB
