"""Every config file loads, and the arguments of configs/c4.py mean what the paper says."""

import collections
import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

from configs import base, bert, c4, finetune, vit
from configs.arguments import parse_arguments
from eval.tasks.text_to_text import PROMPTS
from laser.training.config import load_config, to_dict
from laser.training.flags import parse
from study.plan import Plan
from study.run import Folder, commands

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted(
    path
    for path in (ROOT / "configs").rglob("*.py")
    # slices.py and study.py are no configs, and finetune.py has the model of another run.
    if path.name not in ("__init__.py", "arguments.py", "slices.py", "study.py", "finetune.py")
)
SIZES = ("234m", "301m", "435m", "1p1b", "2p2b", "7p7b")
MODIFIERS = ("per_dim_temp", "qk_norm", "diff", "temp=0.5")
ATTENTIONS = [
    "+".join((kind, *modifiers))
    for kind in ("standard", "laser")
    for count in range(len(MODIFIERS) + 1)
    for modifiers in itertools.combinations(MODIFIERS, count)
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_loads(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    config = importlib.import_module(name).get_config()
    run = load_config(config)
    assert to_dict(run) == config.to_dict()


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("size", SIZES)
def test_every_combination_of_c4_loads(size, optimizer):
    for attention in ATTENTIONS:
        run = load_config(c4.get_config(f"size={size},attention={attention},optimizer={optimizer}"))
        chosen = run.model.attention
        assert run.optimizer.name == optimizer
        assert chosen.kind == attention.split("+")[0]
        assert chosen.per_dim_temp == ("per_dim_temp" in attention)
        assert chosen.qk_norm == ("qk_norm" in attention)
        assert chosen.diff == ("official" if "diff" in attention else "none")
        assert chosen.temperature == (0.5 if "temp=" in attention else 1.0)


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("234m", 234.1),
        ("301m", 301.2),
        ("435m", 435.4),
        ("1p1b", 1139),
        ("2p2b", 2213),
        ("7p7b", 7732),
    ],
)
def test_sizes_have_the_paper_s_number_of_parameters(size, millions):
    model = load_config(c4.get_config(f"size={size}")).model
    attention = 4 * model.model_dim * model.num_heads * model.head_dim
    layer = attention + 2 * model.model_dim * model.mlp_dim
    count = model.num_layers * layer + model.vocab_size * model.model_dim
    assert count / 1e6 == pytest.approx(millions, rel=5e-4)


def test_c4_keeps_the_checkpoints_that_table_10_averages():
    for size in SIZES:
        checkpoint = load_config(c4.get_config(f"size={size}")).checkpoint
        assert checkpoint.keep == 5
        assert checkpoint.every == (250 if size == "7p7b" else 1000)


