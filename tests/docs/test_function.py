"""What docs/function.md says of the function, its pictures, and the notebook."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import attention, reference
from tests.docs.pages import ROOT

B, T, H, D = 1, 12, 2, 8
FIGURES = ROOT / "docs/figures"
NOTEBOOK = ROOT / "docs/notebooks/larger_gradient.ipynb"


def inputs(value_std=1.0):
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, B, T, H, D)).astype(np.float32)
    return query, key, value * np.float32(value_std)


@jax.jit
def both(query, key, value):
    """Standard attention and LASER, and the variance of the values under the probabilities."""
    mean, squares = (attention(query, key, x, kind="standard") for x in (value, value**2))
    return mean, attention(query, key, value, kind="laser"), squares - mean**2


def test_small_values_give_standard_attention_and_half_the_variance():
    for std, tolerance in ((0.1, 2e-3), (0.05, 2.5e-4)):  # the third order: an eighth for a half
        mean, laser, variance = both(*inputs(std))
        np.testing.assert_allclose(laser, mean + variance / 2, rtol=0, atol=tolerance)
        assert np.abs(laser - mean).max() > 4 * tolerance * (std == 0.05)


def test_large_values_approach_the_largest_one_that_is_seen():
    query, key, value = inputs()
    largest = np.maximum.accumulate(value, axis=1)
    distances, before = [], -np.inf
    for scale in (1, 10, 1000):
        _, laser, _ = both(query, key, scale * value)
        distances.append(np.abs(laser / scale - largest).max())
        assert (laser / scale >= before - 1e-6).all()  # it grows
        before = laser / scale
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.02


def test_the_bounds():
    query, key, value = inputs(3.0)
    mean, laser, _ = map(np.asarray, both(query, key, value))
    largest = np.maximum.accumulate(value, axis=1)
    assert (laser >= mean - 1e-5).all()
    assert (laser <= largest + 1e-5).all()
    assert (laser > mean + 1e-3)[:, 1:].any()
    log_probs = reference.log_probabilities(
        query, key, logits_scale=D**-0.5, causal=True, segment_ids=None, logits_soft_cap=None
    )
    terms = log_probs[..., None] + value.transpose(0, 2, 1, 3)[:, :, None]  # (B, H, T, S, D)
    top = np.asarray(terms.max(axis=3)).transpose(0, 2, 1, 3)
    keys = np.arange(1, T + 1)[:, None, None]
    assert (laser >= top - 1e-5).all()
    assert (laser <= top + np.log(keys) + 1e-5).all()
    np.testing.assert_allclose(laser[:, 0], value[:, 0], atol=1e-6)  # one visible key


def test_a_constant_passes_through_and_a_sign_does_not():
    query, key, value = inputs()
    _, before, _ = both(query, key, value)
    shift = np.linspace(-3, 3, D, dtype=np.float32)
    _, after, _ = both(query, key, value + shift)
    np.testing.assert_allclose(after, before + shift, atol=1e-5)
    _, negative, _ = both(query, key, -value)
    assert np.abs(negative + before).max() > 0.1


def test_the_gradient_of_two_keys_is_the_paper_s():
    """Lemma 3.1 and equation 7, by logits (0, s): the query sees both keys."""

    def output(logit, values, kind):
        query = jnp.ones((1, 2, 1, 1))
        key = jnp.asarray([0.0, 1.0]).reshape(1, 2, 1, 1) * logit
        value = jnp.asarray(values).reshape(1, 2, 1, 1)
        return attention(query, key, value, kind=kind, logits_scale=1.0)[0, 1, 0, 0]

    gradient = jax.jit(jax.grad(output), static_argnums=2)
    for logit, low, high in ((-6.0, 0.0, 9.0), (1.0, 2.0, -1.0)):
        a = 1 / (1 + np.exp(-logit))
        y = a * np.exp(high) + (1 - a) * np.exp(low)
        expected = {
            "standard": (high - low) * a * (1 - a),
            "laser": (np.exp(high) - np.exp(low)) * a * (1 - a) / y,
        }
        for kind, derivative in expected.items():
            found = gradient(logit, (low, high), kind)
            np.testing.assert_allclose(found, derivative, rtol=1e-4)
    assert expected["laser"] < 0


@pytest.mark.parametrize(
    ("probability", "difference", "ratio"),
    [
        *zip([1e-3] * 6, [0.1, 0.5, 1, -0.1, -0.5, -1], [1.05, 1.30, 1.72, 0.95, 0.79, 0.63]),
        (0.5, 1, 0.92),
        (0.5, -1, 0.92),
    ],
)
def test_where_the_gradient_is_larger(probability, difference, ratio):
    """The numbers of the page."""
    assert f"{ratio:.2f}" in (ROOT / "docs/function.md").read_text()
    assert ratio_of_gradients(probability, difference) == pytest.approx(ratio, abs=0.005)


def test_the_ratio_for_small_differences():
    for probability in (0.001, 0.3, 0.9):
        found = ratio_of_gradients(probability, 0.01)
        assert found == pytest.approx(1 + (0.5 - probability) * 0.01, abs=1e-4)


def ratio_of_gradients(probability, difference):
    """LASER's by the logit of the first of two keys, over that of standard attention."""
    logit = np.log(probability / (1 - probability))

    def output(logit, kind):
        with_logit = jnp.asarray([0.0, 1.0]).reshape(1, 2, 1, 1) * logit
        value = jnp.asarray([0.0, difference]).reshape(1, 2, 1, 1)
        query = jnp.ones((1, 2, 1, 1))
        return attention(
            query, with_logit, value, kind=kind, logits_scale=1.0, implementation="reference"
        )[0, 1, 0, 0]

    with jax.enable_x64(True):
        laser, standard = (jax.grad(output)(logit, kind) for kind in ("laser", "standard"))
    return laser / standard


def test_pictures_of_the_page_are_there_and_all_are_made():
    from scripts import function_figures

    named = set(re.findall(r"figures/(\w+)\.svg", (ROOT / "docs/function.md").read_text()))
    assert named == set(function_figures.FIGURES) == {p.stem for p in FIGURES.iterdir()}
    sizes = [p.stat().st_size for p in FIGURES.iterdir()]
    assert min(sizes) > 5_000
    assert max(sizes) < 120_000


@pytest.mark.slow
def test_the_script_makes_them(tmp_path):
    from scripts import function_figures

    assert function_figures.main([f"--output={tmp_path}"]) == 0
    for name in function_figures.FIGURES:
        made, kept = (folder.joinpath(f"{name}.svg").read_text() for folder in (tmp_path, FIGURES))
        assert _labels(made) == _labels(kept), f"{name}: python scripts/function_figures.py"
    errors = function_figures.bfloat16_errors([0.125])
    assert errors["LASER"][0] < 0.002
    assert errors["LASER, the paper's form"][0] > 0.01


def _labels(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Its code cells, in a process of their own."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    result = subprocess.run(
        [sys.executable, "-c", "\n\n".join(code)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^(\w[\w ]+, (?:standard|laser)) (.*)$", result.stdout, re.MULTILINE)
    steps = {name: [int(n) for n in re.findall(r"\d+", numbers)] for name, numbers in rows}
    by_descent, adam = "gradient descent, ", "Adam, "
    # "4 higher" and "8 higher": what the notebook's last cell says.
    assert all(
        4 * laser < standard
        for laser, standard in zip(
            steps[by_descent + "laser"][2:], steps[by_descent + "standard"][2:]
        )
    )
    assert all(
        0.7 < laser / standard < 1.4
        for laser, standard in zip(steps[adam + "laser"], steps[adam + "standard"])
    )
