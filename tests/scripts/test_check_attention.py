"""The check of attention on the devices at hand: what is right passes, what is wrong does not."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser.attention import chunked, interface, reference
from laser.planning.topologies import NO_DEVICE
from scripts import check_attention
from scripts.check_attention import BF16, CASES, F32, VALUES, Case, expected, inputs, main

ROOT = Path(__file__).resolve().parents[2]
TINY = Case("tiny", 33, 16, runs=((BF16, "standard"), (F32, "laser")), values=tuple(VALUES))
PACKED = Case("packed", 20, 8, heads=4, kv_heads=2, packed=True, soft_cap=5.0, causal=False)


@pytest.fixture(autouse=True)
def _few_cases(monkeypatch):
    monkeypatch.setattr(check_attention, "CASES", (TINY, PACKED))


def table(text):
    """Of each line the case, the values, who was asked, and the verdict."""
    lines = [line.split() for line in text.splitlines()[2:] if "bounds" not in line]
    return [(words[0], words[1], words[3], words[-1]) for words in lines if words[0] != "where"]


def test_what_is_right_passes_on_all_devices(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{jax.local_device_count()} x cpu, jax ")
    rows = table(out)
    assert len(rows) == 2 * len(VALUES) + 1
    assert {(by, verdict) for *_, by, verdict in rows} == {("chunked", "ok")}
    assert {values for _, values, *_ in rows} == set(VALUES)
    assert f"{len(rows)} of {len(rows)} within their bounds" in out


def sabotage(monkeypatch, spoil):
    """`chunked` with its output given to `spoil`."""

    def attention(*arrays, **options):
        out, range_nats = chunked.attention(*arrays, **options)
        return spoil(out), range_nats

    monkeypatch.setitem(interface.MODULES, "chunked", type("Module", (), {"attention": attention}))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: 1.05 * out,
        lambda out: out.at[1, 7, 0].multiply(-1),  # of one position and head
        lambda out: out.at[0, 0, 0, 0].set(jnp.nan),
        lambda out: out + jax.lax.stop_gradient(out) - out,  # no gradient
    ],
)
def test_what_is_wrong_ends_with_1(spoil, monkeypatch, capsys):
    sabotage(monkeypatch, spoil)
    assert main(["--only=tiny"]) == 1
    verdicts = {verdict for *_, verdict in table(capsys.readouterr().out)}
    assert verdicts == {"FAIL"}


def test_what_does_not_compile_ends_with_1_and_the_rest_is_told(monkeypatch, capsys):
    def refuse(out):
        if out.dtype == jnp.float32:
            raise NotImplementedError("no such operation\nand more")
        return out

    sabotage(monkeypatch, refuse)
    assert main(["--only=tiny"]) == 1
    out = capsys.readouterr().out
    assert out.count(" ok\n") == out.count("FAIL: no such operation\n") == len(VALUES)


def test_what_an_implementation_does_not_serve_is_no_failure():
    case = Case("float32", 20, 8, runs=((F32, "standard"),))
    (line, verdict), (_, other) = check_attention.check([case], "gpu")
    assert "not served: implementation='cudnn' serves" in line
    assert (verdict, other) == (None, True)


def test_an_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--only=tiny,size-129"])
    assert error.value.code == 2
    assert "no case 'size-129'; there are tiny, packed" in capsys.readouterr().err


@pytest.mark.parametrize("case", [TINY, PACKED], ids=lambda case: case.name)
@pytest.mark.parametrize("values", VALUES)
def test_its_oracle_is_the_formula_that_takes_any_value(case, values):
    """With outliers float64 has room for one maximum of a row."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in inputs(case, F32, values)]
        formula = functools.partial(
            reference.attention, **check_attention._options(case, "laser"), paper=False,
            segment_ids=check_attention.segments(case),
        )  # fmt: skip
        out, vjp = jax.vjp(formula, *arrays[:3])
        exact = [np.asarray(x) for x in (out, *vjp(arrays[3]))]
    for found, wanted in zip(expected(case, F32, "laser", values), exact, strict=True):
        assert np.linalg.norm(found - wanted) < 1e-11 * np.linalg.norm(wanted)


def test_the_paper_s_head_sizes_are_among_the_cases():
    assert {case.size for case in CASES} >= {128, 256, 512, 720}
    assert {case.size for case in CASES if not case.more} >= {128, 512}
    assert any(case.kv_heads < case.heads for case in CASES)
    assert any(case.packed for case in CASES)
    assert any(case.length % 128 for case in CASES)


@pytest.mark.slow
def test_the_kernels_are_interpreted_on_a_cpu():
    name, dtype, kind = check_attention.INTERPRETED
    short = next(case for case in CASES if case.name == name)
    lines = list(check_attention.check([short], "cpu"))
    kernels = [(line, verdict) for line, verdict in lines if " pallas " in line]
    assert len(kernels) == len(VALUES)
    assert all(verdict and dtype in line and kind in line for line, verdict in kernels)


# Of four chips that are only described: whether the program has kernels, and products of float32
# that are not made in one pass.
LOWER = """
import sys
sys.path.insert(0, ".")
import jax, numpy as np
from concurrent.futures import Future
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scripts import check_attention as check
chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(chips), ("data",), axis_types=(AxisType.Auto,))
check._mesh = lambda: (mesh, NamedSharding(mesh, PartitionSpec("data")))

class Pool:
    def submit(self, compile):
        text = Future()
        text.set_result(compile.__self__.as_text())
        return text

case = next(case for case in check.CASES if case.name == "short")
for by in ("pallas", "chunked"):
    text = check._compiled(check.Program(case, by, "float32", "standard"), Pool()).result()
    print(by, "tpu_custom_call" in text, "HIGHEST" in text)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_on_tpus_it_is_the_kernels_that_are_asked():
    result = subprocess.run(
        [sys.executable, "-c", LOWER], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **NO_DEVICE, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == ["pallas True False", "chunked False True"]
