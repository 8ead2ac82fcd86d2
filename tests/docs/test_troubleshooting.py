"""What docs/troubleshooting.md quotes is what the programs say."""

import re

import pytest

from laser.training import exits
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
FOLDERS = ("laser", "configs", "scripts", "data")


def sources() -> str:
    """Of all that speaks to a user, with strings that go over several lines put together."""
    paths = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]
    text = "\n".join(path.read_text() for path in [*paths, ROOT / "Makefile"])
    return re.sub(r'(?<=[^"])"\s*\n\s*f?"', "", text)


def quoted() -> list[str]:
    """The messages: what stands in backticks with words between blanks, and is no command."""
    cells = re.findall(r"`([^`\n]*)`", PAGE)
    return [cell for cell in cells if " " in cell and not re.match(r"python |make |apt-get ", cell)]


SOURCES = sources()


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_code(message):
    if message == "laser attention on tpu: chunked":
        message = "%s attention on %s: %s"
    pieces = [re.escape(piece.strip()) for piece in message.split("...")]
    assert re.search(".*".join(pieces), SOURCES), message


def test_the_exit_codes_are_those_of_the_pages():
    train = (ROOT / "docs/train.md").read_text()
    assert f"it has diverged, exit code {exits.DIVERGED}" in PAGE
    assert f"out of memory, exit code {exits.TOO_LARGE}" in PAGE
    codes = {value for name, value in vars(exits).items() if name.isupper()}
    section = train.partition("## How a run ends")[2].partition("\n## ")[0]
    assert codes <= {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
