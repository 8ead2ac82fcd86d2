"""What is done by hand for XLA's compiler, by the kind of chip, with the reason.

Figures are milliseconds of the 2.2B's step on 256 chips as `plan.py` reads them from the compiled
schedule, with libtpu 0.0.42.1; docs/compiler-notes.md has them, and what did not help. Nothing here
changes what is computed.
"""

import logging
import os
from pathlib import Path

import jax

log = logging.getLogger(__name__)

COMPILED = "compiled"
Options = dict[str, bool | int]

# Without these no collective is asynchronous on v5p; with them some gathers of weights go on beside
# products that do not need them: 272 to 252 ms.
ASYNCHRONOUS_GATHERS: Options = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# With the default of 16 MiB of on-chip memory for a fusion, products have smaller tiles: 272 to 266
# ms, and 252 to 250 on top of the former.
LARGER_TILES: Options = {"xla_tpu_scoped_vmem_limit_kib": 65472}

V5P = {**ASYNCHRONOUS_GATHERS, **LARGER_TILES}
# By jax's device_kind. For other chips nothing was found yet: v5e overlaps some gathers by itself.
OPTIONS = {"TPU v5": V5P, "TPU v5p": V5P}

# The smallest part of a weight, in bytes on one device, that is gathered over several axes of the
# torus at once. XLA for v5e expects the gather of a smaller part to be bound by latency and makes
# an all-reduce of it, which moves twice the bytes. It did so at 64 KiB on 16 x 16 chips, at 128 KiB
# on 8 x 8. On v5p parts of 64 KiB on 4 x 8 x 8 chips stay one all-gather over all six links: 43 ms
# of gathers become 15, all but one of them hidden.
SMALL_PART_BYTES = {"TPU v5": 0, "TPU v5p": 0}
SMALL_PART_BYTES_ELSEWHERE = 256 * 1024


def options(device_kind: str, wanted: str) -> Options | None:
    """Options of `jax.jit` for programs of a chip; None if mesh.compiler_options is "none"."""
    return OPTIONS.get(device_kind) if wanted == "chip" else None


def keep_programs(workdir: Path, backend: str) -> None:
    """On TPUs, has jax keep what it compiles in the run's folder: minutes for each start after the
    first. Host 0 writes, all read. Before the first compilation, or it has no effect.

    Not elsewhere: CPUs of several kinds may share a folder, and GPUs tune while they compile, all
    hosts together or none. JAX_COMPILATION_CACHE_DIR names another folder, for several runs.
    """
    if backend != "tpu":
        return
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(workdir / COMPILED)
    jax.config.update("jax_compilation_cache_dir", folder)
    log.info("compiling takes minutes where %s does not have the program yet", folder)


def small_part_bytes() -> int:
    """Smaller parts of weights are gathered over one mesh axis after the other."""
    device = jax.sharding.get_abstract_mesh().abstract_device  # of the mesh in context
    kind = device.device_kind if device else ""
    return SMALL_PART_BYTES.get(kind, SMALL_PART_BYTES_ELSEWHERE)
