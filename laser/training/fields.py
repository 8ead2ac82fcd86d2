"""Names and values of a config's fields: known or not, of the right type or not, and told flat.

Nothing here knows which fields there are: that is config.py.
"""

import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from models.config import require

CLOSE = 0.75  # of difflib's ratio; at its own 0.6 `flash` would be taken for `laser`
OTHER_NAMES = {  # of fields, in other codebases
    "lr": "learning_rate", "wd": "weight_decay", "beta1": "b1", "beta2": "b2",
    "warmup": "warmup_steps", "bs": "batch_size", "batch": "batch_size",
    "gradient_accumulation_steps": "accumulation", "max_steps": "steps", "num_steps": "steps",
    "max_grad_norm": "clip_grad_norm", "grad_clip": "clip_grad_norm",
    "hidden_size": "model_dim", "d_model": "model_dim", "n_layers": "num_layers",
    "n_heads": "num_heads", "sequence_length": "seq_len", "context_length": "seq_len",
}  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` if something known is close to the name, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=CLOSE)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest_field(name: str, known: Iterable[str]) -> str:
    """The same for a whole name as `optimizer.lr`, or else the fields of its section.

    The field's own name counts before its section, which is easily taken for another one.
    """
    known = list(known)
    section, _, own = name.rpartition(".")
    leaves = [field.rpartition(".")[2] for field in known]
    close = difflib.get_close_matches(OTHER_NAMES.get(own, own), leaves, n=1, cutoff=CLOSE)
    if close:
        named = [field for field, leaf in zip(known, leaves) if leaf == close[0]]
        return f"; did you mean {difflib.get_close_matches(name, named, n=1, cutoff=0)[0]!r}?"
    prefix = f"{section}."
    fields = [field.removeprefix(prefix) for field in known if field.startswith(prefix)]
    if fields:
        return f"; {section} has {', '.join(fields)}"
    return "; known fields are in configs/base.py"


def check_names(what: str, prefix: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises ValueError if a name is unknown or missing.

    Args:
      what: word for what is named, for messages: "section" or "key".
      prefix: of the names, such as "data.".
    """
    known = list(known)
    for name, value in given.items():
        shown = "" if isinstance(value, Mapping) else f"={value!r}"
        hint = nearest(name, known) or f"; known: {', '.join(known)}"
        require(name in known, f"unknown {what} {prefix}{name}{shown}{hint}")
    for name in known:
        require(name in given, f"missing {what} {prefix}{name}: see configs/base.py")


def checked(key: str, value: Any, hint: Any) -> Any:
    """The value, a float for an int where one is wanted. Raises ValueError if its type is another.

    Args:
      key: the field's whole name.
      hint: int, float, bool, str or a Literal of strings.
    """
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        require(
            isinstance(value, str) and value in choices,
            f"{key}={value!r}: must be one of {', '.join(choices)}{nearest(str(value), choices)}",
        )
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    require(
        type(value) is hint,
        f"{key}={value!r}: expected {hint.__name__}, got {type(value).__name__}",
    )
    require(hint is not float or math.isfinite(value), f"{key}={value}: must be a finite number")
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their whole names, `optimizer.learning_rate`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def multiples(value: int, step: int) -> str:
    """The multiples of `step` next to `value`, as words."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{below + step}"
