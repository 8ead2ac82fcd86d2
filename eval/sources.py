"""Where a task's rows come from: files in their original formats, or TFDS.

Files are tried first; TensorFlow is imported only where a prepared dataset lies on the disk. A row
of a file that can't be used is an error that names file and line. In TFDS such rows (hidden labels,
above all) are left out and counted.
"""

import csv
import dataclasses
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eval.prompts import Example, Prompt, check
from eval.rows import Raw, Row

SPLITS = ("train", "validation", "test")
BAD_ROW = (ValueError, KeyError, IndexError, TypeError, AttributeError)


class MissingData(ValueError):
    """A split that is nowhere; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The data of one task.

    Attributes:
      rows: one record of any layout to the rows in it (eval/rows.py).
      files: split → patterns under the data folder, in the order of preference.
      tfds: name in TFDS.
      tfds_splits: our names of splits to those of TFDS, where they differ.
      how: what to download, for who has no data.
      make: in place of all that, makes the rows of the one split that there is.
    """

    rows: Callable[[Raw], list[Row]] = lambda raw: [dict(raw)]
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tfds: str = ""
    how: str = ""
    tfds_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    make: Callable[[], list[Row]] | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The examples of a split.

    Attributes:
      examples: in the order of the source.
      origin: file or TFDS name, for the report.
      unusable: rows that were left out.
    """

    examples: list[Example]
    origin: str
    unusable: int = 0


def load(source: Source, split: str, prompt: Prompt, data_dir: Path | None) -> Loaded:
    """A split's examples. Raises MissingData, or ValueError for a row that can't be used."""
    if source.make:
        return from_records(source, prompt, source.make(), "the embedded corpus")
    files = find_files(source, split, data_dir)
    if files:
        examples = []
        for place, raw in (pair for file in files for pair in read_file(file)):
            try:
                examples += _examples(source, prompt, raw)
            except BAD_ROW as error:
                raise ValueError(f"{place}: {_explained(error)}") from error
        if not examples:
            raise ValueError(f"{files[0]}: there is no example in it")
        return Loaded(examples, _origin(files))
    folder = find_tfds(source, data_dir)
    if folder is None:
        raise MissingData(f"no {split} split of {source.tfds}: {source.how}")
    return _load_tfds(source, split, prompt, folder)


def available_split(source: Source, wanted: str, data_dir: Path | None) -> str:
    """`wanted` if it is there, or else the nearest split that is. Raises MissingData."""
    if source.make or (find_tfds(source, data_dir) and not _any_file(source, data_dir)):
        return wanted
    for split in (wanted, "validation", "train"):
        if find_files(source, split, data_dir):
            return split
    where = f" in {data_dir}" if data_dir else "; no --data_dir was given"
    raise MissingData(f"no data of {source.tfds}{where}: {source.how}")


def find_files(source: Source, split: str, data_dir: Path | None) -> list[Path]:
    """The files of the first pattern that has any; RACE alone has several to a split."""
    for pattern in source.files.get(split, ()) if data_dir else ():
        assert data_dir is not None
        found = sorted(data_dir.glob(pattern), key=lambda path: (len(path.name), path.name))
        if len(found) > 1 and found[0].suffix != ".txt":
            names = ", ".join(map(str, found))
            raise ValueError(f"{names}: which one is the {split} split? Keep one of them there")
        if found:
            return found
    return []


def find_tfds(source: Source, data_dir: Path | None) -> Path | None:
    """The TFDS folder that has the dataset prepared: data_dir, TFDS_DATA_DIR or the default."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    for folder in (data_dir, Path(default).expanduser()):
        if folder and list((folder / source.tfds).glob("*/dataset_info.json")):
            return folder
    return None


def _any_file(source: Source, data_dir: Path | None) -> bool:
    return any(find_files(source, split, data_dir) for split in SPLITS)


def _examples(source: Source, prompt: Prompt, raw: Raw) -> list[Example]:
    examples = [example for row in source.rows(raw) for example in prompt(row)]
    for example in examples:
        check(example)
    return examples


def _explained(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _origin(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent}/ ({len(files)} files)"


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) for each record of a file. Raises ValueError that names the place."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            yield from ((f"{path}:{rows.line_num}", row) for row in rows)
    elif path.suffix == ".xml":
        yield from _schemas(path)
    elif path.suffix == ".txt":
        yield str(path), _parse(path.read_text(encoding="utf-8"), str(path))
    else:
        yield from _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """JSON objects, one a line, with PIQA's labels from the file beside it."""
    labels_file = path.with_name(f"{path.stem}-labels.lst")
    labels = labels_file.read_text().split() if labels_file.is_file() else None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            raw = _parse(line, place)
            if labels is not None:
                if number > len(labels):
                    raise ValueError(
                        f"{labels_file}: has {len(labels)} labels, and none for {place}"
                    )
                raw["label"] = _parse(labels[number - 1], f"{labels_file}:{number}", int)
            yield place, raw


def _parse(text: str | bytes, place: str, kind: type = dict) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{place}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _schemas(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first 273 schemas of Davis's collection, in the fields of the flattened layout."""
    try:
        schemas = ElementTree.parse(path).getroot().iter("schema")
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not valid XML: {error}") from error
    for number, schema in zip(range(1, 274), schemas):
        place = f"{path}, schema {number}"
        before, pronoun, after = (
            _text(schema, f"text/{tag}", place) for tag in ("txt1", "pron", "txt2")
        )
        start = len(before) + 1
        text = f"{before} {pronoun}{'' if len(after) == 1 else ' '}{after}"
        options = [" ".join((answer.text or "").split()) for answer in schema.iter("answer")]
        gold = "AB".find(_text(schema, "correctAnswer", place)[:1])
        yield (
            place,
            {
                "text": text,
                "pronoun": pronoun,
                "pronoun_loc": start,
                "options": options,
                "label": gold,
            },
        )


def _text(schema: ElementTree.Element, tag: str, place: str) -> str:
    found = schema.findtext(tag)
    if not found or not found.strip():
        raise ValueError(f"{place}: <{tag}> is missing or empty")
    return " ".join(found.split())


def _load_tfds(source: Source, split: str, prompt: Prompt, folder: Path) -> Loaded:
    import tensorflow_datasets as tfds  # TensorFlow with it: 4 seconds and a gigabyte

    name = source.tfds_splits.get(split, split)
    builder = tfds.builder(source.tfds, data_dir=folder)
    if name not in builder.info.splits:
        raise MissingData(f"no {split} split of {source.tfds} in {folder}: {source.how}")
    dataset = builder.as_dataset(split=name, shuffle_files=False)
    return from_records(source, prompt, map(plain, tfds.as_numpy(dataset)), f"{source.tfds} {name}")


def from_records(source: Source, prompt: Prompt, records: Iterable[Raw], origin: str) -> Loaded:
    """Examples of the records that can be used. Raises ValueError if there are none."""
    examples, unusable, reason = [], 0, "it is empty"
    for raw in records:
        try:
            examples += _examples(source, prompt, raw)
        except BAD_ROW as error:
            unusable, reason = unusable + 1, _explained(error)
    if not examples:
        raise ValueError(f"{origin}: no row of it can be used ({reason})")
    return Loaded(examples, origin, unusable)


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
