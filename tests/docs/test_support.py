"""The table of docs/drop-ins.md that says what each function takes, held to the functions."""

import ast
import contextlib
import inspect
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from laser.attention import attention, cached_attention, dot_product_attention, interface
from tests.attention.test_kernels import described_mesh
from tests.docs.pages import ROOT, blocks

FUNCTIONS = ("attention", "dot_product_attention", "cached_attention", "laser.torch")


def rows():
    """{feature: its cells}, and the names of the columns."""
    text = (ROOT / "docs/drop-ins.md").read_text()
    section = text.partition("## What each function takes")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", *(f"`{name}`" for name in FUNCTIONS), "by"]
    return {feature.partition(" (")[0]: rest for feature, *rest in cells[2:]}


ROWS = rows()


def parameters():
    """Of each function but the arrays; torch need not be there."""
    functions = (attention, dot_product_attention, cached_attention)
    found = [set(inspect.signature(function).parameters) for function in functions]
    tree = ast.parse((ROOT / "laser/torch.py").read_text())
    (function,) = (
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "scaled_dot_product_attention"
    )
    found.append({arg.arg for arg in (*function.args.args, *function.args.kwonlyargs)})
    return [names - {"query", "key", "value"} for names in found]


def test_arguments_in_the_table_are_those_of_the_functions():
    named = [set() for _ in FUNCTIONS]
    for feature, cells in ROWS.items():
        for cell, names, known in zip(cells, named, parameters()):
            assert cell, feature
            words = set(re.findall(r"`(\w+)`", cell))
            assert words <= known, f"{feature}: {cell}"
            names |= words
    # What is said elsewhere: how it is computed, and where the cache ends.
    rest = [{"kind", "implementation"}, {"kind", "implementation"}, {"kind", "stop"}, {"kind"}]
    for names, known, others in zip(named, parameters(), rest):
        assert known - names == others


@pytest.mark.slow
def test_the_folder_can_be_copied_as_the_page_says(tmp_path):
    commands = [b.text for b in blocks(ROOT / "docs/drop-ins.md") if "cp -r" in b.text]
    (tmp_path / "laser").symlink_to(ROOT / "laser")
    for folder in ("your_package", "YOUR_PROJECT"):
        (tmp_path / folder).mkdir()
    for command in commands:
        subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True)
    names = {"your_package.laser_attention": ".", "laser.attention": "YOUR_PROJECT"}
    for name, folder in names.items():
        path = str(tmp_path / folder)
        program = f"""
import sys
sys.path.insert(0, {path!r})
import jax
import {name} as copy
assert copy.__file__.startswith({path!r})
assert {name!r} == "laser.attention" or "laser" not in sys.modules
x = jax.numpy.ones((1, 4, 1, 8))
assert (copy.attention(x, x, x, kind="laser") == 1).all()
"""
        subprocess.run([sys.executable, "-I", "-c", program], check=True)


X = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
SHORT, FEW = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 64, 4, 64), (2, 128, 2, 64)))
NARROW = jax.ShapeDtypeStruct((2, 128, 4, 32), jnp.bfloat16)
SEGMENTS = jnp.zeros((2, 128), jnp.int32)
LENGTHS = jnp.full(2, 100)

CALLS = {
    "causal": [(attention, {}), (dot_product_attention, {"is_causal": True})],
    "packed rows": [(attention, {"segment_ids": SEGMENTS})],
    "a beginning that all segments share": [
        (attention, {"segment_ids": SEGMENTS, "shared_segment": 0})
    ],
    "sliding window": [(dot_product_attention, {"local_window_size": 16})],
    "mask": [(dot_product_attention, {"mask": jnp.ones((128, 128), bool)})],
    "bias, ALiBi; with a gradient": [(dot_product_attention, {"bias": jnp.ones((128, 128))})],
    "lengths": [
        (dot_product_attention, {name: LENGTHS})
        for name in ("query_seq_lengths", "key_value_seq_lengths")
    ],
    "keys of another length": [(dot_product_attention, {"key": SHORT, "value": SHORT})],
    "fewer heads of keys": [
        (function, {"key": FEW, "value": FEW}) for function in (attention, dot_product_attention)
    ],
    "values of another size": [
        (function, {"value": NARROW}) for function in (attention, dot_product_attention)
    ],
    "soft cap of the logits": [(attention, {"logits_soft_cap": 30.0})],
    "scale of the logits": [
        (attention, {"logits_scale": 0.3}), (dot_product_attention, {"scale": 0.3}),
    ],
    "the range": [
        (function, {"return_range": True}) for function in (attention, dot_product_attention)
    ],
}  # fmt: skip


@pytest.mark.parametrize("feature", CALLS)
def test_what_serves_it_is_what_auto_takes(feature, caplog):
    *_, by = ROWS[feature]
    promised = set(re.findall(r"`(\w+)`", by))
    for function, options in CALLS[feature]:
        found = {chosen(function, options, platform, caplog) for platform in ("tpu", "gpu", "cpu")}
        if feature == "sliding window":
            causal = options | {"is_causal": True}
            found.add(chosen(function, causal, "gpu", caplog))
            assert chosen(function, options, "gpu", caplog) == "chunked"
        assert found == promised, (function.__name__, options)


def chosen(function, options, platform, caplog):
    arrays = {"query": X, "key": X, "value": X}
    given = {name: options.get(name, array) for name, array in arrays.items()}
    rest = {name: x for name, x in options.items() if name not in arrays}
    interface._log_choice.cache_clear()
    caplog.clear()
    with caplog.at_level("INFO", "laser.attention"), contextlib.ExitStack() as stack:
        if platform != "cpu":
            stack.enter_context(jax.sharding.use_abstract_mesh(described_mesh(platform)))
        stack.enter_context(contextlib.suppress(RuntimeError))  # no cuDNN here
        jax.eval_shape(lambda **arrays: function(**arrays, **rest, kind="laser"), **given)
    (message,) = caplog.messages
    return re.match(rf"laser attention on {platform}: (\w+)", message)[1]


def test_all_other_rows_are_of_what_none_has_or_all_have():
    rest = set(ROWS) - set(CALLS)
    assert rest == {
        "dropout of probabilities", "log-sum-exp of the logits, probabilities",
        "context parallelism", "gradients, once", "forward mode and second derivatives of LASER",
    }  # fmt: skip
