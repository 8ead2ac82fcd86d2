"""plan.py from the command line: exit codes, what it prints, and rows of the committed table."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import c4
from configs.slices import LAYOUTS
from laser.planning import search
from laser.planning.plan import TooLarge
from laser.planning.topologies import parse_topology
from laser.training.config import load_config
from scripts import plan as plan_script
from scripts import plan_table
from tests import forked
from tests.quick import QUICK_FOR_TPU

ROOT = Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu"
)
# As on a machine where libtpu is not installed.
WITHOUT_LIBTPU = """
import sys
import time
sys.path.insert(0, ".")
from laser.planning import topologies
topologies.has_libtpu = lambda: False
from scripts import plan
sys.exit(plan.main(["plan.py", *sys.argv[1:]]))
"""


def plan(*arguments, program=("scripts/plan.py",)):
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=ROOT, capture_output=True, text=True,
        check=False,
        env={
            **os.environ, **QUICK_FOR_TPU, "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0",
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/c4.py", "--topology=v5e:16x17"], "did you mean 'v5e:16x16'?"),
        (["--config=configs/c4.py:size=2p3b", "--topology=v5e:4x4"], "did you mean '2p2b'?"),
        (["--config=configs/c4.py"], "--topology is missing"),
        (["--config=configs/c4.py", "--topolgy=v5e:4x4"], "did you mean '--topology'?"),
        (
            ["--config=configs/c4.py", "--topology=v5e:4x4", "--config.mesh.tensor=3"],
            "mesh.tensor=3: must divide model.num_heads=8",
        ),
        (
            ["--config=configs/c4.py", "--topology=v5e:4x4", "--slices=2"],
            "mesh.data=1: must be a multiple of 2",
        ),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    result = plan(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_libtpu_it_says_what_it_cannot_tell(arguments):
    result = plan(*arguments, "--topology=v5e:2x4", program=("-c", WITHOUT_LIBTPU))
    assert result.returncode == 0, result.stderr
    assert "8 chips: whether it fits is not known (no libtpu)" in result.stdout
    assert "pip install libtpu" in result.stdout
    assert "micro-batch" in result.stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_a_refusal_comes_before_the_search_for_what_fits(as_json, monkeypatch, capsys):
    """Which takes minutes, and shows what it tries."""
    said = []

    def slow(*arguments):
        said.append(capsys.readouterr())
        arguments[-1]("does not fit: --config.mesh.data=1")
        return []

    monkeypatch.setattr(search, "search", slow)
    config, topology = load_config(c4.get_config("size=301m")), parse_topology("v5e:2x2")
    assert plan_script._refuse(config, topology, (), TooLarge(20.5, 15.75), as_json) == 1
    (before,), after = said, capsys.readouterr()
    assert "does not fit: a chip of v5e:2x2 has 15.75 GiB" in (
        before.err if as_json else before.out
    )
    assert "looking for a layout that fits" in before.err
    assert after.err == "does not fit: --config.mesh.data=1\n"
    assert (json.loads(after.out)["suggestion"] == []) if as_json else "more chips" in after.out


@pytest.mark.parametrize(("size", "says"), [("301m", True), ("7p7b", False)])
def test_before_it_compiles_every_layer_it_says_how_to_compile_one(size, says, monkeypatch, capsys):
    """The layers of the 7.7B are in a loop."""
    monkeypatch.setattr(plan_script.topologies, "has_libtpu", lambda: True)
    monkeypatch.setattr(plan_script.topologies, "prepare_environment", lambda topology: None)
    monkeypatch.setattr(plan_script, "_plan", lambda *_: 0)
    slice_name = "v5e-64" if says else "v5e-256"
    config = f"--config=configs/c4.py:size={size},slice={slice_name}"
    assert plan_script.main(["plan.py", config, f"--topology={slice_name}"]) == 0
    assert ("--config.model.unroll=False" in capsys.readouterr().err) == says


def assert_row_is_right(name):
    """A row of docs/plans.json, compiled again, with its layers in a loop: unrolled, they take the
    compiler minutes. Other versions of libtpu may differ a little; and the row was compiled with
    all optimizations, which pack temporaries tighter."""
    rows = json.loads((ROOT / "docs/plans.json").read_text())
    row = rows[name]
    renewed = plan_table.table.row(plan_table.make(name, "--config.model.unroll=False"))
    for key in ("mesh", "accumulation", "remat", "attention", "fits", "binding"):
        assert renewed[key] == row[key], key
    for key in ("kept_gib", "traffic_gib", "mfu", "hours"):
        assert renewed[key] == pytest.approx(row[key], rel=0.05), key
    # Of the 2.2B as a loop and unrolled: 7.63 and 8.11 at the peak, temporaries 7.54 and 9.47.
    smaller = 0.1 if row["unroll"] else 0.05
    assert renewed["peak_gib"] == pytest.approx(row["peak_gib"], rel=smaller)
    ratio = renewed["temporaries_gib"] / row["temporaries_gib"]
    assert (0.7 if row["unroll"] else 0.88) < ratio < 1.12
    assert renewed["fits"]
    assert renewed["all_reduce_gib"] < 0.02 * renewed["traffic_gib"]


@needs_libtpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    ["size=234m,attention=standard,slice=v5e-64", "size=2p2b,attention=laser,slice=v5e-256"],
)
def test_a_small_and_a_large_row_of_the_table(name, monkeypatch):
    for variable, value in {**QUICK_FOR_TPU, "XLA_FLAGS": ""}.items():
        monkeypatch.setenv(variable, value)
    assert_row_is_right(name)


def test_every_shipped_config_is_in_the_table_and_fits():
    rows = json.loads((ROOT / "docs/plans.json").read_text())
    assert list(rows) == plan_table.names()
    assert all(row["fits"] for row in rows.values())
    for (size, name), layout in LAYOUTS.items():
        assert rows[f"size={size},attention=laser,slice={name}"]["unroll"] == layout[-1], name
    table = plan_table.table
    for page, made in (("plans.md", table.render(rows)), (table.NOTES, table.render_older(rows))):
        text = (ROOT / "docs" / page).read_text()
        assert table.insert(text, made) == text, page


@needs_libtpu
@pytest.mark.timeout(900)
def test_too_large_a_run_is_refused_with_a_suggestion_that_fits():
    # Of short rows, as many tokens: the attention kernels of each try are compiled sooner.
    rows = ("--config.data.seq_len=256", "--config.training.batch_size=4096")
    what = ["--config=configs/c4.py:size=301m", "--topology=v5e:2x2", "--json", *rows]
    program = 'import runpy; runpy.run_path("scripts/plan.py", run_name="__main__")'
    result = forked.run_for_tpu(program, what)
    assert result.returncode == 1, result.stderr
    refused = json.loads(result.stdout)
    assert refused["fits"] is False
    assert refused["needed_gib"] > refused["capacity_gib"] == 15.75
    followed = forked.run_for_tpu(program, [*what, *refused["suggestion"]])
    assert followed.returncode == 0, followed.stdout
    assert json.loads(followed.stdout)["fits"]


# Two hours of C that Python cannot interrupt, as a compiler is.
BUSY = """
import hashlib, sys
sys.path.insert(0, ".")
from laser.training.console import end_on_ctrl_c, interruptible
end_on_ctrl_c("stopped", lambda: print("removed", flush=True))
print("begun", flush=True)
interruptible(hashlib.pbkdf2_hmac, "sha256", b"a", b"b", 2**31 - 1)
"""


def test_ctrl_c_does_not_wait_for_the_compiler():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (-signal.SIGINT, "removed\n", "\nstopped\n")
