"""Compiler options: of the chip, in every program that trains, and only there."""

import dataclasses
import os
import shutil
import subprocess
import sys

import jax
import pytest
from absl import flags as absl_flags

from laser.planning.compile import compile_step
from laser.training import compiler, flags, loop
from laser.training.hardware import CHIPS
from laser.training.program import Program
from laser.training.rows import StoreRows
from laser.training.sharding import make_mesh
from scripts import benchmark_train
from tests.training import runs


@pytest.fixture
def config(arguments):
    own: absl_flags.FlagValues = absl_flags.FlagValues()
    return flags.parse(["train.py", *arguments], lambda values: own)[0]


@pytest.fixture
def unknown(monkeypatch):
    """An option of this machine's kind of device that its compiler does not have."""
    kind = jax.devices()[0].device_kind
    assert kind not in compiler.OPTIONS
    monkeypatch.setitem(compiler.OPTIONS, kind, {"xla_no_such_option": True})


def test_they_are_in_force_in_training_plans_and_benchmarks(config, unknown, tmp_path):
    run = loop.open_run(config, StoreRows(config), str(tmp_path / "run"), False)
    with run.train_batches(0) as batches:
        _, batch = next(iter(batches))
        for step, arguments in (
            (run.program.train_step, (run.program.abstract_state, batch)),
            (run.program.eval_step, (run.program.abstract_state.params, batch)),
        ):
            with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
                step.lower(*arguments).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compile_step(config, jax.devices())
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        benchmark_train.train_case(config)()


def test_they_can_be_switched_off(config, unknown):
    mesh = dataclasses.replace(config.mesh, compiler_options="none")
    program = Program(dataclasses.replace(config, mesh=mesh), make_mesh(config))
    program.train_step.lower(program.abstract_state, program.abstract_batch()).compile()


def test_they_are_of_known_chips_and_nothing_is_set_elsewhere():
    assert set(compiler.OPTIONS) <= set(CHIPS)
    assert compiler.options("TPU v5", "none") is None
    assert compiler.options("cpu", "chip") is None
    assert compiler.options("TPU v5", "chip") == compiler.V5P


def test_another_word_is_refused(arguments):
    with pytest.raises(ValueError, match=r"mesh.compiler_options"):
        flags.parse(
            ["train.py", *arguments, "--config.mesh.compiler_options=fast"],
            lambda values: absl_flags.FlagValues(),
        )


KEEP = """
import sys
from pathlib import Path
import jax
from laser.training import compiler
compiler.keep_programs(Path(sys.argv[1]), sys.argv[2])
jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8)))
"""


def test_programs_for_tpus_are_kept_in_the_runs_folder(tmp_path):
    def compile_for(backend, **variables):
        environment = {**os.environ, **variables}
        if not variables:
            del environment["JAX_COMPILATION_CACHE_DIR"]
        start = [sys.executable, "-c", KEEP, str(tmp_path / "run"), backend]
        subprocess.run(start, cwd=runs.ROOT, env=environment, check=True, timeout=120)

    kept = tmp_path / "run" / "compiled"
    compile_for("cpu")
    assert not kept.exists()
    compile_for("tpu")
    assert list(kept.iterdir())
    other = tmp_path / "of several runs"
    shutil.rmtree(kept)
    compile_for("tpu", JAX_COMPILATION_CACHE_DIR=str(other))
    assert list(other.iterdir())
    assert not kept.exists()
