"""Slices of TPUs by name, described to the compiler without having one.

    v5e:16x16      chips along each axis of the torus
    v5e-256        the name under which Google rents it; of v4 and v5p it counts cores, two a chip
    v5litepod-256  the same slice in the words of gcloud

libtpu, which `pip install libtpu` brings, compiles for a described slice on any x86 Linux machine.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
from collections.abc import Sequence

from laser.planning import bundles

# As the names of slices count them. (Before v4 they do, too, but there a core is a device.)
CORES_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SHAPES = {"v5e": FLAT, "v6e": FLAT, "v4": SOLID, "v5p": SOLID}
DEVICE_KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
ROUND = 16  # a flat torus closes along axes of this length; a solid one if all are multiples of 4

NO_DEVICE = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # don't ask Google Cloud which machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is held: several plans may run side by side
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several equal slices.

    Attributes:
      chip: v4, v5e, v5p or v6e.
      shape: chips along each axis of a slice.
      slices: how many.
    """

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"

    @property
    def rented_as(self) -> str:
        return f"{self.chip}-{math.prod(self.shape) * CORES_PER_CHIP[self.chip]}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def device_kind(self) -> str:
        return DEVICE_KINDS[self.chip]

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Along which axes the links close to a ring."""
        if len(self.shape) == 2:
            return tuple(size == ROUND for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3


def parse_topology(text: str, slices: int = 1) -> Topology:
    """`v5e:16x16`, `v5e-256` or `v5litepod-256`. Raises ValueError with the nearest known name."""
    known = [Topology(chip, _shape(shape)) for chip in SHAPES for shape in SHAPES[chip]]
    names = {topology.name: topology for topology in known}
    names |= {topology.rented_as: topology for topology in known}
    text = text.replace("v5litepod-", "v5e-")
    if text not in names:
        near = difflib.get_close_matches(text, names, n=1, cutoff=0.3)
        suggestion = f"did you mean {near[0]!r}? " if near else ""
        ranges = ", ".join(f"{chip}:{v[0]} to {v[-1]}" for chip, v in SHAPES.items())
        raise ValueError(f"unknown topology {text!r}: {suggestion}Known: {ranges}")
    if slices < 1:
        raise ValueError(f"--slices={slices}: must be at least 1")
    return dataclasses.replace(names[text], slices=slices)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def prepare_environment(topology: Topology) -> None:
    """Call before jax is imported: no device is sought, and without libtpu there are CPU ones."""
    os.environ.update(NO_DEVICE)
    bundles.request()
    if not has_libtpu():
        flags = f"--xla_force_host_platform_device_count={topology.chips}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def devices(topology: Topology) -> Sequence:
    """The described devices of all slices; simulated CPU devices where libtpu is missing."""
    import jax
    from jax.experimental import topologies

    if not has_libtpu():
        return jax.devices("cpu")[: topology.chips]
    shape = topology.shape if len(topology.shape) == 3 else (*topology.shape, 1)
    # Without `wrap` the compiler sees no torus and turns all-gathers into all-reduces.
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology.name,
        chip_config_name="megacore" if CORES_PER_CHIP[topology.chip] == 2 else "default",
        chips_per_host_bounds=tuple(min(2, size) for size in shape[:2]) + (1,),
        num_slices=topology.slices,
        wrap=(*topology.wrap, False)[:3],
    )
    return description.devices
