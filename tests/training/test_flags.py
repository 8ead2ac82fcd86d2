"""The command line of train.py: a mistake is one line with a suggestion, before jax is imported."""

import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from configs import quickstart
from data.sealed import file_sha256, seal
from laser.training.flags import parse, read_config_file
from laser.training.run_folder import write_run

ROOT = Path(__file__).resolve().parent.parent.parent
C4 = "--config=configs/c4.py"
WORKDIR = "--workdir=/nowhere"
# Runs train.py as `python train.py` does, then says on stdout whether jax was imported.
PROGRAM = """
import runpy, sys
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    print("jax" if "jax" in sys.modules else "no jax")
"""


def _define_flags(values):
    flags.DEFINE_string("workdir", None, "folder", flag_values=values, required=True)
    flags.DEFINE_bool("dry", False, "do nothing", flag_values=values)


def _parse(monkeypatch, *arguments):
    monkeypatch.chdir(ROOT)
    return parse(["program.py", *arguments], _define_flags)


def test_config_overrides_and_flags(monkeypatch):
    config, values = _parse(
        monkeypatch,
        "--config=configs/c4.py:size=2p2b,attention=laser+per_dim_temp",
        "--config.optimizer.learning_rate=3e-3",
        "--config.model.unroll",
        "--noconfig.data.segment_ids",
        "--config.training.steps",
        "5000",
        WORKDIR,
        "--dry",
    )
    assert config.model.head_dim == 512
    assert config.model.attention.per_dim_temp
    assert config.optimizer.learning_rate == 3e-3
    assert config.model.unroll
    assert not config.data.segment_ids
    assert config.training.steps == 5000
    assert values.workdir == "/nowhere"
    assert values.dry


def test_configs_are_found_where_the_package_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = read_config_file("configs/quickstart.py:attention=laser")
    assert config.attention.kind == "laser"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").write_text(
        "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'own': 1})"
    )
    assert read_config_file("configs/quickstart.py").own == 1


def test_the_config_file_may_come_anywhere_and_apart(monkeypatch):
    config, _ = _parse(
        monkeypatch, "--config.training.steps=5000", WORKDIR, "--config", "configs/c4.py"
    )
    assert config.training.steps == 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config is missing"),
        (["--confg=configs/c4.py"], "unknown flag --confg; did you mean '--config'?"),
        ([C4, C4, WORKDIR], "--config is given twice"),
        ([C4], "--workdir is missing"),
        ([C4, WORKDIR, "--workdirr=x"], "unknown flag --workdirr; did you mean '--workdir'?"),
        ([C4, WORKDIR, "x"], "unexpected argument 'x'"),
        ([C4, WORKDIR, "--dry=maybe"], "--dry=maybe"),
        (["--config=configs/c5.py", WORKDIR], "no config file 'configs/c5.py'; did you mean"),
        (["--config=configs/base.py:x", WORKDIR], "takes no arguments, got 'x'"),
        ([C4 + ":sise=2p2b", WORKDIR], "'sise': did you mean 'size'?"),
        (
            [C4, WORKDIR, "--config.optimizer.lerning_rate=1"],
            "--config.optimizer.lerning_rate; did you mean 'optimizer.learning_rate'?",
        ),
        ([C4, WORKDIR, "--config.optimizer.lr=1"], "; did you mean 'optimizer.learning_rate'?"),
        ([C4, WORKDIR, "--config.lr=1"], "; did you mean 'optimizer.learning_rate'?"),
        (
            [C4, WORKDIR, "--config.training.warmup_steps=1"],
            "; did you mean 'optimizer.warmup_steps'?",
        ),
        (
            [C4, WORKDIR, "--config.model.dropout=0.1"],
            "unknown field --config.model.dropout; model has dtype, head_dim, ",
        ),
        ([C4, WORKDIR, "--config.checkpoint.evry=9"], "; did you mean 'checkpoint.every'?"),
        ([C4, WORKDIR, "--config.foo.bar=1"], "bar; known fields are in configs/base.py"),
        ([C4, WORKDIR, "--config.model=3"], "--config.model is a section"),
        ([C4, WORKDIR, "--config.training.steps=1e5"], "training.steps='1e5': expected int"),
        ([C4, WORKDIR, "--config.attention.kind=lasr"], "did you mean 'laser'?"),
        ([C4, WORKDIR, "--config.training.batch_size=0"], "training.batch_size=0"),
        ([C4, WORKDIR, "--config.training.steps"], "--config.training.steps"),
    ],
)
def test_mistakes(monkeypatch, arguments, words):
    with pytest.raises(ValueError) as error:
        _parse(monkeypatch, *arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


FINETUNE = "--config=configs/finetune.py:task=rte"


@pytest.fixture
def start(tmp_path):
    """A run's folder as far as it is read: a quickstart model with rotary positions."""
    config = quickstart.get_config()
    config.model.positions = "rotary"
    (tmp_path / "tokenizer.model").write_bytes(b"a tokenizer")
    record = {"config": config.to_dict(), "data": {"fingerprint": ""}}
    write_run(
        tmp_path,
        seal(record | {"tokenizer": file_sha256(tmp_path / "tokenizer.model")}),
        tmp_path / "tokenizer.model",
    )
    return f"--config.init_from={tmp_path}"


def test_the_model_is_that_of_the_run_to_start_from(monkeypatch, start):
    config, _ = _parse(monkeypatch, FINETUNE, WORKDIR, start, "--config.model.dtype=bfloat16")
    assert (config.model.num_layers, config.model.positions) == (4, "rotary")
    assert config.model.dtype == "bfloat16"  # the command line has the last word
    assert config.data.seq_len == 256
    assert config.init_from == start.partition("=")[2]
    apart = start.split("=")
    assert _parse(monkeypatch, FINETUNE, *apart, WORKDIR)[0].model.positions == "rotary"
    whole, _ = _parse(monkeypatch, C4, WORKDIR, start)  # a config with a model keeps its own
    assert whole.model.positions == "sinusoidal"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([FINETUNE, WORKDIR], "--config.init_from=RUN is missing"),
        (
            [FINETUNE, WORKDIR, "--config.init_from=/nowhere"],
            "init_from=/nowhere: /nowhere: no run here",
        ),
    ],
)
def test_a_run_to_start_from_must_be_there(monkeypatch, arguments, words):
    with pytest.raises(ValueError) as error:
        _parse(monkeypatch, *arguments)
    assert words in str(error.value)


def test_an_error_in_a_config_file_has_its_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return undefined\n")
    with pytest.raises(ValueError, match=r"mine\.py:2: NameError: .*undefined"):
        read_config_file(str(path))
    path.write_text("def get_config():\n    return {}\n")
    with pytest.raises(ValueError, match="returned dict, not a ConfigDict"):
        read_config_file(str(path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([C4, WORKDIR, "--workdirr=x"], "did you mean '--workdir'?"),
        ([C4 + ":size=2p2", WORKDIR], "did you mean '2p2b'?"),
        ([C4, WORKDIR, "--config.modle.num_layers=3"], "did you mean 'model.num_layers'?"),
    ],
)
def test_train_exits_with_2_and_one_line_before_jax(arguments, words):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == "no jax\n"


def test_help_shows_the_flags(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C stays pytest's
    with pytest.raises(SystemExit) as left:
        runpy.run_path("train.py", run_name="__main__")
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for words in ("--config=configs/c4.py", "  --workdir: ", "  --config: ", "configs/base.py"):
        assert words in shown
