"""Speed of generation on this machine, beside transformers' generate on a GPT-2 of the same shape.

    python scripts/benchmark_generate.py [--rounds=5] [--shapes=small,base] [--batches=1,8]

Greedy continuations of prompts of tokens, from the first token of the prompt to the last new one on
the host, with standard and LASER attention and, where requirements-peers.txt is installed, with
PyTorch. All take turns in one process in random order, since machines drift. Parameters are random;
the time does not depend on them.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from laser.training.hardware import tune_cpu

if __name__ == "__main__":
    tune_cpu()  # before anything imports jax

import numpy as np

from scripts.benchmark_train import THREADS, Case, ratio, run_in_turns

STANDARD, LASER, PEER = "ours, standard", "ours, LASER", "transformers, GPT-2"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and how much is generated. Heads share the width, the MLP is four times as wide."""

    layers: int
    dim: int
    heads: int
    vocabulary: int
    prompt: int = 32  # tokens
    new: int = 64  # tokens


SHAPES = {  # the quickstart's, and one of 110 million parameters
    "small": Shape(layers=4, dim=256, heads=4, vocabulary=4096),
    "base": Shape(layers=12, dim=768, heads=12, vocabulary=32000),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batches", default="1,8", help="prompts at a time (default: 1,8)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds}: must be at least 1")
    names, batches = arguments.shapes.split(","), arguments.batches.split(",")
    for name in names:
        if name not in SHAPES:
            parser.error(f"--shapes={arguments.shapes}: {name!r} is none of {', '.join(SHAPES)}")
    if not all(batch.isdigit() and int(batch) > 0 for batch in batches):
        parser.error(f"--batches={arguments.batches}: must be numbers with commas between them")
    peers = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if not peers:
        print("requirements-peers.txt is not installed: without PyTorch")
    for name in names:
        for batch in map(int, batches):
            seconds = measure(SHAPES[name], batch, arguments.rounds, peers)
            print("\n".join(report(name, SHAPES[name], batch, seconds)), flush=True)
    return 0


def measure(shape: Shape, batch: int, rounds: int, peers: bool) -> dict[str, list[float]]:
    """Seconds of every round by case, after two runs that are not counted."""
    prompts = np.random.default_rng(0).integers(1, shape.vocabulary, (batch, shape.prompt))
    cases = {
        STANDARD: our_case(shape, prompts, "standard"),
        LASER: our_case(shape, prompts, "laser"),
    }
    if peers:
        cases[PEER] = peer_case(shape, prompts)
    return run_in_turns(cases, rounds)


def our_case(shape: Shape, prompts: np.ndarray, kind: Literal["standard", "laser"]) -> Case:
    from eval.generation.generator import Generator
    from models.config import AttentionConfig, ModelConfig
    from models.families import init_parameters

    config = ModelConfig(
        vocab_size=shape.vocabulary,
        num_layers=shape.layers,
        model_dim=shape.dim,
        mlp_dim=4 * shape.dim,
        num_heads=shape.heads,
        head_dim=shape.dim // shape.heads,
        attention=AttentionConfig(kind=kind),
    )
    params = init_parameters(config, 0)
    tokenizer: Any = SimpleNamespace(eos_id=0, vocab_size=config.vocab_size)  # ids go in and out
    generator = Generator(config, tokenizer, max_length=shape.prompt + shape.new, rows=len(prompts))

    def run():
        made = generator.generate_tokens(params, prompts.tolist(), max_new_tokens=shape.new)
        if {len(row) for row in made} != {shape.new}:
            raise RuntimeError("a row ended early: it would count as faster than it is")

    return run


def peer_case(shape: Shape, prompts: np.ndarray) -> Case:
    """As a user of transformers would write it: a cache, greedy, no gradients."""
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
        n_positions=shape.prompt + shape.new,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.tensor(prompts)
    settings = {"max_new_tokens": shape.new, "do_sample": False, "use_cache": True}

    def run():
        with torch.inference_mode():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)

    return run


def report(name: str, shape: Shape, batch: int, seconds: dict[str, list[float]]) -> Iterator[str]:
    """The lines of one table."""
    sizes = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(shape).items())
    yield f"\n{name}: {sizes}; batch {batch}; float32, {THREADS} threads"
    yield f"{'':22s}{'median s':>10s}{'min s':>8s}{'tokens/s':>10s}{'speed / GPT-2':>15s}"
    for case, times in seconds.items():
        median = statistics.median(times)
        faster = f"{ratio(seconds[PEER], times):.2f}" if PEER in seconds else "-"
        speed = batch * shape.new / median
        yield f"{case:22s}{median:10.3f}{min(times):8.3f}{speed:10,.0f}{faster:>15s}"


if __name__ == "__main__":
    sys.exit(main())
