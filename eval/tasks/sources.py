"""Where a task's rows come from: files in their original formats, or TFDS.

Files are tried first; TensorFlow is imported only where a prepared dataset lies on the disk. A row
that can't be used is an error that names file and line, or the row's number in TFDS. Only rows of
TFDS whose labels are hidden are left out and counted.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.tasks.files import read_file
from eval.tasks.prompts import Example, Prompt, check
from eval.tasks.rows import HiddenLabel, Raw, Row

STAND_INS = ("validation", "train")  # for a split that is not there, the nearest first
BAD_ROW = (ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError)
SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.parquet)")  # the hub's name of a part of a split


class MissingData(ValueError):
    """A split that is nowhere; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The data of one task.

    Attributes:
      rows: one record of any layout to the rows in it (rows.py).
      files: split → patterns under the data folder, in the order of preference; {a,b} is either.
      tfds: name in TFDS; empty if it is not there.
      where: address of the original data.
      get: what to do there, for who has no data.
      join: (place, record) pairs of files to those with what belongs together in one record.
      tfds_splits: our names of splits to those of TFDS, where they differ.
      make: in place of all that, makes the rows of the one split that there is.
    """

    rows: Callable[[Raw], list[Row]] = lambda raw: [dict(raw)]
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tfds: str = ""
    where: str = ""
    get: str = "download {} and unpack it in --data_dir"
    join: Callable[[Iterable[tuple[str, Raw]]], Iterable[tuple[str, Raw]]] = iter
    tfds_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    make: Callable[[], list[Row]] | None = None

    @property
    def how(self) -> str:
        """How to get the data."""
        other = f", or prepare {self.tfds} with tensorflow_datasets" if self.tfds else ""
        return self.get.format(self.where) + other


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The examples of a split.

    Attributes:
      examples: in the order of the source.
      origin: file or TFDS name, for the report.
      hidden: rows that were left out, as their labels are hidden.
      places: where each example came from, as error messages name it; empty if not known.
    """

    examples: list[Example]
    origin: str
    hidden: int = 0
    places: Sequence[str] = ()

    def place(self, index: int) -> str:
        """Where an example came from."""
        return self.places[index] if self.places else f"{self.origin}, example {index + 1}"


def load(source: Source, split: str, prompt: Prompt, data_dir: Path | None) -> Loaded:
    """A split's examples. Raises MissingData, or ValueError for a row that can't be used."""
    if source.make:
        return from_records(source, prompt, source.make(), "the embedded corpus")
    files = find_files(source, split, data_dir)
    if files:
        return _load_files(source, prompt, files)
    folder = find_tfds(source, data_dir)
    if folder is None:
        names = " or ".join(source.files.get(split, ()))
        what = f"{f' of {source.tfds}' if source.tfds else ''}{f' ({names})' if names else ''}"
        raise MissingData(f"no {split} split{what}: {source.how}")
    return _load_tfds(source, split, prompt, folder)


def _load_files(source: Source, prompt: Prompt, files: Sequence[Path]) -> Loaded:
    examples: list[Example] = []
    places: list[str] = []
    place = str(files[0])
    try:
        for place, raw in source.join(pair for file in files for pair in read_file(file)):
            try:
                examples += _examples(source, prompt, raw)
            except BAD_ROW as error:
                raise ValueError(f"{place}: {_explained(error)}") from error
            places += [place] * (len(examples) - len(places))
    except OSError as error:
        raise ValueError(f"{error.filename or place}: {error.strerror or error}") from error
    if not examples:
        raise ValueError(f"{files[0]}: there is no example in it")
    return Loaded(examples, _origin(files), places=places)


def available_split(
    source: Source, wanted: str, data_dir: Path | None, stand_ins: Sequence[str] = STAND_INS
) -> str:
    """`wanted` if it is there, or else the first of `stand_ins` that is. Raises MissingData."""
    if source.make:
        return wanted
    for split in (wanted, *stand_ins):
        if find_files(source, split, data_dir) or _is_in_tfds(source, split, data_dir):
            return split
    where = "; no --data_dir was given"
    if data_dir:
        names = source.files.get(wanted) or next(iter(source.files.values()))
        where = f" in {data_dir}, which has no {' or '.join(names)}"
    what = f"no data of {source.tfds}" if source.tfds else "no data"
    raise MissingData(f"{what}{where}: {source.how}")


