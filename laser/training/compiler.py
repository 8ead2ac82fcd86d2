"""Options for XLA's compiler by the kind of chip, with the reason.

Figures are milliseconds of the 2.2B's step on 256 chips as `plan.py` reads them from the compiled
schedule, with libtpu 0.0.42.1; docs/plans.md has them all, and what did not help. Nothing here
changes what is computed.
"""

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


def options(device_kind: str, wanted: str) -> Options | None:
    """Compiler options of a chip's programs, for `jax.jit`; of mesh.compiler_options=none no."""
    return OPTIONS.get(device_kind) if wanted == "chip" else None
