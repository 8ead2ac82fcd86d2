"""Shows what the attention of a run does to probabilities, rounding and gradients.

    python scripts/inspect_attention.py runs/laser
    python scripts/inspect_attention.py runs/laser --text=held_out.txt --rows=8

On the first rows of a text (held-out chapters of the embedded corpus, unless --text names a file):
how many attention probabilities a are small, and of a (1 - a), which scales the gradient through a
softmax (paper, figure 1); the norm of the gradient by layer and by Q, K and V, for every checkpoint
that is there (figure 3); the error of the attention output in bfloat16 (appendix A.5). Writes
RUN/inspection.json and RUN/inspection.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from laser.training.folders import folder_of, write_atomically
from laser.training.hardware import tune_cpu


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=folder_of, metavar="RUN", help="folder of a run")
    parser.add_argument("--text", type=Path, help="a text file in UTF-8")
    parser.add_argument("--rows", type=int, default=8, help="of the run's length (default 8)")
    arguments = parser.parse_args(argv)
    tune_cpu("bfloat16")  # which the run may have
    from laser.training.checkpoint import CheckpointError

    try:
        if arguments.rows < 1:
            raise ValueError(f"rows={arguments.rows}: must be at least 1")
        found = inspect(arguments.run, _read(arguments.text), arguments.rows)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"inspect_attention.py: error: {error}", file=sys.stderr)
        return 2
    write_atomically(arguments.run / "inspection.json", json.dumps(found) + "\n")
    draw(found, arguments.run / "inspection.png")
    print(report(found))
    print(f"\n{arguments.run / 'inspection.png'}")
    return 0


def inspect(run: Path, text: str, rows: int) -> dict[str, Any]:
    """All that is measured. Raises ValueError where there is no run or too little text."""
    import jax

    from eval.run import open_model, saved_steps
    from study import inspection
    from study.measure import batches

    steps = saved_steps(run)
    model = open_model(run)
    config, length = model.config, model.config.data.seq_len
    rows += -rows % jax.device_count()
    tokens = model.tokenizer.encode(text)
    if len(tokens) <= rows * length:
        raise ValueError(
            f"rows={rows}: the text has only {len(tokens):,} tokens for rows of {length}; "
            f"take at most {(len(tokens) - 1) // length}"
        )
    (batch,) = batches(tokens[: rows * length + 1], rows, length)

    def captured():
        return inspection.capture(config.model, model.params, batch["inputs"])

    norms = inspection.make_gradient_norms(config, batch)
    gradients = {step: norms(open_model(run, step).params) for step in steps}
    return {
        "run": str(run),
        "step": model.step,
        "attention": config.model.attention.kind,
        "rows": rows,
        "probabilities": inspection.probabilities(config.model, captured()),
        "reconstruction": inspection.reconstruction(config.model, captured()),
        "reconstruction_over": "rows and layers",
        "gradients": gradients,
    }


def report(found: dict[str, Any]) -> str:
    """What is printed."""
    shares = found["probabilities"]
    lines = [f"{found['run']}, step {found['step']}, {found['attention']} attention, "
             f"{found['rows']} rows, {shares['pairs']:,} probabilities"]  # fmt: skip
    for name in ("a", "a (1 - a)"):
        told = ", ".join(f"{share:.1%} below {limit}" for limit, share in shares[name].items())
        lines.append(f"  {name:<10} {told}")
    over = found.get("reconstruction_over", "layers")  # which the first recorded ones are over
    lines.append(f"error of the attention output in bfloat16, mean (deviation) over {over}")
    for name, (mean, deviation) in found["reconstruction"].items():
        lines.append(f"  {name:<24} {mean:.5f} ({deviation:.5f})")
    step, norms = list(found["gradients"].items())[-1]
    lines.append(f"gradient norms at step {step}: all {norms['all']:.4f}")
    for name, values in norms["layers"].items():
        lines.append(f"  {name:<6} by layer  {'  '.join(f'{value:.4f}' for value in values)}")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Histograms, and gradient norms by layer of the newest checkpoint and over checkpoints."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    shares, gradients = found["probabilities"], found["gradients"]
    for name, histogram in shares["histogram"].items():
        axes[0].stairs(histogram, shares["edges"], label=f"{name}, 1 run")
    axes[0].set(xlabel="log10 of the attention probability; at -12 all below",
                ylabel="share of the visible pairs")  # fmt: skip
    step, newest = list(gradients.items())[-1]
    for name, values in newest["layers"].items():
        axes[1].plot(range(len(values)), values, marker="o", label=f"{name}, step {step}, 1 run")
    axes[1].set(xlabel="layer", ylabel="gradient norm of its weights (nats)", yscale="log")
    steps = list(gradients)
    axes[2].plot(steps, [gradients[s]["all"] for s in steps], marker="o", label="all, 1 run")
    for name in newest["layers"]:
        norms = [float(np.linalg.norm(gradients[s]["layers"][name])) for s in steps]
        axes[2].plot(steps, norms, marker="o", label=f"{name}, all layers, 1 run")
    axes[2].set(xlabel="step", ylabel="gradient norm (nats)", yscale="log")
    for axis in axes:
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{found['attention']} attention, {found['run']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _read(path: Path | None) -> str:
    if path is not None:
        return path.read_text(encoding="utf-8")
    from data.sources import corpus

    return corpus.held_out_text()


if __name__ == "__main__":
    sys.exit(main())
