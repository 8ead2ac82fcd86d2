"""What the machine can do, and the two settings that make XLA fast on a CPU.

Peaks are dense bfloat16 matrix FLOP/s per device from the vendors' data sheets; a CPU's is
measured.
"""

import ctypes
import importlib.util
import os
import resource
import sys
import time

# jax's device_kind → FLOP/s. TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e). GPUs: NVIDIA data
# sheets, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

_CPU_FLAG = (
    "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
)


def tune_cpu() -> None:
    """Call before jax is imported. Last bits of results differ by it; accelerators are not touched.

    XLA's CPU backend allocates and frees every temporary of a step; by default glibc hands that
    memory back to the kernel and faults it in again, 100,000 pages a step and more. The flag lets
    XLA give matrix products and reductions to a faster library. Its maximum passes over NaN; its
    sums do not, so a NaN still reaches the loss. Measured: see scripts/benchmark_train.py.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu" or importlib.util.find_spec("libtpu") is None:
        os.environ["XLA_FLAGS"] = f"{_CPU_FLAG} {os.environ.get('XLA_FLAGS', '')}".strip()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc
            m_trim_threshold, m_mmap_max = -1, -4
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def peak_flops() -> float:
    """Matrix FLOP/s of all devices together; 0 for an accelerator that is not in the table."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_flops()  # simulated devices share the one CPU
    return PEAK_FLOPS.get(device.device_kind, 0.0) * jax.device_count()


def _measured_cpu_flops(size: int = 1024, repeats: int = 10) -> float:
    """The best float32 matrix product of a few, in FLOP/s."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_gib() -> float:
    """Peak memory in GiB: of this host's fullest device, or of the process on a CPU."""
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
