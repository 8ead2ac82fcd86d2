"""Reads what stands behind the colon of `--config=configs/c4.py:size=2p2b,attention=laser+qk_norm`.

Arguments choose between whole recipes (a size, an attention function); single fields are set with
`--config.section.field=value`. Whatever is not known is an error that names the nearest known word,
so that a misspelt argument never trains the wrong model for a day.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from ml_collections import ConfigDict

Value = TypeVar("Value")


def parse_arguments(text: str, defaults: Mapping[str, str]) -> dict[str, str]:
    """Splits `key=value,key=value`. Returns `defaults` with the given values in their place."""
    given: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if key not in defaults:
            raise ValueError(_unknown("config argument", key, defaults))
        if not equals or not value:
            raise ValueError(f"config argument {part!r}: write {key}=VALUE")
        if key in given:
            raise ValueError(f"config argument {key!r} is given twice: {given[key]} and {value}")
        given[key] = value
    return {**defaults, **given}


def choose(key: str, value: str, table: Mapping[str, Value]) -> Value:
    """Looks up the value of an argument in the table of its choices."""
    if value not in table:
        raise ValueError(_unknown(key, value, table))
    return table[value]


def set_attention(attention: ConfigDict, text: str) -> None:
    """Sets the section `attention` from KIND[+MODIFIER...].

    KIND is standard or laser; a modifier: per_dim_temp, qk_norm, diff, diff=scalar or temp=NUMBER.
    """
    kind, *modifiers = text.split("+")
    attention.kind = choose("attention", kind, {"standard": "standard", "laser": "laser"})
    switches = {
        "per_dim_temp": ("per_dim_temp", True),
        "qk_norm": ("qk_norm", True),
        "diff": ("diff", "official"),
        "diff=scalar": ("diff", "scalar"),
    }
    for modifier in modifiers:
        name, _, value = modifier.partition("=")
        if name == "temp":
            attention.temperature = _positive_number(modifier, value)
            continue
        if modifier not in switches:
            raise ValueError(_unknown("attention modifier", modifier, [*switches, "temp=NUMBER"]))
        field, setting = switches[modifier]
        attention[field] = setting


def _positive_number(modifier: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"attention modifier {modifier!r}: write temp= and a number above 0")
    return number


def _unknown(what: str, value: str, known: Iterable[str]) -> str:
    names = list(known)
    # One wrong letter in a word of four leaves 0.75; `slice`, where it is unknown, and `size` 0.67.
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.7)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {value!r}: {suggestion}Known: {', '.join(names)}"
