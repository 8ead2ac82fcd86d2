"""Times of attention, forward and backward, on the device at hand: ours, jax.nn's and PyTorch's.

    python scripts/benchmark_attention.py [--batch=1] [--length=1024] [--heads=4] [--size=64]
        [--json=PATH]
    python scripts/benchmark_attention.py --batch=4 --heads=16 --size=128

All are measured in turns on one device, so that their ratios hold on a busy machine, too: in
bfloat16 on a TPU or a GPU, in float32 on a CPU. `ours` is the implementation that `auto` takes,
which the first lines name; on a TPU or a GPU XLA's path, `chunked`, stands beside it. PyTorch's is
left out where it is not installed, and on TPUs. What kernels cost on a TPU that is not there is
counted by compile_attention.py.
"""

import argparse
import functools
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def times(
    batch: int = 1, length: int = 1024, heads: int = 4, size: int = 64, rounds: int = 7
) -> dict[str, float]:
    """Median milliseconds of forward and backward, measured in turns."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from laser.attention import attention

    backend = jax.default_backend()
    dtype = jnp.float32 if backend == "cpu" else jnp.bfloat16
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(batch, length, heads, size)).astype(np.float32) for _ in range(4)]
    cases: dict[str, Callable[[], Any]] = {}

    def add(name, run):
        def step(q, k, v, d_out):
            out, vjp = jax.vjp(run, q, k, v)
            return out, *vjp(d_out.astype(out.dtype))

        jitted, given = jax.jit(step), [jnp.asarray(x, dtype) for x in arrays]
        cases[name] = lambda: jax.block_until_ready(jitted(*given))

    def library(implementation):
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=implementation
        )

    def ours(kind, implementation="auto"):
        return functools.partial(attention, kind=kind, implementation=implementation)

    add("ours, standard", ours("standard"))
    add("ours, LASER", ours("laser"))
    if backend != "cpu":  # where it is what `auto` takes
        add("chunked, standard", ours("standard", "chunked"))
        add("chunked, LASER", ours("laser", "chunked"))
    add("jax.nn, XLA", library("xla"))
    if backend == "gpu":
        add("jax.nn, cuDNN", library("cudnn"))
    if torch_case := _torch(arrays, backend):
        cases["PyTorch SDPA"] = torch_case
    for run in cases.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name in rng.permutation(list(cases)):
            start = time.perf_counter()
            cases[name]()
            found[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, value in medians.items():
        print(f"{name:17} {value:9.2f} ms  {value / medians['ours, standard']:6.3f}")
    return medians


def _torch(arrays, backend: str) -> Callable[[], Any] | None:
    """Forward and backward of PyTorch's attention, or None where it cannot run on the same."""
    if backend == "tpu":
        return None
    try:
        import torch
    except ImportError:
        return None
    on_gpu = backend == "gpu"
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    if on_gpu and not torch.cuda.is_available():
        return None
    q, k, v, d_out = (
        torch.tensor(x.transpose(0, 2, 1, 3), dtype=dtype, device=device) for x in arrays
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def run():
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        gradients = torch.autograd.grad(out, inputs, d_out)
        if on_gpu:
            torch.cuda.synchronize()
        return gradients

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("batch", 1), ("length", 1024), ("heads", 4), ("size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    path = given.pop("json")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("laser.attention").setLevel(logging.INFO)  # what `auto` takes
    medians = times(**given)
    if path:
        path.write_text(json.dumps(medians))


if __name__ == "__main__":
    main()
