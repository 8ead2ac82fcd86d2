"""Every command in README and docs: its files are there, its flags and config fields exist.

Flags are read from the scripts' source, so that nothing is imported or run; configs are run, which
needs no jax. Blocks of Python that are marked `run` are run.
"""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest

from laser.training.flags import parse, read_config_file
from tests.docs.pages import PAGES, ROOT, Block, blocks

SHELL = ("bash", "console")
COMMANDS = [b for page in PAGES for b in blocks(page) if b.language in SHELL]


def commands(block: Block) -> list[list[str]]:
    """The words of each command; of a console only what stands behind a prompt. Without files that
    are written out (<<'END'), comments and the shell's own words."""
    text = re.sub(r"<<'END'.*?^END$", "", block.text, flags=re.DOTALL | re.MULTILINE)
    text = text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@functools.cache
def flags_of(script: str) -> tuple[set[str], bool]:
    """Names of the flags that a script defines, and whether it takes a config."""
    source = (ROOT / script).read_text()
    if script.endswith(".sh"):
        return set(re.findall(r"--([\w-]+)", source)), False
    found, takes_config = {"help", "flagfile"}, False
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        if name == "add_argument" or name.startswith("DEFINE_"):
            first = ast.unparse(node.args[0]).strip("'\"")
            if name.startswith("DEFINE_") or first.startswith("-"):
                found.add(first.lstrip("-"))
        takes_config |= name == "parse_or_exit"
    return found, takes_config


def check(words: list[str]) -> None:
    """Raises AssertionError or ValueError for a command that can't be meant so."""
    if words[0].startswith("python") or words[0].endswith("/python"):
        words = words[1:]
    if not words or words[0] in ("-", "-m", "-c"):
        return
    script, *arguments = words
    if script == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), words
    elif script.endswith((".py", ".sh")):
        assert (ROOT / script).is_file(), script
        check_arguments(script, arguments)


def check_arguments(script: str, arguments: list[str]) -> None:
    known, takes_config = flags_of(script)
    if "--" in arguments:  # what stands behind is for train.py
        cut = arguments.index("--")
        check_arguments("train.py", [a for a in arguments[cut + 1 :] if a.startswith("--")])
        arguments = arguments[:cut]
    config = [a for a in arguments if re.match(r"--config[.=]", a)] if takes_config else []
    for argument in arguments:
        if argument.startswith("-") and argument not in config:
            name = argument.lstrip("-").partition("=")[0]
            assert {name, name.removeprefix("no")} & known, f"{script} has no flag --{name}"
        if argument.startswith("--flagfile="):
            lines = (ROOT / argument.partition("=")[2]).read_text().splitlines()
            check_arguments(script, [line for line in lines if line.startswith("--")])
    if config:
        check_config(config)


def check_config(arguments: list[str]) -> None:
    """--config and its overrides, as train.py would read them."""
    if re.search("=sigmoid|=lion", " ".join(arguments)):
        return  # tests/docs/test_extend.py runs them, where they exist
    chosen = [a for a in arguments if a.startswith("--config=")]  # else a variable has it
    if chosen and not any("init_from=" in argument for argument in arguments):
        parse(["train.py", *arguments], lambda values: None)
        return
    config = read_config_file((chosen or ["=configs/base.py"])[0].partition("=")[2])
    for argument in (a for a in arguments if a not in chosen):
        field = re.sub(r"^--config\.|=.*", "", argument).split(".")
        assert functools.reduce(lambda tree, name: tree[name], field, config) is not None


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.place)
def test_a_command_has_files_flags_and_fields_that_exist(block):
    for words in commands(block):
        try:
            check(words)
        except (AssertionError, ValueError, KeyError) as error:
            raise AssertionError(f"{block.place}: {' '.join(words)}\n{error}") from error


def test_the_commands_that_make_runs_exist():
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    lines = re.findall(r"^\t.*?\.venv/bin/(python \w\S*\.py [^$\n]*)$", text, re.MULTILINE)
    assert {"train.py", "scripts/study.py", "scripts/prepare_speech.py"} <= {
        line.split()[1] for line in lines
    }
    for line in lines:
        check(shlex.split(line))


@pytest.mark.parametrize(
    "command",
    [
        "python scripts/prepare_dat.py --source=bible",
        "python scripts/prepare_data.py --sauce=bible",
        "python train.py --config=configs/c4.py:size=301m --config.model.depth=3",
        "python train.py --config=configs/c4.py:size=302m",
        "python train.py --config=configs/c4.py --config.training.steps=many",
        "python train.py --config=configs/finetune.py --config.init_from=a --config.data.rows=3",
        "scripts/launch_tpu.sh run --named=a -- --config=configs/c4.py",
        "scripts/launch_tpu.sh run --name=a -- --config=configs/c4.py --config.mesh.rows=1",
        "make quickstrat",
    ],
)
def test_a_dead_one_is_found(command):
    with pytest.raises((AssertionError, ValueError, KeyError)):
        check(shlex.split(command))


def test_flags_named_in_text_are_some_script_s_flags():
    scripts = [str(p.relative_to(ROOT)) for p in (ROOT / "scripts").glob("*.[ps][yh]")]
    known = set.union(*(flags_of(script)[0] for script in [*scripts, "train.py"]))
    for page in PAGES:
        for name in re.findall(r"`--([a-z_]+)[=`]", page.read_text()):
            assert name in known | {"config"}, f"{page.name}: --{name}"


def test_fields_and_scripts_named_in_text_exist():
    tree = read_config_file("configs/base.py").to_dict()
    sections = "|".join(tree)
    for page in PAGES:
        text = page.read_text()
        for section, name in re.findall(rf"`(?:--config\.)?({sections})\.([a-z_0-9]+)[=`]", text):
            if not isinstance(tree[section], dict) or name == "py" or name == "json":
                continue
            assert name in tree[section], f"{page.name}: {section}.{name}"
        for path in re.findall(r"`((?:scripts|configs|tests|laser)/[\w/]+\.\w+)`", text):
            made = f"file={path}" in (ROOT / "docs/extend-attention.md").read_text()
            assert (ROOT / path).is_file() or made, f"{page.name}: {path}"


PYTHON = [b for page in PAGES for b in blocks(page) if (b.language, b.note) == ("python", "run")]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_runs(block):
    import jax.numpy as jnp

    arrays = {name: jnp.ones((1, 4, 2, 8)) for name in ("query", "key", "value")}
    exec(compile(block.text, block.place, "exec"), arrays)
    if "output =" in block.text:
        assert arrays["output"].shape == arrays["query"].shape
    elif "def get_config" in block.text:
        assert arrays["get_config"]("size=301m").training.steps == 20_000


def test_blocks_marked_run_are_in_pages_that_a_test_follows():
    marked = {b.page.name for b in COMMANDS if b.note == "run"}
    assert marked == {"extend.md", "extend-attention.md"}


def test_nothing_else_is_marked():
    for page in PAGES:
        for block in blocks(page):
            assert block.note in ("", "run") or block.note.startswith("file="), block.place
            assert isinstance(block.page, Path)
