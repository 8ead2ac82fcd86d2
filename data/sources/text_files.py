"""Documents out of a folder of text files, with errors that name the file and the place.

    .txt                                             one document
    .jsonl .jsonl.gz .json.gz .jsonl.zst .json.zst   one document a line (C4 comes as .json.gz)
    .parquet                                         one document a row

Files are found in subfolders, too. Those with the word "validation" in their name or in a folder's
(validation/a.txt, c4-validation.00000-of-00008.json.gz) are the validation split. Where there are
none, a hash of each document's text decides, so that copies of a document fall on the same side.
Small files share a part, and a large .jsonl is cut into several, so that all cores have work.
"""

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.sources.file_formats import LINES_ENDINGS, lines, parquet_column
from data.sources.parts import SPLITS, Broken, Document, Part, look_at_files, number_parts

log = logging.getLogger(__name__)

ENDINGS = (".txt", *LINES_ENDINGS, ".parquet")
DEFAULT_FRACTION = 0.05
# A part has about this share of the folder, and at least so many bytes: it takes in the next file
# while it has fewer, and a .jsonl with more is cut. Files as C4's are a part each.
PART_SHARE, MIN_PART = 2048, 2**22


class Slice(NamedTuple):
    """Lines of a file that begin in [start, stop)."""

    file: Path
    start: int
    stop: int


