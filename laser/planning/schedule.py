"""The schedule of a step compiled for TPUs: what runs when, in seconds that nobody measured.

XLA for TPUs writes the cycles that it expects of a fusion or a copy into the scheduled program; a
kernel's are its instruction bundles where they are known. Transfers take their bytes over the
links, and what has no count of its own its bytes through the memory. Instructions run in the order
of the program. What is started and ended by two of them goes on beside those in between, unless
another transfer holds the same links: the rest of it is waited for.

Left out: latencies of transfers and launches, two things that share the memory's bandwidth, and the
paths that depend on data, which usual numbers do not take: of a conditional the cheaper branch
counts, and a loop without a fixed number of rounds does not.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping

from laser.planning.collectives import Collective, Reader
from laser.planning.hlo import ARRAY, Instruction, Module
from laser.training.hardware import Chip

PRODUCTS, WORK, COPIES, KERNELS, TRANSFERS = (
    "products", "other work", "copies", "kernels", "transfers",
)  # fmt: skip
KINDS = (PRODUCTS, WORK, COPIES, KERNELS, TRANSFERS)
LINES = 10
SUMS = ("count", "gib", "seconds", "waited")  # of a line

# Take no time: they name things, or reserve memory.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "recv", "recv-done",
}  # fmt: skip
# A fusion of these alone, and of scalars, computes nothing.
MOVES = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "copy", "reshape",
    "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad",
}  # fmt: skip
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')

# From the mesh axes of a collective to the links that it holds and their bytes/s; 0 unknown.
Links = Callable[[tuple[str, ...]], tuple[frozenset, float]]


@dataclasses.dataclass(frozen=True)
class Line:
    """One instruction over all its runs in a step.

    Attributes:
      kind: of KINDS.
      what: name of the instruction; of a transfer the collective and its mesh axes.
      source: file:line of the Python that it comes from, "" unknown.
      count: runs in a step.
      seconds: that it takes.
      waited: of these, those in which nothing else runs.
      beside: seconds of the rest by the kind of what runs meanwhile.
      gib: received by a chip; 0 but for transfers.
    """

    kind: str
    what: str
    source: str
    count: int
    seconds: float
    waited: float
    beside: Mapping[str, float]
    gib: float = 0.0

    def times(self, trips: int) -> "Line":
        """The same line for all rounds of a loop, from that of its body."""
        beside = {kind: seconds * trips for kind, seconds in self.beside.items()}
        sums = {name: getattr(self, name) * trips for name in SUMS}
        return dataclasses.replace(self, **sums, beside=beside)

    def plus(self, other: "Line") -> "Line":
        """Two of the same kind together."""
        kinds = {*self.beside, *other.beside}
        beside = {x: self.beside.get(x, 0.0) + other.beside.get(x, 0.0) for x in kinds}
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        return dataclasses.replace(self, **sums, beside=beside)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a step is made of. Seconds of a step on a chip.

    Attributes:
      seconds: of the step: all that is waited for.
      waited: of these by KINDS.
      hidden: seconds of transfers by the kind of what runs beside them.
      transfers: of each kind and mesh axes together, the slowest first.
      heaviest: lines that are no products, the longest first.
      kernels_by: bundles, or roofline where these are not known; "" without kernels.
    """

    seconds: float
    waited: dict[str, float]
    hidden: dict[str, float]
    transfers: list[Line]
    heaviest: list[Line]
    kernels_by: str


