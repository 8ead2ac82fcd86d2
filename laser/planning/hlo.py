"""Reads the text of an optimized HLO module: computations, their instructions, how often loops run.

The text is XLA's own (`compiled.as_text()`). Of a program for TPUs it is scheduled: instructions
stand in the order in which they are issued.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "u4": 4, "s4": 4}

HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+[a-z\d]*)\[([\d,]*)\]")
# The tables of source lines in front of the module.
FILE = re.compile(r'(\d+) "(.*)"')
TABLE = re.compile(r"(FileNames|FunctionNames|FileLocations|StackFrames)$")
LOCATION = re.compile(r"(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)")
FRAME = re.compile(r"(\d+) \{file_location_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction, `%name = type opcode(rest`."""

    name: str
    type: str
    opcode: str
    rest: str

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the instructions that it takes."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @functools.cached_property
    def bytes(self) -> float:
        """Of its result."""
        return sum(array_bytes(dtype, dims) for dtype, dims in ARRAY.findall(self.type))

    def called(self, what: str) -> str:
        """The computation behind `body=`, `condition=`, `calls=` or `to_apply=`."""
        match = re.search(rf"\b{what}=%?([\w.\-]+)", self.rest)
        if match is None:
            raise ValueError(f"{self.opcode} {self.name} of the compiled program has no {what}")
        return match[1]

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        if listed := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return re.findall(r"%?([\w.\-]+)", listed[1])
        return [self.called("true_computation"), self.called("false_computation")]


class Module:
    """A module's computations by name, each a list of its instructions.

    Attributes:
      computations: by name.
      entry: name of the one that runs first.
    """

    def __init__(self, hlo: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = name = ""
        head: list[str] = []
        for line in hlo.splitlines():
            if header := HEADER.match(line):
                name = header[2]
                self.entry = name if header[1] else self.entry
                self.computations[name] = []
            elif not name:
                head.append(line)
            elif instruction := INSTRUCTION.match(line):
                self.computations[name].append(Instruction(*instruction.groups()))
        self._frames = _source_lines(head)

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs; 0 if that depends on data (the exact path of attention)."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self.computations[loop.called("condition")]
        root = condition[-1]
        compare = self.computations[root.called("calls")][-1] if root.opcode == "fusion" else root
        bounds = [op for op in condition if op.opcode == "constant" and op.type.startswith("s32")]
        if compare.opcode != "compare" or "direction=LT" not in compare.rest or len(bounds) != 1:
            return 0
        return int(bounds[0].rest.partition(")")[0])

    def source(self, op: Instruction) -> str:
        """The line of Python that an instruction comes from, as file:line; "" if it is not told."""
        frame = re.search(r"stack_frame_id=(\d+)", op.rest)
        return self._frames.get(frame[1], "") if frame else ""


def _source_lines(head: Sequence[str]) -> dict[str, str]:
    """From a stack frame's id to file:line."""
    files: dict[str, str] = {}
    locations: dict[str, str] = {}
    frames: dict[str, str] = {}
    table = ""
    for line in head:
        if TABLE.match(line):
            table = line
        elif (file := FILE.match(line)) and table == "FileNames":
            files[file[1]] = file[2]
        elif location := LOCATION.match(line):
            path = files.get(location[2], "").removeprefix(f"{ROOT}/")
            locations[location[1]] = f"{path}:{location[3]}"
        elif frame := FRAME.match(line):
            frames[frame[1]] = locations.get(frame[2], "")
    return frames


def replica_group(rest: str, devices: int) -> Sequence[int]:
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


def array_bytes(dtype: str, dims: str) -> float:
    """Of an array as the text writes it, `bf16` and `128,64`."""
    bits = ITEM_BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype[1:]))
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits / 8
