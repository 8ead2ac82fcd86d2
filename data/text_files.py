"""Documents out of a folder of text files, with errors that name the file and the place.

    .txt                              one document
    .jsonl .jsonl.gz .json.gz         one document a line, in a field (C4 comes as .json.gz)

Files are found in subfolders, too. Those with the word "validation" in their name or in a folder's
(validation/a.txt, c4-validation.00000-of-00008.json.gz) are the validation split. Where there are
none, a hash of each document's text decides, so that copies of a document fall on the same side.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LINES_ENDINGS = (".jsonl", ".jsonl.gz", ".json.gz")
ENDINGS = (".txt", *LINES_ENDINGS)
DEFAULT_FRACTION = 0.05
SPLITS = ("train", "validation")


class TextFolder:
    """A folder of text files, its files sorted by name.

    Attributes:
      files: split → the files that may have documents of it.
    """

    def __init__(
        self, folder: str | Path, text_field: str = "text", validation_fraction: float | None = None
    ):
        """Lists the files; reads none.

        Args:
          folder: searched with all its subfolders.
          text_field: of the objects in files of lines.
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
        self._by_hash = not named
        held_out = set(named)
        train = [file for file in found if file not in held_out]
        self.files = {"train": train, "validation": named or found}

    def description(self) -> dict[str, Any]:
        """What tells this folder from another one, wherever it lies: names and sizes of files."""
        files = sorted({file for files in self.files.values() for file in files})
        listing = [
            [file.relative_to(self._folder).as_posix(), file.stat().st_size] for file in files
        ]
        return {
            "kind": "text files",
            "files": len(files),
            "file_bytes": sum(size for _, size in listing),
            "listing_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
            "text_field": self._text_field,
            "validation": self._fraction if self._by_hash else "files of that name",
        }

    def documents(self, split: str, files: Iterable[str | Path] | None = None) -> Iterator[str]:
        """Documents of a split, in order; those without any text are left out.

        Args:
          split: "train" or "validation".
          files: only from these.

        Raises:
          ValueError: a file is not UTF-8, or a line is no JSON object with the text field.
        """
        for file in self.files[split] if files is None else map(Path, files):
            for text in self._read(file):
                if text and (not self._by_hash or self._split_of(text) == split):
                    yield text

    def _is_validation(self, file: Path) -> bool:
        words = re.split(r"[^a-z]+", file.relative_to(self._folder).as_posix().lower())
        return "validation" in words

    def _split_of(self, text: str) -> str:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return SPLITS[int.from_bytes(digest) < self._fraction * 2**64]

    def _read(self, file: Path) -> Iterator[str]:
        if not file.name.endswith(LINES_ENDINGS):
            yield _decode(file.read_bytes(), file, 0)
            return
        offset = 0
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield self._document(_decode(line, file, offset), f"{file}:{number}")
            offset += len(line)

    def _document(self, line: str, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: not valid JSON: {error}") from error
        text = record.get(self._text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{place}: no text in the field {self._text_field!r}, only {has}; "
                "say which field it is by text_field"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: {self._text_field!r} is not Unicode: {error}") from error
        return text


def _find(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"source={folder}: no such folder, and no task of that name")
    found = sorted(file for file in folder.rglob("*") if file.name.endswith(ENDINGS))
    if not found:
        raise ValueError(f"source={folder}: no files that end in {', '.join(ENDINGS)}")
    return found


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as lines:
            yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: damaged or cut off gzip file: {error}") from error


def _decode(content: bytes, file: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8 at byte {offset + error.start} (0x{content[error.start]:02X}); "
            "convert the file, for example with iconv"
        ) from error
