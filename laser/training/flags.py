"""Reads the command line of train.py and of the scripts that take a config.

    --config=configs/c4.py:size=2p2b --config.optimizer.learning_rate=1e-3 --workdir=runs/a

The config file is found and run here, so that what is wrong in it reads as one line in place of a
traceback; overrides are parsed by ml_collections, other flags by absl. Every mistake ends as one
message on stderr that names the nearest known word, with exit code 2, and before jax is imported.
"""

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags

from laser.training.config import RunConfig, load_config
from laser.training.console import HELP, exit_with
from laser.training.fields import flatten, nearest, nearest_field
from laser.training.run_folder import load_record

ROOT = Path(__file__).resolve().parents[2]  # configs/ lies here, also where this is installed
CONFIG_HELP = """\
  --config: file of a recipe, such as configs/c4.py:size=2p2b, with its arguments after the colon
  --config.SECTION.FIELD: one field of it; all are in configs/base.py"""
DefineFlags = Callable[[flags.FlagValues], None]
T = TypeVar("T")


def parse_or_exit(
    argv: Sequence[str], define_flags: DefineFlags, usage: str
) -> tuple[RunConfig, flags.FlagValues]:
    """`parse` for a program's first line: prints `usage` for --help, exits with 2 on a mistake."""
    if HELP & set(argv[1:]):
        print(usage.strip(), _define(define_flags).main_module_help(), CONFIG_HELP, sep="\n\n")
        sys.exit(0)
    try:
        return parse(argv, define_flags)
    except ValueError as error:
        exit_with(argv[0], str(error))


def parse(argv: Sequence[str], define_flags: DefineFlags) -> tuple[RunConfig, flags.FlagValues]:
    """Reads --config, its overrides, and the program's own flags. Raises ValueError.

    Args:
      argv: the program's name and its arguments.
      define_flags: defines the program's own flags on the `FlagValues` that it is given.

    Returns:
      The checked config, and the values of the other flags as attributes.
    """
    values = _define(define_flags)
    config_path, rest = _take_config(argv, [*values, "config"])
    config = read_config_file(config_path)
    _inherit(config, rest)
    _check_overrides(rest, config)
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(rest))
    try:
        positional = values(list(rest))[1:]
    except flags.UnrecognizedFlagError as error:
        raise ValueError(_unknown_flag(error.flagname, [*values])) from None
    except flags.IllegalFlagValueError as error:
        raise ValueError(_explain(str(error), config)) from None
    except flags.Error as error:
        raise ValueError(str(error)) from None
    if positional:
        raise ValueError(f"unexpected argument {positional[0]!r}: write --flag=value")
    return load_config(config), values


def read_config_file(path: str) -> ConfigDict:
    """Runs get_config() of `file.py` or `file.py:arguments`. Raises ValueError with one line."""
    file, colon, arguments = path.partition(":")
    return call_in_file(file, "get_config", [arguments] if colon else [], ConfigDict)


def call_in_file(file: str, name: str, arguments: Sequence[str], kind: type[T]) -> T:
    """What a function of a config file returns, a `kind`. Raises ValueError with one line."""
    if not Path(file).is_file() and (ROOT / file).is_file():
        file = str(ROOT / file)
    if not Path(file).is_file():
        known = [str(found) for found in sorted(Path("configs").rglob("*.py"))]
        raise ValueError(f"no config file {file!r}{nearest(file, known)}")
    try:
        module = _run(file)
        if not hasattr(module, name):
            raise ValueError(f"it has no {name}()")
        function = getattr(module, name)
        if arguments and not inspect.signature(function).parameters:
            raise ValueError(f"it takes no arguments, got {arguments[0]!r}")
        result = function(*arguments)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [str(frame.lineno) for frame in frames if frame.filename == file][-1:]
        where = ":".join([file, *line])
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(result, kind):
        returned = type(result).__name__
        raise ValueError(f"{file}: {name}() returned {returned}, not a {kind.__name__}")
    return result


def _run(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None or spec.loader is None:
        raise ValueError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _define(define_flags: DefineFlags) -> flags.FlagValues:
    values = flags.FlagValues()
    define_flags(values)
    return values


def _take_config(argv: Sequence[str], known: Iterable[str]) -> tuple[str, list[str]]:
    """Splits argv into the value of --config and all the rest."""
    places = [i for i, argument in enumerate(argv) if re.match(r"--?config(=|$)", argument)]
    if len(places) > 1:
        raise ValueError("--config is given twice")
    for i in places:
        if "=" in argv[i]:
            return argv[i].partition("=")[2], [*argv[:i], *argv[i + 1 :]]
        if i + 1 < len(argv):
            return argv[i + 1], [*argv[:i], *argv[i + 2 :]]
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name not in known and not name.startswith("config."):
            raise ValueError(_unknown_flag(name, known))
    raise ValueError("--config is missing: for example --config=configs/quickstart.py")


def _inherit(config: ConfigDict, argv: Sequence[str]) -> None:
    """Fills in what a config leaves to the run in its init_from, before other overrides: `model`,
    `attention` and data.seq_len. Raises ValueError where there is no such run."""
    start = config.get("init_from", "")
    for argument, following in zip(argv, [*argv[1:], ""]):
        match = re.match(r"--?config\.init_from(?:=(.*))?$", argument)
        if match:
            start = following if match[1] is None else match[1]
    absent = [name for name in ("model", "attention") if name not in config]
    if not start and absent:
        raise ValueError(
            f"--config.init_from=RUN is missing: the section {absent[0]} of this config is that of "
            "a trained run"
        )
    if start:
        try:
            inherited = load_record(start)["config"]
        except ValueError as error:
            raise ValueError(f"init_from={start}: {error}") from error
        for name in absent:
            config[name] = ConfigDict(inherited[name])
        if "seq_len" not in config.data:
            config.data.seq_len = inherited["data"]["seq_len"]


def _check_overrides(argv: Sequence[str], config: ConfigDict) -> None:
    """Every --config.section.field must be there in the config: absl would report a KeyError."""
    fields = flatten(config.to_dict())
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if match and isinstance(config.get(match[1]), ConfigDict):
            raise ValueError(
                f"--config.{match[1]} is a section: set --config.{match[1]}.FIELD=value"
            )
        if match and match[1] not in fields:
            raise ValueError(f"unknown field --config.{match[1]}{nearest_field(match[1], fields)}")


def _unknown_flag(name: str, known: Iterable[str]) -> str:
    return f"unknown flag --{name}{nearest(f'--{name}', [f'--{other}' for other in known])}"


def _explain(message: str, config: ConfigDict) -> str:
    """absl's words on a wrong value, with the expected type where it is a field of the config."""
    missing = re.search(r"Flag (--\S+) must have a value", message)
    if missing:
        return f"{missing[1]} is missing"
    override = re.match(r"flag --config\.([^=]+)=(.*?): ", message)
    if override:
        value: Any = config
        for part in override[1].split("."):
            value = value[part]
        return f"{override[1]}={override[2]!r}: expected {type(value).__name__}"
    return message
