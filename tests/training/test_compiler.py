"""Compiler options: of the chip, in every program that trains, and only there."""

import dataclasses

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
