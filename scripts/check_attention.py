"""Says whether attention is right on the devices of this machine, before a run is trusted to it.

    python scripts/check_attention.py [--all] [--only=size-128,packed]

Every implementation that serves the backend (`pallas` on TPUs, `cudnn` on GPUs, `chunked` on all)
is held to the formulas of laser/attention/reference.py, which a CPU computes in float64: outputs
and the three gradients, standard and LASER, at the head sizes of the paper's models and in the
forms that break first. `--all` adds the slower shapes. On a CPU the kernels are interpreted, one
program of them. An error is the norm of the difference over the norm of what is expected; `worst
row` is that of one position and head, over the norm that such rows have on average. The compiler
takes most of the time, of a core 4 s for LASER's kernels of `short`, 21 for those of `size-128` and
up to two minutes for `size-512`, so the programs are compiled at once, on all cores.
Exit codes: 0 all within their bounds, 1 one is not, or does not run, 2 mistake in the command line.
"""

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from laser.training import hosts

ROWS = 2  # that differ; each device has both of them
TENSORS = ("output", "d_query", "d_key", "d_value")
BF16, F32 = "bfloat16", "float32"
FUSED = {"tpu": "pallas", "gpu": "cudnn", "cpu": "pallas"}

# By dtype, of a tensor and of its worst row: 4 to 100 times what CPUs show, as no chip has been
# asked yet, and less than a wrong precision gives. Products of float32 in one pass of bfloat16 are
# off by 2e-3 and more, rounded exponentials of small values by 4e-2.
BOUNDS = {F32: (5e-5, 1e-3), BF16: (2e-2, 1e-1)}
SMALL = {F32: (5e-4, 1e-3), BF16: (2e-2, 1e-1)}  # LASER of them is small beside exp(V), near 1