@pytest.mark.parametrize(
    ("name", "arguments", "tokens"),
    [("c4", "", 167.8e9), ("studies.diff_2p2b", "", 24e9), ("studies.short_7p7b", "", 44e9)],
)
def test_tokens_of_the_runs(name, arguments, tokens):
    run = load_config(importlib.import_module(f"configs.{name}").get_config(arguments))
    assert run.training.steps * run.training.batch_size * run.data.seq_len == pytest.approx(
        tokens, rel=1e-3
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("quickstart", "standard"),
        ("studies.lamb_301m", "standard"),
        ("studies.float32_2p2b", "standard"),
        ("studies.short_7p7b", "standard"),
        ("studies.diff_2p2b", "standard+diff"),
    ],
)
def test_studies_take_the_attention(name, kind):
    run = load_config(importlib.import_module(f"configs.{name}").get_config(f"attention={kind}"))
    assert run.model.attention.kind == "standard"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("size=2p2", "unknown size '2p2': did you mean '2p2b'"),
        ("sise=2p2b", "unknown config argument 'sise': did you mean 'size'"),
        ("slise=v5e-64", "unknown config argument 'slise': did you mean 'slice'"),
        ("atention=laser", "unknown config argument 'atention': did you mean 'attention'"),
        ("size=300m", "unknown size '300m': did you mean '301m'"),
        ("attention=lazer", "unknown attention 'lazer': did you mean 'laser'"),
        ("attention=laser+qknorm", "modifier 'qknorm': did you mean 'qk_norm'"),
        ("attention=laser+temp=0", "number above 0"),
        ("attention=laser+temp=warm", "number above 0"),
        ("attention=laser+temp", "number above 0"),
        ("optimizer=adam", "unknown optimizer 'adam': did you mean 'adamw'"),
        ("size", "write size=VALUE"),
        ("size=301m,size=2p2b", "given twice"),
    ],
)
def test_mistakes_name_what_was_meant(arguments, message):
    with pytest.raises(ValueError) as error:
        c4.get_config(arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("module", [bert, vit], ids=["bert", "vit"])
def test_an_argument_of_other_configs_is_no_misspelt_one(module):
    with pytest.raises(ValueError) as error:
        module.get_config("slice=v5e-16")
    assert str(error.value) == "unknown config argument 'slice': Known: size, attention"


@pytest.mark.parametrize(
    ("name", "slice_name", "accumulation", "unroll"),
    [
        ("paper", "v5e-64", 1, True),
        ("diff_2p2b", "v5e-256", 1, True),
        ("float32_2p2b", "v5e-256", 2, True),  # what is kept for the backward pass doubles
        ("float32_2p2b", "v5p-512", 1, True),
        ("lamb_301m", "v5e-64", 1, True),
        ("short_7p7b", "v5e-256", 2, False),
    ],
)
def test_studies_take_the_layout_of_a_slice(name, slice_name, accumulation, unroll):
    module = importlib.import_module(f"configs.studies.{name}")
    run = load_config(module.get_config(f"slice={slice_name}"))
    found = (run.model.remat, run.training.accumulation, run.model.unroll)
    assert found == ("dots", accumulation, unroll)
    with pytest.raises(ValueError, match="no layout of size"):
        module.get_config("slice=v5e-4")


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("paper", {"v5e-64": 30}),  # the grid; the sizes wait for it
        ("diff_2p2b", {"v5e-256": 4}),
        ("float32_2p2b", {"v5e-256": 4}),
        ("lamb_301m", {"v5e-64": 8}),  # the rates; the two whole runs wait for them
        ("short_7p7b", {"v5e-256": 2}),
    ],
)
def test_the_commands_of_a_study_name_the_slice_of_each_run(name, slices, tmp_path):
    """Of which the loop in docs/studies.md makes the type that it asks for."""
    plan = Plan(f"configs/studies/{name}.py")
    lines = [line for line in commands(Folder(tmp_path, plan)) if not line.startswith("#")]
    assert collections.Counter(re.findall(r"slice=(v5e-\d+)", "\n".join(lines))) == slices
    for line in lines:
        assert re.findall(r"v5e-\d+", line)[:1] == re.findall(r"slice=(v5e-\d+)", line)
        flags = [flag for flag in shlex.split(line) if flag.startswith("--config")]
        config, _ = parse(["train.py", *flags], lambda values: None)
        assert config.model.remat == "dots"


def test_finetuning_names_its_tasks_and_leaves_the_model_to_init_from():
    config = finetune.get_config()
    assert config.data.tasks == "boolq,cb,copa,multirc,record,rte,wic,wsc"
    assert set(finetune.TASKS) == set(PROMPTS)
    assert finetune.get_config("task=copa+rte").data.tasks == "copa,rte"
    assert "model" not in config
    assert "attention" not in config
    for arguments, message in (
        ("task=copaa", "unknown task 'copaa': did you mean 'copa'"),
        ("task=copa+", "unknown task ''"),
    ):
        with pytest.raises(ValueError) as error:
            finetune.get_config(arguments)
        assert message in str(error.value)


def test_there_are_fewer_than_80_fields():
    config = base.get_config().to_dict()
    assert sum(len(x) if isinstance(x, dict) else 1 for x in config.values()) < 80


def test_arguments_override_the_defaults():
    assert parse_arguments("b=3", {"a": "1", "b": "2"}) == {"a": "1", "b": "3"}
