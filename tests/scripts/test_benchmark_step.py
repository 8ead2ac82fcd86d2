"""benchmark_step.py times the step of train.py: the same program, without what surrounds it."""

import concurrent.futures
import math
import os
import re
import subprocess
import sys

import jax
import pytest
from absl import flags as absl_flags

from laser.training import exits, flags, hardware, hosts, loop, roofline, sharding
from laser.training.config import to_dict
from laser.training.hardware import Chip
from laser.training.program import Program
from laser.training.rows import StoreRows
from scripts import benchmark_step
from tests.quick import QUICK_TO_COMPILE
from tests.training import runs

MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=-1", "--config.training.accumulation=1"]


def parse(arguments):
    own: absl_flags.FlagValues = absl_flags.FlagValues()
    return flags.parse(["train.py", *arguments], lambda values: own)[0]


@pytest.fixture
def small(arguments, monkeypatch):
    """Flags of a small config without a store."""
    monkeypatch.setattr(benchmark_step, "tune_cpu", lambda dtype: None)  # for a whole process
    return [*(flag for flag in arguments if "data.store" not in flag), *MESH]


def test_it_is_the_program_that_train_py_runs(arguments, tmp_path):
    config = parse([*arguments, *MESH])
    run = loop.open_run(config, StoreRows(config), str(tmp_path / "run"), False)
    with run.train_batches(0) as batches:
        _, batch = next(iter(batches))
        trained = run.program.train_step.lower(run.program.init_state(), batch)
    program, lowered = benchmark_step.lower(config)
    assert lowered.as_text() == trained.as_text()
    assert "all_gather" in lowered.as_text()
    made = benchmark_step.made_up(program)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), batch
    )


def test_it_times_real_steps_of_a_new_model(small, tmp_path, capsys):
    command = ["benchmark_step.py", *small, "--steps=4", f"--profile={tmp_path / 'trace'}"]
    assert benchmark_step.main(command) == 0
    said = capsys.readouterr().out
    assert f"on {jax.device_count()} x cpu as data 2 x fsdp 4, jax {jax.__version__}" in said
    first, last = map(float, re.search(r"loss +(\S+) at .*, (\S+) at", said).groups())
    assert first == pytest.approx(math.log(parse(small).model.vocab_size), abs=0.5)
    assert last < first
    median, of, fastest, slowest = re.search(
        r"ms a step +([\d.,]+), median of (\d+); ([\d.,]+) to ([\d.,]+)", said
    ).groups()
    fastest, median, slowest = (float(x.replace(",", "")) for x in (fastest, median, slowest))
    assert 0 < fastest <= median <= slowest
    assert of == "4"
    assert re.search(
        r"tokens/s +[\d,]+\nMFU +[\d.]+%\npeak memory +[\d.]+ GiB of the process", said
    )
    assert len(list((tmp_path / "trace").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize(
    "config",
    [
        "configs/c4.py:size=2p2b", "configs/bert.py:size=2p2b", "configs/vit.py",
        "configs/conformer.py",
    ],
)  # fmt: skip
def test_every_kind_of_model_has_its_batch(config):
    more = ["--config.data.segment_ids=True"] if "c4" in config else []
    config = parse([f"--config={config}", "--config.training.batch_size=16", *more])
    program = Program(config, sharding.make_mesh(config))
    made, wanted = benchmark_step.made_up(program), program.abstract_batch()
    assert made.keys() == wanted.keys()
    for name, x in made.items():
        assert (x.shape, x.dtype) == (wanted[name].shape, wanted[name].dtype), name
        assert x.sharding == wanted[name].sharding


@pytest.mark.parametrize(
    "more, words",
    [
        (["--steps=0"], "flag --steps=0"),
        (["--workdir=runs/a"], "unknown flag --workdir"),
        (["--config.mesh.data=3"], "mesh.data=3"),
    ],
)
def test_mistakes_are_one_line(small, more, words, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark_step.main(["benchmark_step.py", *small, *more])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_chip_whose_peaks_are_known_has_a_bound(small, monkeypatch):
    """A step of 0.1 s, with a model whose products alone take half of that."""
    program, _ = benchmark_step.lower(parse(small))
    flops = roofline.model_flops(program.config) + roofline.recomputed_flops(
        program.config, "pallas"
    )
    chip = Chip("tiny", flops / program.mesh.size / 0.05)
    monkeypatch.setitem(hardware.CHIPS, jax.devices()[0].device_kind, chip)
    lines = benchmark_step.report(program, [6.0, 5.0], [0.1, 0.1, 0.2])
    assert "ms a step      100.0, median of 3; 100.0 to 200.0" in lines
    assert "of the bound   50%, which is 50.0 ms" in lines


def test_memory_that_does_not_suffice_is_one_line(small, monkeypatch, capsys):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20.1G of 15.7G hbm\nand pages")

    lower = benchmark_step.lower
    monkeypatch.setattr(benchmark_step, "lower", lambda config: (lower(config)[0], Lowered()))
    monkeypatch.setattr(hosts, "leave", sys.exit)
    with pytest.raises(SystemExit) as error:
        benchmark_step.main(["benchmark_step.py", *small])
    assert error.value.code == exits.TOO_LARGE
    said = capsys.readouterr().out
    assert "out of memory: RESOURCE_EXHAUSTED: 20.1G of 15.7G hbm\n" in said
    assert "pages" not in said


def test_rows_of_tasks_are_refused(small, monkeypatch, capsys):
    record = {"config": to_dict(parse(small))}
    monkeypatch.setattr(flags, "load_record", lambda path: record)
    config = ["--config=configs/finetune.py:task=rte", "--config.init_from=runs/a"]
    with pytest.raises(SystemExit) as error:
        benchmark_step.main(["benchmark_step.py", *config])
    assert error.value.code == 2
    assert "data.tasks=rte: rows of tasks are as long as" in capsys.readouterr().err


def on_two_hosts(*commands):
    """The finished processes, with four devices each."""
    address = f"localhost:{runs.free_port()}"

    def start(index):
        return subprocess.run(
            [sys.executable, "scripts/benchmark_step.py", *commands[index]],
            env={
                **os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICK_TO_COMPILE}",
            },
            cwd=runs.ROOT, capture_output=True, text=True, timeout=800, check=False,
        )  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(start, range(2)))


def test_several_hosts_are_one_run(small):
    first, second = on_two_hosts(*2 * [[*small, "--steps=2"]])
    assert [first.returncode, second.returncode] == [0, 0], first.stderr + second.stderr
    assert "on 8 x cpu as data 2 x fsdp 4" in first.stdout
    assert "ms a step" in first.stdout
    assert "ms a step" not in second.stdout


def test_hosts_of_other_commands_are_named(small):
    first, second = on_two_hosts([*small, "--steps=2"], [*small, "--steps=3"])
    assert [first.returncode, second.returncode] == [2, 2], first.stderr + second.stderr
    assert re.search(r"host 1 \(.*\) has another config or other flags than host 0", first.stderr)
