"""What machines can do, and the two settings that make XLA fast on a CPU.

Peaks are the vendors'; a CPU's is measured.
"""

import ctypes
import dataclasses
import glob
import importlib.util
import os
import resource
import sys
import time


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a kind of device can do at best.

    Attributes:
      name: short, as in the name of a slice.
      flops: dense bfloat16 matrix FLOP/s.
      hbm_gib: memory that XLA lets a program use, as its compiler reports; 0 unknown.
      hbm_bandwidth: bytes/s of that memory; 0 unknown.
      link_bandwidth: bytes/s in one direction of one link of the torus; 0 where there is none.
      slice_bandwidth: bytes/s of a chip to other slices, over the data center's network; 0 unknown.
      clock: cycles/s of a TPU's cores; 0 unknown.
    """

    name: str
    flops: float
    hbm_gib: float = 0.0
    hbm_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    slice_bandwidth: float = 0.0
    clock: float = 0.0


# By jax's device_kind. TPUs: docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e: peak
# compute, HBM bandwidth, interconnect bandwidth per chip (2400, 1600, 4800, 3200 Gbps over 6, 4, 6
# and 4 ports), data center network per pod of 256 (v5e 6.4, v6e 25.6 Tbps). hbm_gib: libtpu
# 0.0.42.1 for programs that are too large. Clocks: peak compute over what the matrix units do in a
# cycle, two FLOPs in each of 128 x 128 places: 8 units in v4 and v5p, 4 in v5e; of 256 x 256 places
# in v6e 4. GPUs: NVIDIA's data sheets, without sparsity.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 30.75, 1228e9, 50e9, clock=1.05e9),
    "TPU v5 lite": Chip("v5e", 197e12, 15.75, 819e9, 50e9, 3.125e9, 1.5e9),
    "TPU v5": Chip("v5p", 459e12, 95.74, 2765e9, 100e9, clock=1.75e9),
    "TPU v5p": Chip("v5p", 459e12, 95.74, 2765e9, 100e9, clock=1.75e9),
    "TPU v6 lite": Chip("v6e", 918e12, 31.25, 1640e9, 100e9, 12.5e9, 1.75e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12),
    "NVIDIA H200": Chip("H200", 989e12),
}

# Products of float32 go to the library with what is around them, which takes 0.87 of the time of
# products alone. In bfloat16 XLA (jax 0.10.2) makes one fusion of all chunks' gradients of the keys
# that way, which writes to address 0 with 8 heads of 128 and 4 rows of 1,024.
_CPU_FLAG = (
    "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_{dot},LIBRARY_FUSION_TYPE_REDUCE"
)
_DOT = {"float32": "DOT", "bfloat16": "INDIVIDUAL_DOT"}


def tune_cpu(dtype: str = "float32") -> None:
    """Call before jax is imported. Last bits of results differ by it; accelerators are not touched.

    XLA's CPU backend allocates and frees every temporary of a step; by default glibc hands that
    memory back to the kernel and faults it in again, 100,000 pages a step and more. The flag lets
    XLA give matrix products and reductions to a faster library. Its maximum passes over NaN; its
    sums do not, so a NaN still reaches the loss. Measured: see scripts/benchmark_train.py.

    Args:
      dtype: of the activations of which gradients are made; bfloat16 if that is not known.
    """
    if not has_accelerator():
        # Where libtpu is there for planning alone, jax would look for its chips in vain, aloud.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if os.environ.get("JAX_PLATFORMS") == "cpu" or importlib.util.find_spec("libtpu") is None:
        flag = _CPU_FLAG.format(dot=_DOT[dtype])
        os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}".strip()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc
            m_trim_threshold, m_mmap_max = -1, -4
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def has_accelerator() -> bool:
    """Whether this machine has a TPU or a GPU, by its device files."""
    files = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*")
    return any(glob.glob(pattern) for pattern in files)


def peak_flops() -> float:
    """Matrix FLOP/s of all devices together; 0 for an accelerator that is not in the table."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_flops()  # simulated devices share the one CPU
    chip = CHIPS.get(device.device_kind)
    return chip.flops * jax.device_count() if chip else 0.0


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
