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
    optimizer = c4.get_config().optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.99, 1e-24)
    assert (optimizer.clip_grad_norm, optimizer.clip_update_rms) == (1.0, 1.0)
    assert (optimizer.weight_decay, optimizer.learning_rate) == (0.1, 1e-3)
    assert (optimizer.warmup_steps, optimizer.schedule) == (1000, "cosine")


def test_what_is_left_out_has_no_field():
    fields = " ".join(flatten(c4.get_config().to_dict()))
    for name in ("floor", "untied", "dropout", "rope", "base", "window", "ema", "expert", "bias"):
        assert not re.search(rf"[._]{name}", fields), name
