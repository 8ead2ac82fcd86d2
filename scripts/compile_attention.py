"""Attention kernels compiled for TPUs, without one, and compared by what the compiler counts.

    python scripts/compile_attention.py static [--json=PATH]
    python scripts/compile_attention.py search CHIP SIZE LENGTH
    python scripts/compile_attention.py compile CHIP HEADS SIZE LENGTH KIND
        [--kv_heads=2] [--value_size=512] [--dtype=float32] [--packed] [--soft_cap=50] [--full]

It needs libtpu. `static` shows instruction bundles (about cycles, if no transfer is waited for),
HBM bytes and VMEM of our kernels and of jax's splash attention, alone and in the paper's LASER
wrapper, forward and backward, at the paper's shapes. `search` counts the bundles that LASER's
kernels execute with each size of blocks and tiles: laser/attention/kernels/blocks.py is made from
it. `compile` does one program and prints JSON.

Splash runs several grid steps where ours has one: its bundles are those of one step's whole code
times the steps that a causal mask leaves, which is an upper estimate.
"""

import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import c4
from laser.planning import bundles, hlo
from laser.planning.topologies import NO_DEVICE

# Heads and head size of the paper's models.
SHAPES = tuple(dict.fromkeys((heads, size) for *_, heads, size in c4.SIZES.values()))
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
KINDS = ("standard", "laser", "splash", "splash_laser")
BATCH, LENGTH = 4, 1024
SPLASH_BLOCK = 512
SPLASH_VMEM_KIB = "49152"  # its blocks of 512 do not fit the default at size 720


def _prepare_libtpu(dump: str) -> None:
    """Settings that libtpu reads when it is loaded: no device, and a dump of its schedules."""
    os.environ.update(NO_DEVICE)
    os.environ["LIBTPU_INIT_ARGS"] = bundles.arguments(dump)


def _attention(
    kind: str, size: int, soft_cap: float | None = None, causal: bool = True
) -> Callable:
    """A function of q, k, v (B, H, N, D) and, of ours, of segment ids (B, N)."""
    if kind == "splash":
        return _splash()
    if kind == "splash_laser":
        return _wrapped(_splash())
    from laser.attention.kernels import fused

    def ours(q, k, v, segment_ids=None):
        rows = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # undone within: no copies
        out, _ = fused.attention(
            *rows, kind=kind, logits_scale=size**-0.5, causal=causal, segment_ids=segment_ids,
            logits_soft_cap=soft_cap,
        )  # fmt: skip
        return out.transpose(0, 2, 1, 3)

    return ours


def _splash() -> Callable:
    import jax
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def call(q, k, v):
        block = min(SPLASH_BLOCK, q.shape[2])
        names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        mask = splash.MultiHeadMask([splash.CausalMask(q.shape[2:3] * 2)] * q.shape[1])
        kernel = splash.make_splash_mha_single_device(
            mask, block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names})
        )
        return jax.vmap(kernel)(q, k, v)

    return call


def _wrapped(attention: Callable) -> Callable:
    """LASER as the paper's log-weighted-sum-exp around another attention."""
    import jax
    import jax.numpy as jnp

    def call(q, k, v):
        m = jax.lax.stop_gradient(v.max(axis=2, keepdims=True))
        return jnp.log(attention(q, k, jnp.exp(v - m))) + m

    return call


