"""No dead link in README and docs, and every page in the table of contents.

`make docs` is stricter, since Sphinx parses what it builds; this needs no generator.
"""

import re
import subprocess
import sys

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links, prose

DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT), f"{page.name}: {target} leads out of the repository"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}: no such heading"


def test_the_table_of_contents_has_every_page():
    listed = set(links(DOCS / "index.md"))
    pages = [p for kind in ("md", "rst", "ipynb") for p in DOCS.rglob(f"*.{kind}")]
    there = {str(page.relative_to(DOCS)) for page in pages} - {"index.md"}
    assert there == {target for target in listed if (DOCS / target) in pages}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_math_is_closed_and_stays_on_its_line(page):
    """GitHub and the site take $...$ within a line, and $$...$$ as a paragraph of its own; GitHub
    takes the backslash before a punctuation mark away."""
    for paragraph in prose(page).split("\n\n"):
        formulas = re.findall(r"\$\$(.*?)\$\$|\$(.*?)\$", paragraph, re.DOTALL)
        assert not re.search(r"\\[,;:!{}|_]", "".join(map("".join, formulas))), paragraph
        assert paragraph.count("$$") % 2 == 0, paragraph
        inline = re.sub(r"\$\$.*?\$\$", "", paragraph, flags=re.DOTALL)
        assert all(line.count("$") % 2 == 0 for line in inline.splitlines()), paragraph


def test_the_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.slow
def test_the_reference_needs_no_other_framework():
    """`make docs` has neither torch nor transformers nor equinox."""
    program = """
import importlib.util, runpy, sys
there = importlib.util.find_spec
frameworks = ("torch", "transformers", "equinox")
importlib.util.find_spec = lambda name, *rest: None if name in frameworks else there(name, *rest)
runpy.run_path("docs/conf.py")
import laser.torch, laser.dropins.equinox, laser.dropins.flax
import laser.dropins.maxtext, laser.dropins.transformers
assert laser.torch.Tensor.__module__ == "torch"
assert laser.dropins.equinox.MultiheadAttention.__doc__
assert all(type(sys.modules[name]).__name__ == "MagicMock" for name in frameworks)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_reference_names_modules_that_are_there():
    for page in DOCS.glob("api/*.rst"):
        for name in re.findall(r"automodule:: (\S+)", page.read_text()):
            path = ROOT / name.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name