def read_schedule(
    module: Module,
    axis_sizes: dict[str, int],
    chip: Chip,
    links: Links,
    bundles: Mapping[str, float],
) -> Schedule:
    """Reads a scheduled module.

    Args:
      module: compiled for TPUs.
      axis_sizes: of the mesh, in the order of its axes.
      chip: that it is compiled for.
      links: of the torus.
      bundles: of kernels by their names, of a row and head; cores share these. A kernel that is
        missing takes its FLOPs or bytes at the chip's peak.
    """
    lines = _Reader(module, axis_sizes, chip, links, bundles).run(module.entry)
    transfers = _joined((line for line in lines if line.kind == TRANSFERS), lambda line: line.what)
    hidden = functools.reduce(Line.plus, transfers).beside if transfers else {}
    kernels = {line.what in bundles for line in lines if line.kind == KERNELS}
    return Schedule(
        seconds=sum(line.waited for line in lines),
        waited={kind: sum(x.waited for x in lines if x.kind == kind) for kind in KINDS},
        hidden=dict(hidden),
        transfers=sorted(transfers, key=lambda line: -line.seconds),
        heaviest=_heaviest(lines),
        kernels_by=("bundles" if all(kernels) else "roofline") if kernels else "",
    )


def _heaviest(lines: list[Line]) -> list[Line]:
    """Those that are no products, transfers of one source line together."""
    others = (line for line in lines if line.kind != PRODUCTS)
    joined = _joined(others, lambda line: (line.what, line.source))
    return sorted(joined, key=lambda line: -line.waited)[:LINES]


def _joined(lines: Iterable[Line], key: Callable[[Line], Hashable]) -> list[Line]:
    """Lines of the same key together."""
    sums: dict[Hashable, Line] = {}
    for line in lines:
        name = key(line)
        sums[name] = sums[name].plus(line) if name in sums else line
    return list(sums.values())


class _Reader:
    def __init__(self, module: Module, axis_sizes, chip: Chip, links: Links, bundles):
        self.module = module
        self.collectives = Reader(module, axis_sizes)
        self.chip = chip
        self.links = links
        self.bundles = bundles
        self.kinds: dict[str, str] = {}  # of computations that fusions call

    def run(self, computation: str) -> list[Line]:
        """The lines of one run of a computation. It takes all their `waited` seconds."""
        clock = _Clock()
        ops = {op.name: op for op in self.module.computations[computation]}
        for op in ops.values():
            if op.opcode == "while":
                if trips := self.module.trips(op):
                    clock.add([x.times(trips) for x in self.run(op.called("body"))])
            elif op.opcode == "conditional":
                clock.add(min(map(self.run, op.branches), key=_seconds))
            elif op.opcode == "call":
                clock.add(self.run(op.called("to_apply")))
            elif started := _started_by(op):
                clock.end(started)
            else:
                self._one(op, ops, clock)
        return clock.lines

    def _one(self, op: Instruction, ops: dict[str, Instruction], clock: "_Clock") -> None:
        moved = list(self.collectives.of(op))
        source = self.module.source(op)
        for one in moved:
            held, rate = self.links(one.axes)
            seconds = one.bytes / rate if rate else 0.0
            line = Line(TRANSFERS, _name(one), source, 1, seconds, 0.0, {}, one.bytes / 2**30)
            clock.start(op.name, line, held)
        if moved:
            if not _is_start(op):
                clock.end(op.name)
        elif op.opcode in ("copy-start", "slice-start"):
            # From one memory to the other; the type names target, source and a flag.
            seconds = op.bytes / 2 / self.chip.hbm_bandwidth
            clock.start(op.name, Line(COPIES, op.name, source, 1, seconds, 0.0, {}), frozenset())
        elif op.opcode not in FREE:
            kind, seconds = self._cost(op, ops)
            clock.add([Line(kind, _base(op, kind), source, 1, seconds, seconds, {})])

    def _cost(self, op: Instruction, ops: dict[str, Instruction]) -> tuple[str, float]:
        """Kind and seconds of what runs by itself."""
        if op.opcode == "custom-call":
            return self._custom(op)
        kind = COPIES if op.opcode in MOVES else WORK
        if op.opcode == "fusion":
            kind = self._fused(op.called("calls"))
        elif op.opcode in ("convolution", "dot"):
            kind = PRODUCTS
        if cycles := CYCLES.search(op.rest):
            return kind, int(cycles[1]) / self.chip.clock
        written = op.bytes
        if op.opcode == "dynamic-update-slice":  # in place
            written = ops[op.operands[1]].bytes
        return kind, 2 * written / self.chip.hbm_bandwidth

    def _custom(self, op: Instruction) -> tuple[str, float]:
        """A kernel; or a call of the compiler's own, which has no count."""
        name = _base(op, KERNELS)
        if name in self.bundles:
            shape = ARRAY.search(op.type)
            assert shape is not None  # a kernel has a result
            rows, heads, *_ = map(int, shape[2].split(","))
            return KERNELS, rows * heads * self.bundles[name] / self.chip.clock
        cost = COST.search(op.rest)
        if cost is None:
            return WORK, 0.0
        flops, size = int(cost[1]), int(cost[2])
        return KERNELS, max(flops / self.chip.flops, size / self.chip.hbm_bandwidth)

    def _fused(self, computation: str) -> str:
        """Kind of a fusion by what it calls."""
        if computation not in self.kinds:
            self.kinds[computation] = self._kind_of(self.module.computations[computation])
        return self.kinds[computation]

    def _kind_of(self, ops: list[Instruction]) -> str:
        inner = {self._fused(op.called("calls")) for op in ops if op.opcode == "fusion"}
        if PRODUCTS in inner or any(op.opcode in ("convolution", "dot") for op in ops):
            return PRODUCTS
        moves = all(op.opcode in (*MOVES, "fusion") or "[]" in op.type for op in ops)
        return COPIES if moves and WORK not in inner else WORK


