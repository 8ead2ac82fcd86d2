"""How Sphinx makes a site of these pages: `make docs` writes it to site/html.

The pages are Markdown that reads as well on GitHub. docs/index.md is the one table of contents: its
headings and lists of links become the site's navigation. A dead link, also to a file of the
repository, or a docstring that does not parse is an error there.
"""

import importlib.util
import re
import sys
import textwrap
from pathlib import Path
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "LASER attention"
html_title = project
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
exclude_patterns = ["results"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # a test runs the notebooks; pages show what was committed

default_role = "code"  # single backticks, as the docstrings have them
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
napoleon_use_rtype = False
napoleon_use_ivar = True  # else an attribute with a default is there twice


def _stand_ins():
    """For what laser.torch and laser.dropins import, where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        named = {name: type(name, (), {"__module__": "torch"}) for name in ("Tensor", "dtype")}
        module = type("Module", (), {"__module__": "torch.nn"})
        torch = MagicMock(**named, nn=MagicMock(Module=module))
        sys.modules |= {"torch": torch, "torch.nn": torch.nn}
    if importlib.util.find_spec("transformers") is None:
        names = ("transformers", "transformers.masking_utils")
        sys.modules |= {name: MagicMock() for name in names}
    if importlib.util.find_spec("equinox") is None:
        layer = type("MultiheadAttention", (), {"__module__": "equinox.nn"})
        sys.modules["equinox"] = MagicMock(nn=MagicMock(MultiheadAttention=layer))


_stand_ins()


def _with_navigation(app, docname, source):
    """Puts a hidden table of contents for each section of docs/index.md below it."""
    if docname != "index":
        return
    trees = []
    for section in re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]:
        caption, _, body = section.partition("\n")
        links = re.findall(r"^- \[.*\]\(([^)]+)\.(?:md|rst|ipynb)\)", body, re.MULTILINE)
        lines = [":hidden:", f":caption: {caption}", "", *links]
        trees.append("\n".join(["```{toctree}", *lines, "```"]))
    source[0] += "\n\n" + "\n\n".join(trees) + "\n"


def _as_plain_text(app, what, name, obj, options, lines):
    """Docstrings are written as text: a star is a star, and a listing of a module's stays one."""
    lines[:] = ["`".join(_stars_escaped(line.split("`"))) for line in lines]
    if what != "module":
        return
    text = "\n".join(lines)
    # A listing is a paragraph that is indented, or in columns from its first line on.
    listing = re.compile(r"(?<=\n\n)(?: {4}|\S+ {2,}\S).*?(?=\n\n(?! )|\Z)", re.DOTALL)
    text = listing.sub(lambda found: "::\n\n" + textwrap.indent(found[0], "    "), text)
    lines[:] = text.splitlines()


def _stars_escaped(parts):
    return [part if i % 2 else part.replace("*", r"\*") for i, part in enumerate(parts)]


def setup(app):
    app.connect("source-read", _with_navigation)
    app.connect("autodoc-process-docstring", _as_plain_text, priority=400)
