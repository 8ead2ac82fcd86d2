"""Speed of a full training step on this CPU, beside the matrix products that it is made of.

    python scripts/benchmark_train.py [--peers] [--steps=N] [--json=PATH]

Times the step that train.py runs, for standard and LASER attention; the step's matrix products
alone, which no implementation can leave out; and with --peers (requirements-peers.txt) a GPT-2 of
the same shape from transformers on PyTorch, eager and compiled. All take turns in one process in
random order, since machines drift. What `laser.training.hardware.tune_cpu` sets holds for a whole
process, so there are two of them: without it, and with it, as train.py runs.
"""

import argparse
import dataclasses
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import base
from laser.training import hardware
from laser.training.config import RunConfig, load_config

# jax is imported by functions only: `tune_cpu` has to come first.

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SETTINGS = {"plain": "As installed", "tuned": "With tune_cpu(), as train.py runs"}
STANDARD, LASER, PRODUCTS = "ours, standard", "ours, LASER", "matrix products alone"
EAGER, COMPILED = "PyTorch GPT-2, eager", "PyTorch GPT-2, compiled"
PEAK_SIZES = (512, 1024, 2048)  # of the square products among which the fastest is the peak

Case = Callable[[], Any]  # runs once, and returns when the result is there


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and its batch. Heads share the width, and the MLP is four times as wide."""

    layers: int = 4
    dim: int = 256
    heads: int = 4
    vocabulary: int = 32000
    length: int = 256
    batch: int = 8

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of every round by case, the best FLOP/s of one product, and the FLOPs of a step."""

    seconds: dict[str, list[float]]
    peak: float
    flops: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", action="store_true", help="time PyTorch's GPT-2 too")
    parser.add_argument("--steps", type=int, default=15, help="timed runs of each (default: 15)")
    parser.add_argument("--json", metavar="PATH", help="write all times there")
    parser.add_argument("--setting", choices=SETTINGS, help="only this one (default: both)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error(f"--steps={arguments.steps}: medians need at least 2")
    # Where libtpu is there for planning alone, jax would look for its chips in vain, aloud.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    shape, load = Shape(), os.getloadavg()[0]
    if arguments.setting:
        if arguments.setting == "tuned":
            hardware.tune_cpu()
        results = {arguments.setting: measure(shape, arguments.steps, arguments.peers)}
    else:
        results = {
            name: measure_in_child(name, arguments.steps, arguments.peers) for name in SETTINGS
        }
    if arguments.json:
        tree = {name: dataclasses.asdict(result) for name, result in results.items()}
        Path(arguments.json).write_text(json.dumps(tree))
    print("\n\n".join(report(shape, results)))
    print(
        f"Load average before the start: {load:.1f}; other work slows some cases more than others."
    )
    return 0


def measure_in_child(setting: str, steps: int, peers: bool) -> Result:
    """The result of a process of its own, since a setting cannot be taken back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, __file__, f"--setting={setting}", f"--steps={steps}"]
        command += [f"--json={path}"] + ["--peers"] * peers
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return Result(**json.loads(path.read_text())[setting])


def measure(shape: Shape, steps: int, peers: bool) -> Result:
    """Runs every case `steps` times in turns, after two runs that are not counted."""
    from models.decoder import train_flops_per_token

    configs = {STANDARD: make_config(shape, "standard"), LASER: make_config(shape, "laser")}
    cases = {name: train_case(config) for name, config in configs.items()}
    cases[PRODUCTS] = products_case(shape)
    if peers:
        cases |= {EAGER: gpt2_case(shape), COMPILED: gpt2_case(shape, compiled=True)}
    products = {f"{name} {size}": (case, size) for name, case, size in peak_cases(peers)}
    everything = cases | {name: case for name, (case, _) in products.items()}
    seconds = run_in_turns(everything, steps)
    flops = shape.tokens * train_flops_per_token(configs[STANDARD].model, shape.length)
    peak = max(2 * size**3 / min(seconds[name]) for name, (_, size) in products.items())
    return Result({name: seconds[name] for name in cases}, peak, flops)


def run_in_turns(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round; every round has its own random order."""
    for case in cases.values():
        case()
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name in random.sample(list(cases), len(cases)):
            start = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def make_config(shape: Shape, kind: str) -> RunConfig:
    """configs/base.py with the shape, and the layers as a small model is best trained."""
    config = base.get_config()
    config.model.update(
        num_layers=shape.layers,
        model_dim=shape.dim,
        mlp_dim=4 * shape.dim,
        num_heads=shape.heads,
        head_dim=shape.dim // shape.heads,
        vocab_size=shape.vocabulary,
        remat="none",
        unroll=True,
    )
    config.attention.kind = kind
    config.data.seq_len = shape.length
    config.training.batch_size = shape.batch
    config.mesh.update(data=1)
    return load_config(config)


def train_case(config: RunConfig) -> Case:
    """The step that laser/training/loop.py runs, on one batch of random tokens."""
    import jax
    import jax.numpy as jnp

    from laser.training import sharding
    from laser.training.program import Program

    program = Program(config, sharding.make_mesh(config, jax.devices()[:1]))
    state = program.init_state()
    size = (config.training.batch_size, config.data.seq_len + 1)
    tokens = jax.random.randint(jax.random.key(0), size, 0, config.model.vocab_size)
    weights = jnp.ones(tokens[:, 1:].shape, jnp.float32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    batch = jax.device_put(batch, program.batch_sharding)

    def run():
        nonlocal state
        state, metrics = program.train_step(state, batch)
        jax.block_until_ready((state, metrics))

    return run


def products_case(shape: Shape) -> Case:
    """The products of forward and backward pass, chained as in the step, and nothing between them.

    Causal attention has half of the square, as half of the keys; the logits are made for as many
    tokens at a time as in the step. Of other work there is only what a chain cannot do without:
    sums of gradients that meet, and the copies of transposed operands that XLA makes.
    """
    import jax
    import jax.numpy as jnp

    from laser.training.loss import chunk_length
    from models.products import dense

    half, size = shape.length // 2, shape.dim // shape.heads
    chunk = shape.batch * chunk_length(shape.batch, shape.length)

    def block(x_BTM, weights):
        query, key, value, output, up, down = weights
        q_BHTD = jnp.einsum("btm,mhd->bhtd", x_BTM, query)
        k_BHTD = jnp.einsum("btm,mhd->bhtd", x_BTM, key)
        v_BHTD = jnp.einsum("btm,mhd->bhtd", x_BTM, value)
        logits_BHTS = jnp.einsum("bhtd,bhsd->bhts", q_BHTD, k_BHTD[:, :, :half])
        out_BHTD = jnp.einsum("bhts,bhsd->bhtd", logits_BHTS, v_BHTD[:, :, :half])
        return dense(dense(jnp.einsum("bhtd,hdm->btm", out_BHTD, output), up), down)

    def blocks(layers, x_BTM):
        return functools.reduce(block, layers, x_BTM)

    def readout(hidden_NM, embedding_VM):
        def add(d_embedding_MV, hidden_CM):
            logits_CV = jnp.einsum("cm,vm->cv", hidden_CM, embedding_VM)
            d_embedding_MV += jnp.einsum("cm,cv->mv", hidden_CM, logits_CV)
            return d_embedding_MV, logits_CV @ embedding_VM

        chunks = hidden_NM.reshape(-1, chunk, shape.dim)
        return jax.lax.scan(add, jnp.zeros_like(embedding_VM.T), chunks)

    @jax.jit
    def products(layers, x_BTM, embedding_VM):
        hidden_BTM, backward = jax.vjp(blocks, layers, x_BTM)
        d_embedding_MV, d_hidden = readout(hidden_BTM, embedding_VM)
        return backward(d_hidden.reshape(x_BTM.shape)), d_embedding_MV

    keys: Iterator[jax.Array] = iter(jax.random.split(jax.random.key(0), 6 * shape.layers + 2))

    def normal(*dims):
        return jax.random.normal(next(keys), dims) / shape.dim**0.5

    dim, heads = shape.dim, shape.heads
    layers = [
        [
            *(normal(dim, heads, size) for _ in range(3)),
            normal(heads, size, dim),
            normal(dim, 4 * dim),
            normal(4 * dim, dim),
        ]
        for _ in range(shape.layers)
    ]
    inputs = layers, normal(shape.batch, shape.length, dim), normal(shape.vocabulary, dim)
    return lambda: jax.block_until_ready(products(*inputs))


def peak_cases(peers: bool) -> Iterator[tuple[str, Case, int]]:
    """Single products, each by every library at hand: name, case, size of the square."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)

    def run(x):
        return product(x, x).block_until_ready()

    for size in PEAK_SIZES:
        yield "jax", functools.partial(run, jnp.ones((size, size), jnp.float32)), size
        if peers:
            import torch

            y = torch.ones(size, size)
            yield "torch", functools.partial(torch.mm, y, y), size


def gpt2_case(shape: Shape, compiled: bool = False) -> Case:
    """A step as a user of transformers would write it, with PyTorch's fused AdamW."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.dim,
        n_head=shape.heads,
        n_inner=4 * shape.dim,
        vocab_size=shape.vocabulary,
        n_positions=shape.length,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length))
    forward = torch.compile(model) if compiled else model

    def run():
        optimizer.zero_grad()
        forward(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def report(shape: Shape, results: dict[str, Result]) -> Iterator[str]:
    """The paragraphs to print."""
    peak = max(result.peak for result in results.values())
    flops = next(iter(results.values())).flops
    sizes = ", ".join(f"{name} {size}" for name, size in dataclasses.asdict(shape).items())
    yield (
        f"{sizes}; float32, AdamW; {flops / 1e9:.1f} GFLOP a step\n"
        f"{THREADS} threads; the best single matrix product ran at {peak / 1e9:.0f} GFLOP/s"
    )
    for name, result in results.items():
        yield f"{SETTINGS[name]}\n" + "\n".join(table(shape, result, peak))
    yield (
        "Ratios: median over the rounds of the ratio within a round. IQR: between the quartiles.\n"
        "Of peak: the step's FLOPs / median / peak, causal attention counted half."
    )


def table(shape: Shape, result: Result, peak: float) -> Iterator[str]:
    """The lines of one setting's table."""
    seconds = result.seconds
    yield (
        f"{'':24s}{'median s':>9s}{'min s':>8s}{'IQR s':>8s}{'/ products':>12s}{'/ eager':>9s}"
        f"{'of peak':>9s}{'tokens/s':>10s}"
    )
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        versus_eager = f"{ratio(times, seconds[EAGER]):.2f}" if EAGER in seconds else "-"
        yield (
            f"{name:24s}{median:9.3f}{min(times):8.3f}{high - low:8.3f}"
            f"{ratio(times, seconds[PRODUCTS]):12.2f}{versus_eager:>9s}"
            f"{result.flops / median / peak:9.0%}{shape.tokens / median:10,.0f}"
        )
    yield f"LASER / standard: {ratio(seconds[LASER], seconds[STANDARD]):.3f}"


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' own ratios, which a slow spell of the machine moves little."""
    return statistics.median(a / b for a, b in zip(times, others))


if __name__ == "__main__":
    sys.exit(main())
