"""What `pip install` brings: the wheel in an environment that has jax and what jax needs alone."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import laser

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"configs", "data", "eval", "export", "laser", "models", "scripts", "study", "train.py"}

PROGRAM = """
import sys
import jax, jax.numpy as jnp
import laser
from laser.attention import attention
assert "flax" not in sys.modules and "site-packages" in laser.__file__, laser.__file__
x = jnp.arange(12.0).reshape(1, 3, 1, 4) / 12
f = jax.value_and_grad(lambda v: attention(x, x, v, kind="laser").sum())
value, gradient = f(x)
print(laser.__version__, float(value), float(gradient.sum()))
"""


def run(*command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(folder):
    """The sdist, and the wheel that is made of it, of a copy: building leaves files behind."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        copy = folder / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy)
    run(
        sys.executable, "-m", "build", "--no-isolation",  # else it would be fetched each time
        "--outdir", folder, folder / "checkout", cwd=folder,
    )  # fmt: skip
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def needed(name, found=None):
    """Names of the distributions that one needs here, itself and the indirect ones among them."""
    found = {} if found is None else found
    distribution = metadata.distribution(name)
    found[name] = distribution
    for line in distribution.requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if requirement.name not in found and (marker is None or marker.evaluate({"extra": ""})):
            needed(requirement.name, found)
    return found


def fresh_python(folder):
    """Python of a new environment, with links to the installed jax and what it needs."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in needed("jax").values():
        for top in {file.parts[0] for file in distribution.files or []} - {".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_sdist_and_wheel(tmp_path):
    """One test, so that they are built once."""
    sdist, wheel = build(tmp_path)
    check_contents(sdist, wheel)
    check_extras(wheel)
    python = fresh_python(tmp_path / "fresh")
    install = ("-m", "pip", "--python", python, "install", "--no-index", wheel)
    run(sys.executable, *install, cwd=tmp_path)
    version, value, gradient = run(python, "-I", "-c", PROGRAM, cwd=tmp_path).split()
    assert version == laser.__version__
    assert 0 < float(value) < 12
    # Each of the 12 outputs' gradients sums to 1 over the values.
    assert float(gradient) == pytest.approx(12, rel=1e-5)


def check_contents(sdist, wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    assert {name.split("/")[0] for name in files} == FOLDERS
    assert files >= set(run("git", "ls-files", *sorted(FOLDERS), cwd=ROOT).split())
    assert {"configs/c4_store.flags", "export/remote/modeling_laser.py"} <= files
    assert "laser/py.typed" in files
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "requirements-dev.txt", *files} <= in_sdist
    assert not [name for name in in_sdist | files if name.startswith("tests")]


def check_extras(wheel):
    """Those of the requirements files, with their bounds."""
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA")]
    lines = zipfile.ZipFile(wheel).read(*names).decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("Requires-Dist: "):
            requirement = Requirement(line.removeprefix("Requires-Dist: "))
            extra = re.search(r'extra == "([\w-]+)"', str(requirement.marker))
            requirement.marker = None
            found.setdefault(extra and extra[1], set()).add(str(requirement))
    expected = {
        extra: {str(Requirement(line)) for line in read(file)} for extra, file in extras().items()
    }
    jax = {line for line in expected["train"] if Requirement(line).name == "jax"}
    assert len(jax) == 1
    assert found == {None: jax, **expected}


def extras():
    files = {file.stem.removeprefix("requirements-"): file for file in ROOT.glob("requirements-*")}
    return {"train": ROOT / "requirements.txt", **files}


def read(file):
    lines = [re.sub(r"\s*#.*", "", line) for line in file.read_text().splitlines()]
    found = set()
    for line in filter(None, lines):
        is_file = re.match(r"-r (\S+)$", line)
        found |= read(ROOT / is_file[1]) if is_file else {line}
    return found


def test_the_version_stands_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## [{laser.__version__}]" in changes or f"will be {laser.__version__}," in changes


def test_the_attention_imports_jax_and_what_jax_needs():
    """By the modules that are loaded in an environment that has all the rest, too."""
    program = (
        "import sys, jax\nbefore = set(sys.modules)\nimport laser.attention\n"
        "print(*set(sys.modules) - before)"
    )
    loaded = {name.split(".")[0] for name in run(sys.executable, "-c", program, cwd=ROOT).split()}
    # absl is imported by jax where it is there.
    allowed = {"laser", "jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "absl"}
    assert loaded <= allowed | sys.stdlib_module_names