def _one_device(chip: str):
    """Sharding on one device of a chip that is only described."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    return NamedSharding(Mesh([topology.devices[0]], ("device",)), PartitionSpec())


def lower_program(
    chip: str, heads: int, size: int, length: int, kind: str, *,
    value_size: int | None = None, dtype: str = "bfloat16", packed: bool = False,
    soft_cap: float | None = None, full: bool = False, kv_heads: int | None = None,
) -> Any:  # fmt: skip
    """Forward and backward for one device of a chip, before libtpu compiles them."""
    import jax
    import jax.numpy as jnp

    struct = functools.partial(jax.ShapeDtypeStruct, sharding=_one_device(chip))
    shapes = [
        (heads, size), (kv_heads or heads, size), (kv_heads or heads, value_size or size),
        (heads, value_size or size),
    ]  # fmt: skip
    arrays = [struct((BATCH, count, length, d), jnp.dtype(dtype)) for count, d in shapes]
    segments = [struct((BATCH, length), jnp.int32)] * packed
    run = _attention(kind, size, soft_cap, causal=not full)

    def forward_and_backward(q, k, v, d_out, *segments):
        out, vjp = jax.vjp(lambda *x: run(*x, *segments), q, k, v)
        return out, *vjp(d_out)

    return jax.jit(forward_and_backward).lower(*arrays, *segments)


def compile_program(
    chip: str, heads: int, size: int, length: int, kind: str, **options: Any
) -> dict:
    """Bundles, HBM and VMEM of forward and backward, compiled for one device of a chip."""
    with tempfile.TemporaryDirectory() as dump:
        _prepare_libtpu(dump)
        lowered = lower_program(chip, heads, size, length, kind, **options)
        # Everything in HBM, so that bytes are those of a full model and not of this small program.
        settings: dict[str, str | bool] = {"xla_msa_enable": "false"}
        if kind.startswith("splash"):
            settings["xla_tpu_scoped_vmem_limit_kib"] = SPLASH_VMEM_KIB
        compiled = lowered.compile(compiler_options=settings)
        program: str = compiled.as_text() or ""
        memory: Any = compiled.memory_analysis()
        return {
            "bundles": bundles.read(dump),
            "hbm_bytes": hbm_bytes(program),
            "vmem_bytes": _vmem_bytes(program),
            "temporary_bytes": memory.temp_size_in_bytes,
        }


def _vmem_bytes(program: str) -> int:
    """The largest on-chip memory that a kernel of the program was given."""
    sizes = re.findall(r'"scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', program)
    return max(map(int, sizes), default=0)


FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "while", "iota",
    "copy-done", "partition-id",
}  # fmt: skip


def hbm_bytes(program: str) -> float:
    """Operands and results of all kernels and fusions of a compiled program, on its usual path.

    Of a conditional the cheaper branch counts, of a loop nothing: ours are the exact path's.
    """
    module = hlo.Module(program)

    def bytes_of(computation: str) -> float:
        operations = module.computations[computation]
        sizes = {op.name: op.bytes for op in operations}
        total = 0.0
        for op in operations:
            if op.opcode == "conditional":
                total += min(map(bytes_of, op.branches))
            elif op.opcode not in FREE:
                total += op.bytes + sum(sizes[name] for name in op.operands)
        return total

    return bytes_of(module.entry)


def _compile_apart(*arguments: Any) -> dict | None:
    """`compile_program` in a process of its own, as libtpu reads its settings once."""
    command = [sys.executable, "-m", "scripts.compile_attention", "compile"]
    result = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode:
        print(f"{arguments}: {result.stderr[-300:]}", file=sys.stderr)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def total_bundles(kind: str, found: dict) -> int:
    """Bundles a head, forward and backward, without what runs where these do not do."""
    counts = found["bundles"].items()
    usual = sum(count for name, count in counts if not name.endswith(("_raw", "_wide")))
    blocks = LENGTH // SPLASH_BLOCK
    return usual * (blocks * (blocks + 1) // 2 if kind.startswith("splash") else 1)


def static(chips=tuple(CHIPS), shapes=SHAPES) -> list[dict]:
    """One row for every chip, shape and kernel; prints a table as it goes."""
    rows = []
    print("chip   heads x size  kernel    bundles  ratio  HBM MB  ratio  VMEM MiB  temp MB")
    for chip in chips:
        for heads, size in shapes:
            base = None
            for kind in KINDS:
                found = _compile_apart(chip, heads, size, LENGTH, kind)
                if found is None:
                    continue
                total = total_bundles(kind, found)
                base = base or (total, found["hbm_bytes"])
                rows.append({"chip": chip, "heads": heads, "size": size, "kind": kind, **found})
                print(
                    f"{chip:6} {heads:3} x {size:<8} {kind:9} {total:7}  "
                    f"{total / base[0]:5.3f} {found['hbm_bytes'] / 1e6:7.1f}  "
                    f"{found['hbm_bytes'] / base[1]:5.3f} {found['vmem_bytes'] / 2**20:9.1f} "
                    f"{found['temporary_bytes'] / 1e6:8.1f}",
                    flush=True,
                )
    return rows


def search(chip: str, size: int, length: int) -> None:
    """Bundles a head that LASER's kernels execute, for each size of blocks and of tiles."""
    with tempfile.TemporaryDirectory() as dump:
        _prepare_libtpu(dump)
        from laser.attention.kernels import blocks as table

        print(f"{chip}, size {size}, length {length}: {table.block_sizes(length, size, size, 2)}")
        print("block  tile  forward  backward  VMEM MiB")
        for block, tile in itertools.product((1024, 512, 256), (128, 256, 512)):
            sizes = table.BlockSizes(block, tile, tile)
            needed = table.vmem_estimate(length, size, size, sizes, itemsize=2)
            if block > length or tile > block or needed > table.SMALLEST_VMEM_BYTES:
                continue
            compiled = functools.partial(_kernel_bundles, dump, chip, size, length, sizes, needed)
            blocks = length // block
            whole, others = compiled(causal=True), compiled(causal=False) if blocks > 1 else (0, 0)
            forward, backward = map(functools.partial(executed_bundles, blocks), whole, others)
            print(f"{block:5} {tile:5} {forward:8} {backward:9} {needed / 2**20:9.1f}", flush=True)