def find_files(source: Source, split: str, data_dir: Path | None) -> list[Path]:
    """The files of the first pattern that has any: one, or RACE's articles, or numbered parts.

    Raises ValueError where it is not clear which file is the split, or a part is missing.
    """
    for pattern in _alternatives(source.files.get(split, ())) if data_dir else ():
        assert data_dir is not None
        found = sorted(data_dir.glob(pattern), key=lambda path: (len(path.name), path.name))
        if found and found[0].suffix != ".txt":
            _check_parts(found, split)
        if found:
            return found
    return []


def _alternatives(patterns: Iterable[str]) -> list[str]:
    """The patterns with {a,b} written out as two."""
    written = []
    for pattern in patterns:
        before, _, rest = pattern.partition("{")
        names, _, after = rest.partition("}")
        found = [f"{before}{name}{after}" for name in names.split(",")]
        written += _alternatives(found) if rest else [pattern]
    return written


def _check_parts(found: Sequence[Path], split: str) -> None:
    """Raises ValueError unless these are all parts of one split, in order."""
    parts = [part for path in found if (part := SHARD.fullmatch(path.name))]
    if len(parts) == len(found) and len({(part[1], part[3]) for part in parts}) == 1:
        if [int(part[2]) for part in parts] != list(range(int(parts[0][3]))):
            raise ValueError(
                f"{found[0].parent}: {len(found)} of {int(parts[0][3])} parts are there"
            )
    elif len(found) > 1:
        names = ", ".join(map(str, found))
        raise ValueError(f"{names}: which one is the {split} split? Keep one of them there")


def find_tfds(source: Source, data_dir: Path | None) -> Path | None:
    """The TFDS folder that has the dataset prepared: data_dir, TFDS_DATA_DIR or the default."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    for folder in (data_dir, Path(default).expanduser()):
        if folder and source.tfds and list((folder / source.tfds).glob("*/dataset_info.json")):
            return folder
    return None


def _is_in_tfds(source: Source, split: str, data_dir: Path | None) -> bool:
    """Whether the prepared dataset has it: its own record says so, read without TensorFlow."""
    folder, name = find_tfds(source, data_dir), source.tfds_splits.get(split, split)
    for path in (folder / source.tfds).glob("*/dataset_info.json") if folder else ():
        try:
            if name in [part["name"] for part in json.loads(path.read_text())["splits"]]:
                return True
        except BAD_ROW as error:
            raise ValueError(f"{path}: damaged ({error}); prepare {source.tfds} anew") from error
    return False


def _examples(source: Source, prompt: Prompt, raw: Raw) -> list[Example]:
    rows = source.rows(raw)
    for row in rows:
        _check_filled(row)
    examples = [example for row in rows for example in prompt(row)]
    for example in examples:
        check(example)
    return examples


def _check_filled(row: Row) -> None:
    """Raises ValueError for a null, which a prompt would show as the word None."""
    for name, value in row.items():
        if value is None or (isinstance(value, list) and None in value):
            raise ValueError(f"the field {name!r} is null")


def _explained(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _origin(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent}/ ({len(files)} files)"


def _load_tfds(source: Source, split: str, prompt: Prompt, folder: Path) -> Loaded:
    import tensorflow as tf  # 4 seconds and a gigabyte
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # or it takes all memory of those that jax computes on
    name = source.tfds_splits.get(split, split)
    builder = tfds.builder(source.tfds, data_dir=folder)
    if name not in builder.info.splits:
        raise MissingData(f"no {split} split of {source.tfds} in {folder}: {source.how}")
    dataset = builder.as_dataset(split=name, shuffle_files=False)
    return from_records(source, prompt, map(plain, tfds.as_numpy(dataset)), f"{source.tfds} {name}")


def from_records(source: Source, prompt: Prompt, records: Iterable[Raw], origin: str) -> Loaded:
    """Examples of the records whose labels are not hidden.

    Raises ValueError if there are none, or for a record that can't be used, which it names.
    """
    examples: list[Example] = []
    places: list[str] = []
    hidden, why = 0, "there is no example in it"
    for number, raw in enumerate(records, 1):
        place = f"{origin}, row {number}"
        try:
            examples += _examples(source, prompt, raw)
        except HiddenLabel as error:
            hidden, why = hidden + 1, str(error)
        except BAD_ROW as error:
            raise ValueError(f"{place}: {_explained(error)}") from error
        places += [place] * (len(examples) - len(places))
    if not examples:
        raise ValueError(f"{origin}: {why}")
    return Loaded(examples, origin, hidden, places)


def plain(value: Any) -> Any:
    """TFDS's bytes, arrays and numpy scalars as strings, lists and Python's numbers."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "to_list"):  # a ragged tensor
        return plain(value.to_list())
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
