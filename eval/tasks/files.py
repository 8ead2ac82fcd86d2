"""Records of a task's files: JSON lines, Parquet, CSV, Davis's XML, RACE's file per article.

Every reader gives (place, record), where the place is what an error message names: file and line.
Files are UTF-8, with or without a byte order mark, with either kind of line ends.
"""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMAS = 273  # of Davis's collection, which has grown since; the task is the first of them


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) for each record of a file. Raises ValueError that names the place."""
    readers = {".csv": _table, ".xml": _schemas, ".txt": _whole, ".parquet": _parquet}
    yield from readers.get(path.suffix, _lines)(path)


def _table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    rows = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        for row in rows:
            place = f"{path}:{rows.line_num}"
            if None in row or None in row.values():
                count = len(rows.fieldnames or ())
                raise ValueError(f"{place}: a row must have the header's {count} columns")
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: not valid CSV: {error}") from error


def _whole(path: Path) -> Iterator[tuple[str, Any]]:
    yield str(path), _parse(path.read_bytes(), str(path))


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path.open("rb")).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not valid Parquet: {error}") from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """JSON objects, one a line, with PIQA's labels from the file beside it."""
    labels_file = path.with_name(f"{path.stem}-labels.lst")
    labels = _text(labels_file).split() if labels_file.is_file() else None
    count = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            raw = _parse(line, place)
            count += 1
            if labels is not None:
                if count > len(labels):
                    raise ValueError(
                        f"{labels_file}: has {len(labels)} labels, and none for {place}"
                    )
                raw["label"] = _parse(labels[count - 1], f"{labels_file}:{count}", int)
            yield place, raw
    if labels is not None and count < len(labels):
        raise ValueError(f"{labels_file}: has {len(labels)} labels for the {count} rows of {path}")


def _text(path: Path) -> str:
    """The whole of a file, with its line ends: one behind an address has no other way to them."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error


def _parse(text: str | bytes, place: str, kind: type = dict) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{place}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _schemas(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Schemas of Davis's collection in the fields and with the text of the hub's winograd_wsc.

    There, what is before the pronoun, the pronoun and what is after it are joined by single
    spaces, also where only a period is left.
    """
    try:
        schemas = ElementTree.fromstring(path.read_bytes()).iter("schema")
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not valid XML: {error}") from error
    for number, schema in zip(range(1, SCHEMAS + 1), schemas):
        place = f"{path}, schema {number}"
        before, pronoun, after, answer = (
            " ".join(schema.findtext(tag, "").split())
            for tag in ("text/txt1", "text/pron", "text/txt2", "correctAnswer")
        )
        if not pronoun or not (before or after):
            raise ValueError(f"{place}: <{'txt1' if pronoun else 'pron'}> is missing or empty")
        options = [" ".join((option.text or "").split()) for option in schema.iter("answer")]
        letters = [letter for letter in answer if letter in "AB"]
        yield (
            place,
            {
                "text": " ".join((before, pronoun, after)).strip(),
                "pronoun": pronoun,
                "pronoun_loc": len(before) + 1 if before else 0,
                "options": options,
                "label": "AB".index(letters[0]) if len(set(letters)) == 1 else None,
            },
        )
