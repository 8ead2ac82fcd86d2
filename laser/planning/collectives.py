"""Collectives of a compiled program, read from its optimized HLO.

A collective in a loop counts as often as the loop runs; of a conditional the costlier branch does.
Bytes are what a chip has to receive, whatever the algorithm: (n - 1)/n of the whole array for an
all-gather or a reduce-scatter over n chips, twice that for an all-reduce.

XLA for TPUs has forms of its own: an all-gather that goes on beside other work is a fusion to start
it, fusions that carry it along and one that ends it, or a call of a sparse core; a reduce-scatter
may be a fusion named all-reduce-scatter, of which only the owner's part is ever formed; what slices
sum is sent to their hosts.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from laser.planning.hlo import ARRAY, Instruction, Module, array_bytes, replica_group

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# The slices of a sum over them, as "{1,2}x{0:7}": slices by chips.
BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}[^"]*",[^}]*"ALL_REDUCE"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
      kind: of KINDS.
      axes: mesh axes that it goes over; () for one that moves nothing.
      bytes: that a chip receives in a step.
      count: how often it runs in a step.
      dtype: of the largest array.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: int
    dtype: str


def collectives(module: Module, axis_sizes: dict[str, int]) -> list[Collective]:
    """All collectives of a compiled program.

    Args:
      module: optimized.
      axis_sizes: of the mesh, in the order of its axes.
    """
    return list(Reader(module, axis_sizes).walk(module.entry, 1))


class Reader:
    """Finds the collectives of a module's computations.

    Attributes:
      module, axis_sizes: as of `collectives`.
    """

    def __init__(self, module: Module, axis_sizes: dict[str, int]):
        self.module = module
        self.axis_sizes = axis_sizes

    def walk(self, computation: str, times: int) -> Iterator[Collective]:
        """All of a computation that runs so often, and of what it calls."""
        for op in self.module.computations[computation]:
            if op.opcode == "while":
                if trips := self.module.trips(op):
                    yield from self.walk(op.called("body"), times * trips)
            elif op.opcode == "conditional":
                branches = [list(self.walk(name, times)) for name in op.branches]
                yield from max(branches, key=lambda found: sum(c.bytes for c in found))
            elif op.opcode == "call":
                yield from self.walk(op.called("to_apply"), times)
            else:
                yield from self.of(op, times)

    def of(self, op: Instruction, times: int = 1) -> Iterator[Collective]:
        """What an instruction that is no loop, conditional or call moves."""
        if op.opcode == "fusion":
            yield from self._fusion(op, times)
        elif op.opcode.removesuffix("-start") in KINDS:
            yield self._collective(op, op.opcode.removesuffix("-start"), times)
        elif op.opcode == "call-start":  # to another core of the chip
            for inner in self.module.computations[op.called("to_apply")]:
                yield from self.of(inner, times)
        elif op.opcode == "send" and BETWEEN_SLICES.search(op.rest):
            yield self._between_slices(op, times)

    def _fusion(self, op: Instruction, times: int) -> Iterator[Collective]:
        name = op.called("calls")
        scatters = name.startswith("all-reduce-scatter")
        if scatters or op.name.startswith("async-collective-start"):
            for inner in self.module.computations[name]:
                if inner.opcode in KINDS:
                    kind = "reduce-scatter" if scatters else inner.opcode
                    yield self._collective(inner, kind, times, whole=scatters)

    def _collective(self, op: Instruction, kind: str, times: int, whole=False) -> Collective:
        arrays = [(dtype, array_bytes(dtype, dims)) for dtype, dims in ARRAY.findall(op.type)]
        if op.opcode == "all-gather-start" or op.opcode == "collective-permute-start":
            arrays = [max(arrays, key=lambda array: array[1])]  # operands and results
        axes = self._axes(op.rest)
        n = math.prod(self.axis_sizes[name] for name in axes)
        size = sum(array[1] for array in arrays)
        if kind == "reduce-scatter" and not whole:
            size *= n  # the result is a part
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        dtype = max(arrays, key=lambda array: array[1])[0]
        return Collective(kind, axes, size * factor * times, times, dtype)

    def _between_slices(self, op: Instruction, times: int) -> Collective:
        """A sum over slices, on which the copies of the data axis lie."""
        slices = re.findall(r"(\d+)(?::(\d+))?", BETWEEN_SLICES.findall(op.rest)[0])
        n = sum(int(last or first) - int(first) + 1 for first, last in slices)
        dtype, size = max(
            ((dtype, array_bytes(dtype, dims)) for dtype, dims in ARRAY.findall(op.type)),
            key=lambda array: array[1],
        )
        return Collective("all-reduce", ("data",), 2 * (n - 1) / n * size * times, times, dtype)

    def _axes(self, rest: str) -> tuple[str, ...]:
        """The mesh axes along which the members of a group differ."""
        shape = tuple(self.axis_sizes.values())
        group = np.array(replica_group(rest, math.prod(shape)))
        places = np.array(np.unravel_index(group, shape))
        return tuple(
            name for name, along in zip(self.axis_sizes, places, strict=True) if len(set(along)) > 1
        )
