"""docs/paper.md: a row for all that the paper has, commands that parse, stages that exist."""

import re
import shlex
import statistics

import pytest

from configs import c4
from eval.likelihood.paper import figures
from laser.training.config import load_config
from study.plan import load_study
from tests.docs.pages import ROOT
from tests.docs.test_commands import check

PAGE = (ROOT / "docs/paper.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ")]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "name",
    [*(f"Table {n}," for n in range(1, 12)), *(f"Figure {n} |" for n in range(1, 7)),
     "Section 4.1, LAMB", "Section 4.2, BERT", "A.5, "],
)  # fmt: skip
def test_all_of_the_paper_has_a_row_and_names_what_is_here(name):
    (row,) = [row for row in ROWS if row.startswith(f"| {name}")]
    _, paper, numbers, here, _, run_here, _ = re.split(r" ?\| ?", row)
    assert paper
    assert numbers
    assert run_here
    assert re.search(r"`configs/|`python |as figure|the same;", here)


def test_its_commands_could_be_given():
    found = re.findall(r"`(python [^`]+)`", PAGE)
    assert len(found) >= 7
    for command in found:
        check(shlex.split(command))


@pytest.mark.parametrize("row", [row for row in ROWS if re.search(r"stages? `", row)])
def test_its_stages_are_in_the_studies_beside_them(row):
    files = set(re.findall(r"configs/studies/\w+\.py", row))
    there = {stage.name for file in files for stage in load_study(file).stages}
    for named in re.findall(r"stages? ((?:`\w+`(?:, | and )?)+)", row):
        assert {*re.findall(r"\w+(?=`)", named)} <= there


@pytest.mark.parametrize(
    ("table", "size", "attentions"),
    [
        (2, "2p2b", ["laser+per_dim_temp", "laser", "standard+per_dim_temp", "standard",
                     "standard+temp=0.5"]),
        (6, "7p7b", ["laser", "standard"]),
        (7, "2p2b", ["laser+diff", "standard+diff"]),
    ],
)  # fmt: skip
def test_its_means_are_those_of_the_single_tasks(table, size, attentions):
    (row,) = [row for row in ROWS if row.startswith(f"| Table {table},")]
    numbers = [float(x) for x in re.findall(r"\d\d\.\d\d", row.split("|")[2])]
    models = [load_config(c4.get_config(f"size={size},attention={a}")).model for a in attentions]
    means = [statistics.fmean(figures(model).values()) for model in models]
    assert numbers[: len(means)] == pytest.approx(means, abs=0.006)
