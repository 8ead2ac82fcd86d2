"""docs/model.md held to the model: what variants add, the numbers of a run, what is left out."""

import math
import re

import jax
import pytest

from configs import c4
from laser.training.config import load_config
from laser.training.fields import flatten
from models.families import init_parameters
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/model.md").read_text()
ROWS = re.findall(r"^\| `([\w+=.]+)` \| .* \| ([\d,]+)[^|]* \| [^|]* \|$", PAGE, re.MULTILINE)


def count(attention: str) -> int:
    config = load_config(c4.get_config(f"size=301m,attention={attention}"))
    shapes = jax.eval_shape(lambda: init_parameters(config.model, 0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("attention", "added"), ROWS)
def test_parameters_that_a_variant_adds(attention, added):
    assert count(attention) - count("standard") == int(added.replace(",", ""))


def test_every_variant_has_a_row():
    names = [attention.removeprefix("laser+") for attention, _ in ROWS]
    assert names == [
        "standard", "laser", "temp=0.5", "per_dim_temp", "qk_norm", "diff", "diff=scalar",
    ]  # fmt: skip


def test_numbers_of_the_update_and_the_schedule():
    of = c4.get_config().optimizer
    words = " ".join(PAGE.split())
    for said in (
        f"a global norm of {of.clip_grad_norm:g}", f"a root mean square of {of.clip_update_rms:g}",
        f"Adam with b1 {of.b1:g}, b2 {of.b2:g}, epsilon {of.eps:g}",
        f"then {of.weight_decay:g} of the matrices",
        f"from 0 to the peak of 1e-3 in {of.warmup_steps:,} steps, then a {of.schedule}",
    ):  # fmt: skip
        assert said in words
    assert of.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("a floor of the learning rate", "floor"), ("an output matrix apart", "untied"),
        ("dropout in the decoder", "dropout"), ("biases in the decoder's matrices", "bias"),
        ("a base of rotary positions", "base"), ("a sliding window in the model", "window"),
        ("an average of the weights (EMA)", "ema"), ("experts (MoE)", "expert"),
    ],
)  # fmt: skip
def test_what_is_left_out_has_no_field(row, field):
    assert f"| {row}" in PAGE
    assert not re.search(rf"[._]{field}", " ".join(flatten(c4.get_config().to_dict())))
