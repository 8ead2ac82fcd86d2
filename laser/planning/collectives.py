"""Collectives of a compiled program, read from its optimized HLO.

A collective in a loop counts as often as the loop runs; of a conditional the costlier branch does.
Bytes are what a chip has to receive, whatever the algorithm: (n - 1)/n of the whole array for an
all-gather or a reduce-scatter over n chips, twice that for an all-reduce.

XLA for TPUs has forms of its own: an all-gather that goes on beside other work is a fusion to start
it, fusions that carry it along and one that ends it; a reduce-scatter may be a fusion named
all-reduce-scatter, of which only the owner's part is ever formed; what slices sum is sent to their
hosts.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "u4": 4, "s4": 4}

HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
# The slices of a sum over them, as "{1,2}x{0:7}": slices by chips.
BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}[^"]*",[^}]*"ALL_REDUCE"')
ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+[a-z\d]*)\[([\d,]*)\]")


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


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str


def collectives(hlo: str, axis_sizes: dict[str, int]) -> list[Collective]:
    """All collectives of a compiled program.

    Args:
      hlo: text of the optimized module.
      axis_sizes: of the mesh, in the order of its axes.
    """
    program = _Program(hlo, axis_sizes)
    return list(program.walk(program.entry, 1))


class _Program:
    def __init__(self, hlo: str, axis_sizes: dict[str, int]):
        self.axis_sizes = axis_sizes
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = name = ""
        for line in hlo.splitlines():
            if header := HEADER.match(line):
                name = header[2]
                self.entry = name if header[1] else self.entry
                self.computations[name] = []
            elif instruction := INSTRUCTION.match(line):
                self.computations[name].append(_Instruction(*instruction.groups()))

    def walk(self, computation: str, times: int) -> Iterator[Collective]:
        for op in self.computations[computation]:
            if op.opcode == "while":
                if trips := self.trips(op):
                    yield from self.walk(_called(op, "body"), times * trips)
            elif op.opcode == "conditional":
                branches = [list(self.walk(name, times)) for name in _branches(op)]
                yield from max(branches, key=lambda found: sum(c.bytes for c in found))
            elif op.opcode == "call":
                yield from self.walk(_called(op, "to_apply"), times)
            elif op.opcode == "fusion":
                yield from self._fusion(op, times)
            elif op.opcode.removesuffix("-start") in KINDS:
                yield self._collective(op, op.opcode.removesuffix("-start"), times)
            elif op.opcode == "send" and BETWEEN_SLICES.search(op.rest):
                yield self._between_slices(op, times)

    def _fusion(self, op: _Instruction, times: int) -> Iterator[Collective]:
        name = _called(op, "calls")
        scatters = name.startswith("all-reduce-scatter")
        if scatters or op.name.startswith("async-collective-start"):
            for inner in self.computations[name]:
                if inner.opcode in KINDS:
                    kind = "reduce-scatter" if scatters else inner.opcode
                    yield self._collective(inner, kind, times, whole=True)

    def trips(self, loop: _Instruction) -> int:
        """How often a loop runs; 0 if that depends on data (the exact path of attention)."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.computations[_called(loop, "condition")]
        root = condition[-1]
        compare = self.computations[_called(root, "calls")][-1] if root.opcode == "fusion" else root
        bounds = [op for op in condition if op.opcode == "constant" and op.type.startswith("s32")]
        if compare.opcode != "compare" or "direction=LT" not in compare.rest or len(bounds) != 1:
            return 0
        return int(bounds[0].rest.partition(")")[0])

    def _collective(self, op: _Instruction, kind: str, times: int, whole=False) -> Collective:
        arrays = [(dtype, _bytes(dtype, dims)) for dtype, dims in ARRAY.findall(op.type)]
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

    def _between_slices(self, op: _Instruction, times: int) -> Collective:
        """A sum over slices, on which the copies of the data axis lie."""
        slices = re.findall(r"(\d+)(?::(\d+))?", BETWEEN_SLICES.findall(op.rest)[0])
        n = sum(int(last or first) - int(first) + 1 for first, last in slices)
        dtype, size = max(
            ((dtype, _bytes(dtype, dims)) for dtype, dims in ARRAY.findall(op.type)),
            key=lambda array: array[1],
        )
        return Collective("all-reduce", ("data",), 2 * (n - 1) / n * size * times, times, dtype)

    def _axes(self, rest: str) -> tuple[str, ...]:
        """The mesh axes along which the members of a group differ."""
        shape = tuple(self.axis_sizes.values())
        group = np.array(_group(rest, math.prod(shape)))
        places = np.array(np.unravel_index(group, shape))
        return tuple(
            name for name, along in zip(self.axis_sizes, places, strict=True) if len(set(along)) > 1
        )


def _group(rest: str, devices: int) -> Sequence[int]:
    """The devices of the first group of `replica_groups`, in any of its three notations."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(x) for x in match[1].split(",")]
    if match := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        pairs = re.findall(r"\{(\d+),(\d+)\}", match[1])
        return next(([int(a), int(b)] for a, b in pairs if a != b), [0])
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        ids = np.arange(devices).reshape([int(x) for x in match[3].split(",")])
        if match[4]:
            ids = ids.transpose([int(x) for x in match[4].split(",")])
        return ids.reshape(int(match[1]), int(match[2]))[0].tolist()
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        over = re.findall(r"'(\w+)'", match[2])
        ids = np.arange(devices).reshape(list(sizes.values()))
        places = [slice(None) if name in over else 0 for name in sizes]
        return ids[tuple(places)].ravel().tolist()
    return range(devices)


def _called(op: _Instruction, what: str) -> str:
    match = re.search(rf"\b{what}=%?([\w.\-]+)", op.rest)
    if match is None:
        raise ValueError(f"{op.opcode} {op.name} of the compiled program has no {what}")
    return match[1]


def _branches(op: _Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", op.rest):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [_called(op, "true_computation"), _called(op, "false_computation")]


def _bytes(dtype: str, dims: str) -> float:
    bits = ITEM_BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype[1:]))
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits / 8


def kept_for_backward(hlo: str, layers: int) -> float:
    """Bytes that the loop over layers hands from the forward to the backward pass.

    They are arrays with a first dim of layers among what the forward loop writes: of the loops with
    as many trips as layers, the first one. 0 where layers are unrolled.
    """
    program = _Program(hlo, {"device": 1})
    for name in program.computations:
        for op in program.computations[name]:
            if op.opcode == "while" and program.trips(op) == layers and "/jvp()" in op.rest:
                return _written(program, _called(op, "body"), layers)
    return 0.0


def _written(program: _Program, body: str, layers: int) -> float:
    root = program.computations[body][-1]
    names = re.findall(r"%([\w.\-]+)", root.rest.partition(")")[0])
    ops = {op.name: op for op in program.computations[body]}
    carried = {op.name for op in program.computations[body] if op.opcode == "parameter"}
    total = 0.0
    for name in names:
        op = ops[name]
        source = op.rest.partition(")")[0].partition(",")[0].lstrip("%")
        if op.opcode == "get-tuple-element" and source in carried:
            continue  # passed through unchanged
        for dtype, dims in ARRAY.findall(op.type):
            if dims.split(",")[0] == str(layers):
                total += _bytes(dtype, dims)
    return total