# What is done to values of standard deviation 1. All of it lies within 700 nats, for which float64
# has room.
VALUES: dict[str, Callable[[np.ndarray], Any]] = {
    "usual": lambda value: None,
    "small": lambda value: np.multiply(value, 0.05, out=value),
    "wide": lambda value: np.multiply(value, 40, out=value),
    "outliers": lambda value: _outliers(value),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape and its options, of which each dtype and kind is a program.

    Attributes:
      runs: dtypes and kinds.
      values: names in VALUES; they share a program.
      more: only with --all.
    """

    name: str
    length: int = 1024
    size: int = 128
    heads: int = 2
    kv_heads: int = 2
    causal: bool = True
    packed: bool = False
    soft_cap: float | None = None
    runs: tuple[tuple[str, str], ...] = ((BF16, "laser"),)
    values: tuple[str, ...] = ("usual",)
    more: bool = False


EACH = tuple((dtype, kind) for dtype in (BF16, F32) for kind in ("standard", "laser"))
BOTH = ((BF16, "standard"), (BF16, "laser"))
INTERPRETED = ("short", F32, "laser")  # on a CPU, which takes up to a minute for a program
CASES = (
    Case("short", 33, 64, runs=EACH, values=tuple(VALUES)),
    Case("size-128", runs=EACH, values=tuple(VALUES)),
    Case("size-512", size=512, runs=BOTH),
    Case("ragged", 333, runs=((BF16, "laser"), (F32, "laser"))),
    Case("grouped", 512, heads=4, kv_heads=1),
    Case("packed", 512, packed=True, values=("usual", "outliers")),
    Case("size-256", size=256, runs=BOTH, more=True),
    Case("size-720", size=720, runs=BOTH, more=True),
    Case("float32-512", size=512, runs=((F32, "standard"), (F32, "laser")), more=True),
    Case("long", 2100, runs=BOTH, more=True),
    Case("bert", 512, 256, causal=False, packed=True, soft_cap=50.0, runs=BOTH, more=True),
    Case("vit", 196, 64, causal=False, runs=((F32, "standard"), (F32, "laser")), more=True),
)


@dataclasses.dataclass(frozen=True)
class Program:
    """One implementation of a case in one dtype and kind."""

    case: Case
    implementation: str
    dtype: str
    kind: str


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    import jax

    cases = [case for case in CASES if not case.more or arguments.all]
    if arguments.only:
        cases = [case for case in CASES if case.name in arguments.only]
    try:
        hosts.refuse_several()
    except ValueError as error:
        print(f"check_attention.py: error: {error}", file=sys.stderr)
        return 2
    device, began = jax.local_devices()[0], time.perf_counter()
    print(f"{jax.local_device_count()} x {device.device_kind}, jax {jax.__version__}", flush=True)
    print(
        _line(["case", "values", "dtype", "by", "kind", *TENSORS, "worst row", "bounds", ""]),
        flush=True,
    )
    failed = checked = 0
    for line, verdict in check(cases, jax.default_backend()):
        print(line, flush=True)
        failed, checked = failed + (verdict is False), checked + (verdict is not None)
    seconds = time.perf_counter() - began
    print(f"{checked - failed} of {checked} within their bounds, {seconds:.0f} s")
    if failed:
        print("where chunked is right, train with --config.attention.implementation=chunked")
    return 1 if failed or not checked else 0


def check(cases: Sequence[Case], backend: str) -> Iterator[tuple[str, bool | None]]:
    """Lines of the table, and whether each is right; None where nothing serves."""
    programs = [
        Program(case, implementation, dtype, kind)
        for case in cases
        for dtype, kind in case.runs
        for implementation in (FUSED[backend], "chunked")
        if backend != "cpu"
        or implementation == "chunked"
        or (case.name, dtype, kind) == INTERPRETED
    ]
    print(f"compiling {len(programs)} programs", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = {program: _compiled(program, pool) for program in programs}
        for program in programs:
            words = [program.dtype, program.implementation, program.kind]
            for values in program.case.values:
                cells, verdict = _judged(program, values, compiled[program])
                yield _line([program.case.name, values, *words, *cells]), verdict


def _judged(
    program: Program, values: str, compiled: Future | ValueError
) -> tuple[list[str], bool | None]:
    """The last cells of a line. Whatever a program dies of is what was to be found out."""
    if isinstance(compiled, ValueError):
        return [*["-"] * 6, f"not served: {compiled}"], None
    try:
        arrays = inputs(program.case, program.dtype, values)
        found = run(compiled.result(), arrays, program.dtype)
        wanted = expected(program.case, program.dtype, program.kind, values)
    except Exception as error:
        return [*["-"] * 6, f"FAIL: {str(error).strip().splitlines()[0][:200]}"], False
    total, worst = errors(found, wanted)
    bound, row_bound = (SMALL if values == "small" else BOUNDS)[program.dtype]
    right = max(total) <= bound and worst <= row_bound  # NaN is not
    cells = [f"{error:.1e}" for error in (*total, worst)]
    return [*cells, f"{bound:.0e} {row_bound:.0e}", "ok" if right else "FAIL"], right


def inputs(case: Case, dtype: str, values: str) -> list[np.ndarray]:
    """query, key, value and a cotangent, float64 without what the dtype would round off."""
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    query, key, value, d_out = (rng.normal(size=(ROWS, case.length, n, case.size)) for n in heads)
    VALUES[values](value)
    return [np.array(jnp.asarray(x, dtype), np.float64) for x in (query, key, value, d_out)]


def _outliers(value: np.ndarray) -> None:
    """Of both signs, early and late: no one reference has room for them in float32."""
    length = value.shape[1]
    value[:, length // 8, :, ::2] = 300
    value[:, length // 2, :, 1::2] = -200
    value[:, -length // 4, :, ::3] = 120


def segments(case: Case) -> np.ndarray | None:
    """Three documents in the first row, and in the second the same from the end."""
    if not case.packed:
        return None
    ends = [0, case.length // 7, case.length // 2, case.length]
    ids = np.repeat(np.arange(3, dtype=np.int32), np.diff(ends))
    return np.stack([ids, ids[::-1]])


def _options(case: Case, kind: str) -> dict[str, Any]:
    scale = case.size**-0.5
    return {
        "kind": kind, "logits_scale": scale, "causal": case.causal, "logits_soft_cap": case.soft_cap
    }  # fmt: skip


@functools.lru_cache(len(VALUES))  # of one program after the other
def expected(case: Case, dtype: str, kind: str, values: str) -> list[np.ndarray]:
    """By the formulas in float64 on the CPU."""
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        arrays = (jnp.asarray(x) for x in inputs(case, dtype, values))
        out, gradients = _formulas(case, kind)(*arrays)
        return [np.asarray(x) for x in (out, *gradients)]


@functools.cache
def _formulas(case: Case, kind: str) -> Callable:
    """LASER by the paper's, with one maximum of a row: it takes no (T, T, D) tensor, and float64
    makes it exact within 700 nats."""
    import jax

    from laser.attention import reference

    formula = functools.partial(
        reference.attention, **_options(case, kind), paper=kind == "laser",
        segment_ids=segments(case),
    )  # fmt: skip
    return jax.jit(functools.partial(_with_gradients, formula))


def _with_gradients(function: Callable, query, key, value, d_out):
    import jax

    out, vjp = jax.vjp(function, query, key, value)
    return out, vjp(d_out.astype(out.dtype))


def _compiled(program: Program, pool: ThreadPoolExecutor) -> Future | ValueError:
    """Being compiled, for all local devices, as a step of train.py would be; or why it does not
    serve."""
    import jax
    import jax.numpy as jnp

    case = program.case
    mesh, sharding = _mesh()
    batch = ROWS * mesh.size
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(program.dtype), sharding=sharding)
    query, key = (of((batch, case.length, n, case.size)) for n in (case.heads, case.kv_heads))
    ids = segments(case)
    tiled = None if ids is None else np.tile(ids, (mesh.size, 1))
    function = functools.partial(
        _call, program.implementation, **_options(case, program.kind), segment_ids=tiled
    )
    # As models/stack.py has it for products of float32.
    precision = (
        "highest" if program.dtype == F32 and mesh.devices.flat[0].platform != "cpu" else None
    )
    try:
        with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
            step = jax.jit(lambda *x: _with_gradients(function, *x), out_shardings=sharding)
            return pool.submit(step.lower(query, key, key, query).compile)
    except Exception as error:
        if isinstance(error, ValueError) and "use 'chunked'" in str(error):
            return error
        failed: Future = Future()
        failed.set_exception(error)
        return failed


def _call(implementation: Any, query, key, value, **options):
    from laser.attention import attention
    from laser.attention.kernels import fused
    from laser.attention.products import platform_of_program

    if implementation == "pallas" and platform_of_program() == "cpu":
        return fused.attention(query, key, value, interpret=True, **options)[0]
    return attention(query, key, value, implementation=implementation, **options)


@functools.cache
def _mesh() -> tuple[Any, Any]:
    """All local devices, and the sharding that gives each its own rows."""
    import jax
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))
    return mesh, NamedSharding(mesh, PartitionSpec("data"))


def run(program: Callable, arrays: Sequence[np.ndarray], dtype: str) -> list[np.ndarray]:
    """Output and gradients of every device's rows, as float64."""
    import jax
    import jax.numpy as jnp

    mesh, sharding = _mesh()
    rows = (jnp.asarray(np.tile(x, (mesh.size, 1, 1, 1)), dtype) for x in arrays)
    out, gradients = program(*(jax.device_put(x, sharding) for x in rows))
    return [np.asarray(x, np.float64) for x in (out, *gradients)]


def errors(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> tuple[list[float], float]:
    """Of each tensor, and the worst of a row of any; infinite if anything is not finite."""
    total, worst = [], 0.0
    for actual, once in zip(found, wanted, strict=True):
        exact = np.tile(once, (len(actual) // len(once), 1, 1, 1))
        rows = np.linalg.norm(actual - exact, axis=-1)
        sizes = np.linalg.norm(exact, axis=-1)
        mean = np.sqrt(np.mean(np.square(sizes)))
        finite = np.isfinite(actual).all()
        total.append(float(np.linalg.norm(rows) / np.linalg.norm(sizes)) if finite else np.inf)
        worst = max(worst, float((rows / np.maximum(sizes, mean)).max()) if finite else np.inf)
    return total, worst


def _line(cells: Sequence[str]) -> str:
    widths = (12, 9, 9, 8, 9, 8, 8, 8, 8, 10, 12, 0)
    return " ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="the slower shapes, too")
    parser.add_argument("--only", type=_names, default=(), help="cases, as size-128,packed")
    return parser


def _names(text: str) -> tuple[str, ...]:
    names, known = tuple(text.split(",")), [case.name for case in CASES]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"no case {name!r}; there are {', '.join(known)}")
    return names


if __name__ == "__main__":
    from laser.training.hardware import tune_cpu

    tune_cpu(BF16)
    sys.exit(main())
