"""How XLA compiles the programs of tests. Set before jax starts, so nothing is imported here."""

# Without LLVM's optimizations and with loops made in the older way: a third of the time.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=2"
)