class _Clock:
    """Time within one run of a computation, and what is under way.

    Attributes:
      lines: what has run.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._now = 0.0
        self._spans: list[tuple[float, float, str]] = []
        self._held: dict[object, float] = {}  # until when, by link
        self._running: dict[str, list[tuple[float, Line]]] = {}

    def add(self, lines: list[Line]) -> None:
        """These run now, and nothing else is issued meanwhile."""
        for line in lines:
            if line.waited:
                self._spans.append((self._now, self._now + line.waited, line.kind))
                self._now += line.waited
        self.lines += lines

    def start(self, name: str, line: Line, held: frozenset) -> None:
        """Goes on beside what follows, from when the links that it holds are free."""
        begin = max([self._now, *(self._held.get(link, 0.0) for link in held)])
        self._held.update(dict.fromkeys(held, begin + line.seconds))
        self._running.setdefault(name, []).append((begin, line))

    def end(self, name: str) -> None:
        """Waits for what was started under a name; nothing of an unknown one."""
        for begin, line in self._running.pop(name, []):
            end = begin + line.seconds
            beside: dict[str, float] = {}
            for first, last, kind in self._spans:
                both = min(last, end) - max(first, begin)
                if both > 0:
                    beside[kind] = beside.get(kind, 0.0) + both
            waited = max(0.0, end - self._now)
            self._now += waited
            self.lines.append(dataclasses.replace(line, waited=waited, beside=beside))


def _is_start(op: Instruction) -> bool:
    return op.opcode.endswith("-start") or op.opcode == "send" or "collective-start" in op.name


def _started_by(op: Instruction) -> str:
    """Name of the instruction that started what this one ends; "" if it ends nothing."""
    if op.opcode.endswith("-done"):
        return op.operands[0] if op.opcode != "recv-done" else ""
    if op.name.startswith("async-collective-done"):
        return op.name.replace("-done", "-start", 1)
    return ""


def _name(one: Collective) -> str:
    return f"{one.kind} {' '.join(one.axes)}".strip()


def _base(op: Instruction, kind: str) -> str:
    """A kernel is known without its number."""
    return re.sub(r"[.\d]+$", "", op.name) if kind == KERNELS else op.name


def _seconds(lines: list[Line]) -> float:
    return math.fsum(line.waited for line in lines)
