"""Which Python serves: the Makefile and the pages say the same."""

import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

# Says that it is another version, and has no venv.
STAND_IN = """#!/bin/sh
[ "$1" = -c ] || exit 1
exec {python} -c "import sys; sys.version_info = (3, {minor}, 0); $2"
"""


@pytest.mark.parametrize(
    ("minor", "says"),
    [(10, "is needed"), (11, "Could not make .venv"), (13, "Could not make"), (14, "is needed")],
)
def test_make_takes_a_python_that_tensorflow_text_is_there_for(minor, says, tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, minor=minor))
    python.chmod(0o755)
    command = ["make", f"PYTHON={python}", ".venv/bin/python"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode
    assert says in result.stderr


def test_all_places_name_the_same_versions():
    for name in ("README.md", "docs/quickstart.md", "docs/tpus.md", "Makefile", "requirements.txt"):
        assert "Python 3.11 to 3.13" in (ROOT / name).read_text(), name
