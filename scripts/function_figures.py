"""Draws the pictures of docs/function.md.

    python scripts/function_figures.py
    python scripts/function_figures.py --output=elsewhere

The first two follow from the formulas for two keys, in float64; the third one runs the function in
bfloat16 on this machine's backend and compares it with the oracle in float32.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt

from laser.attention import attention

# The same bytes from the same numbers, and text as text: small files, and few changes in them.
plt.rcParams |= {
    "svg.hashsalt": "laser",
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}
FIGURES = ("function_output", "function_gradient", "function_bfloat16")
POINTS = 41
FORMS: dict[str, tuple[Any, Any]] = {
    "standard": ("standard", "auto"),
    "LASER": ("laser", "auto"),
    "LASER, the paper's form": ("laser", "paper"),
}


def outputs(probability: float, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard attention and LASER of two keys: the other one has the value 0."""
    return probability * value, np.log1p(probability * np.expm1(value))


def gradients(probability: np.ndarray, value: float) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of the derivatives of both by the second key's logit."""
    rest = 1 - probability
    standard = value * probability * rest
    laser = np.expm1(value) * probability * rest / (1 + probability * np.expm1(value))
    return np.abs(standard), np.abs(laser)


def bfloat16_errors(stds: Sequence[float]) -> dict[str, list[float]]:
    """Root mean square errors, relative to that of the exact output, by standard deviation."""
    rng = np.random.default_rng(0)
    query, key, unit = (rng.normal(size=(1, 256, 1, 64)) for _ in range(3))
    errors: dict[str, list[float]] = {name: [] for name in FORMS}
    for std in stds:
        arrays = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, std * unit)]
        wide = [x.astype(jnp.float32) for x in arrays]
        for name, (kind, form) in FORMS.items():
            out = attention(*arrays, kind=kind, implementation=form).astype(jnp.float32)
            exact = attention(*wide, kind=kind, implementation="reference")
            rms = jnp.sqrt(jnp.square(out - exact).mean() / jnp.square(exact).mean())
            errors[name].append(float(rms))
    return errors


def draw_output() -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    value = np.linspace(-8, 14, POINTS)
    for i, probability in enumerate((0.5, 0.1, 0.01, 0.001)):
        standard, laser = outputs(probability, value)
        axes.plot(value, laser, f"C{i}", label=f"probability {probability:g}")
        axes.plot(value, standard, f"C{i}--", linewidth=1)
    axes.set(xlabel="value of the second key, nats", ylabel="output")
    axes.legend()
    return figure


def draw_gradient() -> plt.Figure:
    figure, both = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    probability = np.logspace(-6, np.log10(0.999), POINTS)
    for axes, sign in zip(both, (1, -1), strict=True):
        for i, size in enumerate((0.5, 2, 5, 10)):
            standard, laser = gradients(probability, sign * size)
            axes.loglog(probability, laser, f"C{i}", label=f"{sign * size:+g} nats")
            axes.loglog(probability, standard, f"C{i}--", linewidth=1)
        axes.set(xlabel="probability of the key")
        axes.legend()
    both[0].set(ylabel="|gradient by its logit|", ylim=(1e-7, 10))
    return figure


def draw_bfloat16() -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    stds = [2.0**i for i in range(-6, 5)]
    for kind, errors in bfloat16_errors(stds).items():
        axes.loglog(stds, errors, "o-", label=kind)
    axes.set(xlabel="standard deviation of the values", ylabel="relative error in bfloat16")
    axes.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/figures", help="folder")
    folder = parser.parse_args(argv).output
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in zip(FIGURES, (draw_output, draw_gradient, draw_bfloat16), strict=True):
        figure = draw()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        print(folder / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