class TextFolder:
    """A folder of text files, its files sorted by name.

    Attributes:
      parts: runs of slices of files; sizes in bytes.
    """

    def __init__(
        self,
        folder: str | Path,
        text_field: str = "text",
        validation_fraction: float | None = None,
    ):
        """Lists the files; reads none.

        Args:
          folder: searched with all its subfolders.
          text_field: of the objects in files of lines, or the column of Parquet files.
          validation_fraction: of the documents, where no files are named validation; default 0.05.

        Raises:
          ValueError: no folder, no files in it, or the fraction is of no use.
        """
        self._folder = Path(folder)
        self._text_field = text_field
        found = _find(self._folder)
        named = [file for file in found if self._is_validation(file)]
        if named and validation_fraction is not None:
            raise ValueError(
                f"validation_fraction={validation_fraction}: {folder} has files named validation, "
                f"as {named[0].name}; leave the fraction out, or move them away"
            )
        self._fraction = DEFAULT_FRACTION if validation_fraction is None else validation_fraction
        if not 0 < self._fraction < 1:
            raise ValueError(f"validation_fraction={self._fraction}: must be between 0 and 1")
        self._files = found
        self._by_hash = not named
        held_out = set(named)
        train = [file for file in found if file not in held_out]
        groups = [(SPLITS, found)] if self._by_hash else [(SPLITS[:1], train), (SPLITS[1:], named)]
        part_bytes = max(MIN_PART, sum(file.stat().st_size for file in found) // PART_SHARE)
        self.parts = number_parts(
            (splits, sum(s.stop - s.start for s in part), part)
            for splits, files in groups
            for part in _cut(files, part_bytes)
        )

    def description(self) -> dict[str, Any]:
        """What tells this folder from another one, wherever it lies: names and sizes of files."""
        listing = [
            [file.relative_to(self._folder).as_posix(), file.stat().st_size] for file in self._files
        ]
        return {
            "kind": "text files",
            "files": len(listing),
            "file_bytes": sum(size for _, size in listing),
            "listing_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
            "text_field": self._text_field,
            "validation": self._fraction if self._by_hash else "files of that name",
        }

    def files(self) -> dict[str, str]:
        """All files, by their names within the folder."""
        names = [file.relative_to(self._folder).as_posix() for file in self._files]
        return dict(zip(names, look_at_files(self._files)))

    def read(self, part: Part) -> Iterator[Document | Broken]:
        """Records of a part, in order; blank lines are no records.

        Raises:
          ValueError: a file is damaged.
        """
        before = 0
        for piece in part.content:
            for text, read in self._read(piece):
                if isinstance(text, Broken):
                    yield text
                else:
                    yield Document(part.split_of(text, self._fraction), text, before + read)
            before += piece.stop - piece.start

    def _is_validation(self, file: Path) -> bool:
        words = re.split(r"[^a-z]+", file.relative_to(self._folder).as_posix().lower())
        return "validation" in words

    def _read(self, piece: Slice) -> Iterator[tuple[str | Broken, int]]:
        file = piece.file
        if file.name.endswith(".txt"):
            yield _decode(file.read_bytes(), f"{file}", 0), piece.stop
        elif file.name.endswith(".parquet"):
            for row, (content, read) in enumerate(parquet_column(file, self._text_field)):
                if content is None:
                    message = f"{file}, row {row}: no text in the column {self._text_field!r}"
                    yield Broken("no text", message), read
                else:
                    yield _decode(content, f"{file}, row {row}", 0), read
        else:
            yield from self._read_lines(piece)

    def _read_lines(self, piece: Slice) -> Iterator[tuple[str | Broken, int]]:
        offset = piece.start
        for number, (line, read) in enumerate(lines(*piece), start=1):
            if line.strip():
                place = f"{piece.file}:{number}"
                if piece.start:  # how many lines come before is not known
                    place = f"{piece.file}, the line at byte {offset}"
                text = _decode(line, f"{piece.file}", offset)
                yield text if isinstance(text, Broken) else self._text(text, place), read
            offset += len(line)

    def _text(self, line: str, place: str) -> str | Broken:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Broken("not JSON", f"{place}: not valid JSON: {error}")
        text = record.get(self._text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            return Broken(
                "no text",
                f"{place}: no text in the field {self._text_field!r}, only {has}; "
                "say which field it is by text_field",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return Broken("not Unicode", f"{place}: {self._text_field!r} is not Unicode: {error}")
        return text


def _find(folder: Path) -> list[Path]:
    if folder.is_file():
        raise ValueError(f"source={folder}: is a file; give the folder that it is in")
    if not folder.is_dir():
        raise ValueError(f"source={folder}: no such folder, and no other source of that name")
    files = sorted(_walk(folder))
    found = [file for file in files if file.name.endswith(ENDINGS)]
    for file in found:
        if not file.is_file():
            raise ValueError(
                f"source={folder}: {file.relative_to(folder)} is {_kind(file)} and no regular "
                "file; move it away"
            )
    if not found:
        raise ValueError(f"source={folder}: no files that end in {', '.join(ENDINGS)}")
    if len(found) < len(files):
        first = next(file for file in files if not file.name.endswith(ENDINGS))
        log.info(
            "%s: %d files of other kinds are not read, as %s",
            folder,
            len(files) - len(found),
            first.relative_to(folder),
        )
    return found


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # or the texts in it would be left out without a word
        raise ValueError(f"source={folder}: {error.filename} can't be listed ({error.strerror})")

    seen = set()
    for parent, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            raise ValueError(
                f"source={folder}: {parent} is a folder that is read already, by a link"
            )
        seen.add(real)
        yield from (Path(parent, name) for name in names)


def _kind(file: Path) -> str:
    if not file.exists():
        return "a link to nothing"
    kinds = {"a fifo": file.is_fifo(), "a socket": file.is_socket()}
    return next((kind for kind, is_it in kinds.items() if is_it), "a device")


def _cut(files: list[Path], part_bytes: int) -> Iterator[tuple[Slice, ...]]:
    """Slices of all files in their order, as the parts that they make up."""
    part: list[Slice] = []
    filled = 0
    for file in files:
        size = file.stat().st_size
        pieces = max(1, round(size / part_bytes)) if file.name.endswith(".jsonl") else 1
        cuts = [size * i // pieces for i in range(pieces + 1)]
        for start, stop in itertools.pairwise(cuts):
            part.append(Slice(file, start, stop))
            filled += stop - start
            if filled >= part_bytes:
                yield tuple(part)
                part, filled = [], 0
    if part:
        yield tuple(part)


def _decode(content: bytes, place: str, offset: int) -> str | Broken:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Broken(
            "not UTF-8",
            f"{place}: not UTF-8 at byte {offset + error.start} (0x{content[error.start]:02X}); "
            "convert the file, for example with iconv",
        )
