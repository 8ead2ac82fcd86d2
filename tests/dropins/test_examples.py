"""The examples run, and docs/drop-ins.md shows them as they are."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"pytorch": "torch", "hugging_face": "transformers", "maxtext_train": "maxtext"}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path):
    needed = NEEDS.get(path.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    found = runpy.run_path(str(path))
    if "tokens" in found:
        assert found["tokens"].shape == (1, 11)
    elif "query" in found:
        assert found["value"].grad.sum().item() == pytest.approx(2 * 4 * 10 * 8, rel=1e-4)
    elif "out" in found:
        assert found["out"].shape == (2, 10, 32)


def test_the_page_shows_them_as_they_are():
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs/drop-ins.md").read_text(), re.DOTALL)
    assert len(EXAMPLES) >= 6
    for path in EXAMPLES:
        assert path.read_text() in shown, f"docs/drop-ins.md does not show {path.name} as it is"
