"""What makes the programs of tests quick. Set before jax starts, so it is not imported here."""

import gc

# Without LLVM's optimizations and with loops made in the older way: a third of the time.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

# What libtpu compiles takes a quarter of the time. It refuses what does not fit HBM or VMEM all the
# same; what moves between chips and what the backward pass keeps are equal to a thousandth, but
# buffers lie less tightly: up to a tenth more of them.
QUICK_FOR_TPU = {"JAX_OPTIMIZATION_LEVEL": "O0"}


def collect_seldom() -> None:
    """For a process that has imported all it needs: half of a million objects, which stay.

    To look through them for garbage, as often as tracing asks for it, is a fifth of its time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
