"""LASER in PyTorch beside PyTorch's own attention, forward and backward, one after the other.

    python scripts/benchmark_torch.py [--length=1024] [--heads=8] [--size=64] [--repeats=9]
        [--threads=1]

Needs torch (requirements-peers.txt), takes a GPU where it finds one, and prints the median time of
each and the median of the ratios within a round, so that other load on the machine falls on both.
On a CPU the time is that of the process, in all its threads.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    import torch
except ImportError:
    sys.exit("benchmark_torch.py: error: no package torch: pip install -r requirements-peers.txt")

from laser.torch import scaled_dot_product_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in {
        "batch": 1,
        "length": 1024,
        "heads": 8,
        "size": 64,
        "repeats": 9,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (arguments.batch, arguments.heads, arguments.length, arguments.size)
    torch.manual_seed(0)
    tensors = [
        torch.randn(shape, dtype=getattr(torch, arguments.dtype), device=device) for _ in range(3)
    ]
    print(f"{device}, {torch.get_num_threads()} threads, {arguments.dtype}, causal, {shape}")
    for backward in (False, True):
        times: dict[str, list[float]] = {"standard": [], "laser": []}
        for repeat in range(arguments.repeats + 1):
            for kind, seconds in times.items():
                taken = _seconds(tensors, kind, backward, device)
                if repeat:  # the first round warms up
                    seconds.append(taken)
        ratio = statistics.median(b / a for a, b in zip(times["standard"], times["laser"]))
        shown = ", ".join(f"{k} {1e3 * statistics.median(v):.1f} ms" for k, v in times.items())
        print(f"  {'forward + backward' if backward else 'forward'}: {shown}, ratio {ratio:.2f}")


def _seconds(tensors: list[torch.Tensor], kind, backward: bool, device: str) -> float:
    query, key, value = (x.detach().requires_grad_(backward) for x in tensors)
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    out = scaled_dot_product_attention(query, key, value, is_causal=True, kind=kind)
    if backward:
        out.sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