def executed_bundles(blocks: int, whole: int, other: int) -> int:
    """Bundles that a causal kernel executes over a row of so many blocks.

    Args:
      whole: of all its code, which is one piece for blocks on the diagonal and one for the others.
      other: of the latter, about the whole code of a kernel without a causal mask.
    """
    return blocks * (whole - other) + blocks * (blocks - 1) // 2 * other


def _kernel_bundles(
    dump: str, chip: str, size: int, length: int, sizes, vmem_bytes: int, *, causal: bool
) -> list[int]:
    """Scheduled bundles of LASER's forward and of its backward kernel, alone."""
    import jax
    import jax.numpy as jnp

    from laser.attention.kernels import backward, common, forward

    options = common.Options(
        laser=True, causal=causal, scale=size**-0.5, soft_cap=0.0, block=sizes.block,
        tile=sizes.tile, backward_tile=sizes.backward_tile, vmem_bytes=vmem_bytes,
    )  # fmt: skip
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=_one_device(chip))
    x = struct((1, 2, length, size), jnp.bfloat16)
    log_sum = struct((1, 2, 1, length), jnp.float32)
    reference = struct((1, 2, 2, size), jnp.float32)
    programs: list[tuple[Callable, list]] = [
        (lambda q, k, v: forward.forward(q, k, v, None, options), [x] * 3),
        (
            lambda q, k, v, out, d_out, log_sum, reference: backward.backward(
                q, k, v, out, d_out, log_sum, None, reference, options
            ),
            [x] * 5 + [log_sum, reference],
        ),
    ]
    found = []
    for program, arguments in programs:
        for path in Path(dump).iterdir():
            path.unlink()
        jax.jit(program).lower(*arguments).compile()
        found.append(sum(bundles.read(dump).values()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("static").add_argument("--json", type=Path)
    one = commands.add_parser("compile")
    for name, type_ in (("chip", str), ("heads", int), ("size", int), ("length", int)):
        one.add_argument(name, type=type_)
    one.add_argument("kind", choices=KINDS)
    one.add_argument("--value_size", type=int, help="head size of values, where it is another")
    one.add_argument("--kv_heads", type=int, help="heads of keys and values, if they are fewer")
    one.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    one.add_argument("--packed", action="store_true", help="with segment ids")
    one.add_argument("--soft_cap", type=float)
    one.add_argument("--full", action="store_true", help="not causal")
    several = commands.add_parser("search")
    for name, type_ in (("chip", str), ("size", int), ("length", int)):
        several.add_argument(name, type=type_)
    given = vars(parser.parse_args())
    plain = not (given.get("kv_heads") or given.get("soft_cap") or given.get("full"))
    if given.get("kind", "").startswith("splash") and not plain:
        parser.error("splash attention is compiled causal, without --kv_heads and --soft_cap")
    command, path = given.pop("command"), given.pop("json", None)
    run: dict[str, Callable[..., Any]] = {
        "static": static, "search": search, "compile": compile_program,
    }  # fmt: skip
    result = run[command](**given)
    if command == "compile":
        print(json.dumps(result))
    if path:
        path.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
