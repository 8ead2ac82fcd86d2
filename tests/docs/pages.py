"""The pages as tests read them: links, headings, fenced blocks, and the changes in these."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, what else stands behind the fence, and its text."""

    page: Path
    line: int
    language: str
    note: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """In the order of the page."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        language, _, note = match[1].partition(" ")
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, language, note, match[2])


def prose(page: Path) -> str:
    """The page without its fenced blocks and code in backticks."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """Targets of links and images that are not on the web."""
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))
    return [target for target in targets if not target.startswith(("http:", "https:", "mailto:"))]


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def apply_change(root: Path, change: str) -> None:
    """Applies a block that begins with `--- FILE`. Its pieces, between lines of @@, are found by
    their text, which must be in the file exactly once."""
    first, _, body = change.partition("\n")
    file = root / first.removeprefix("--- ").strip()
    for piece in re.split(r"^@@.*\n", body, flags=re.MULTILINE):
        lines = [(line[:1] or " ", line[1:]) for line in piece.splitlines()]
        assert {mark for mark, _ in lines} <= {" ", "+", "-"}, piece
        old, new = (
            "".join(f"{text}\n" for mark, text in lines if mark in marks) for marks in (" -", " +")
        )
        content = file.read_text()
        count = content.count(old)
        assert count == 1, f"{file.name} has this {count} times, not once:\n{old}"
        file.write_text(content.replace(old, new))
