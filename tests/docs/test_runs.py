"""Over all pages one folder of a run has one config, and a folder that is read was trained before.

A reader who follows one page after the other must not be refused because two of them train other
things in one folder.
"""

import json
import re
import shlex

import pytest

from laser.training.config import to_dict
from laser.training.fields import flatten
from laser.training.flags import parse
from laser.training.run_folder import OF_NO_MATTER
from tests.docs.pages import PAGES, ROOT, Block, blocks
from tests.docs.test_commands import SHELL, commands

README = ROOT / "README.md"
FOLDER = r"(?:gs://[\w-]+/)?runs/[\w-]+"
FREE = re.compile(rf"--config\.({'|'.join(map(re.escape, OF_NO_MATTER))})=")


def made_by_make(target: str) -> list[list[str]]:
    """The commands of a target of the Makefile."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (body,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)*)", text, re.MULTILINE)
    lines = re.findall(r"\.venv/bin/(python .*)", body)
    return [shlex.split(line) for line in lines]


def trained(words: list[str]) -> dict[str, list[str]]:
    """Folder of a run and the arguments of train.py that make it, of one command."""
    if words[:1] == ["make"]:
        return {k: v for t in words[1:] for w in made_by_make(t) for k, v in trained(w).items()}
    if "scripts/quickstart.py" in words:
        kind = next((w.partition("=")[2] for w in words if w.startswith("--attention=")), "laser")
        folder = next((w.partition("=")[2] for w in words if w.startswith("--workdir=")), None)
        fields = [word for word in words if word.startswith("--config.")]
        recipe = f"--config=configs/quickstart.py:attention={kind}"
        return {folder or f"runs/quickstart-{kind}": [recipe, *fields]}
    if "--from_export" in " ".join(words):
        return {w.partition("=")[2]: words for w in words if w.startswith("--workdir=")}
    if "--" in words:  # the launcher's
        words = ["train.py", *words[words.index("--") + 1 :]]
    folders = [w.partition("=")[2] for w in words if w.startswith("--workdir=")]
    if not {"train.py", "train"} & set(words) or not folders or "--config=..." in words:
        return {}  # ... is the run of another page, which goes on with fields of no matter
    return {folders[0]: [w for w in words if re.match(r"--config|\$", w)]}


def meant(arguments: list[str]) -> str:
    """The config of a run, without the fields that may change when it goes on. Its arguments where
    the config is that of another run, of a variable, or one that a page adds to the code."""
    if re.search(r"init_from=|from_export=|\$|=sigmoid|=lion", " ".join(arguments)):
        return json.dumps(sorted(word for word in arguments if not FREE.match(word)))
    config, _ = parse(["train.py", *arguments], lambda values: None)
    fields = flatten(to_dict(config))
    return json.dumps({k: v for k, v in fields.items() if k not in OF_NO_MATTER}, sort_keys=True)


def every_command() -> list[tuple[Block, list[str]]]:
    """Of all pages; what stands in backticks is no command."""
    found = [block for page in PAGES for block in blocks(page) if block.language in ("", *SHELL)]
    return [(block, words) for block in found for words in commands(block)]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_one_folder_has_one_config():
    seen: dict[str, tuple[str, str]] = {}
    for block, words in every_command():
        for folder, arguments in trained(words).items():
            config, place = meant(arguments), block.place
            known, first = seen.setdefault(folder, (config, place))
            assert config == known, f"{folder}: {place} has another config than {first}"
    assert {"runs/laser", "runs/standard", "runs/quickstart-laser", "runs/bert"} <= set(seen)


def test_what_goes_on_with_a_run_changes_fields_of_no_matter_alone():
    for block, words in every_command():
        if "--config=..." in words:
            others = [w for w in words if w.startswith("--config.") and not FREE.match(w)]
            assert not others, f"{block.place}: {others}"


def test_a_run_that_is_read_was_trained_on_that_page_or_in_the_readme():
    by_page: dict[object, set[str]] = {page: set() for page in PAGES}
    for block, words in every_command():
        by_page[block.page] |= set(trained(words))
    for block, words in every_command():
        read = set(re.findall(FOLDER, " ".join(words)))
        missing = read - by_page[block.page] - by_page[README]
        assert not missing, f"{block.place}: no page before trains {missing}"


@pytest.mark.parametrize(
    ("command", "folders"),
    [
        ("python train.py --config=configs/c4.py --workdir=runs/a", {"runs/a"}),
        ("scripts/launch_tpu.sh run --name=b -- --config=c.py --workdir=gs://b/runs/b",
         {"gs://b/runs/b"}),
        ("make bert", {"runs/bert"}),
        ("make quickstart", {"runs/quickstart-laser"}),
        ("python scripts/quickstart.py --workdir=runs/e -- --config.model.remat=full", {"runs/e"}),
        ("python scripts/export.py --from_export=exported --workdir=runs/c", {"runs/c"}),
        ("python scripts/generate.py --workdir=runs/d", set()),
    ],
)  # fmt: skip
def test_folders_that_a_command_makes(command, folders):
    assert set(trained(shlex.split(command))) == folders


def test_two_configs_of_one_folder_differ():
    first, same, other = (
        meant(["--config=configs/c4.py:" + rest])
        for rest in ("size=301m", "size=301m,attention=laser", "attention=laser+per_dim_temp")
    )
    assert first == same != other
