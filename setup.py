"""The dependencies of the package, read from the requirements files, so that they stand once.

requirements.txt is the extra `train`, requirements-NAME.txt the extra NAME; the attention itself
needs jax alone. Setuptools reads such files by itself, but not with the `-r` lines that let
`pip install -r requirements-NAME.txt` be one command. All else is in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def requirements(file: Path) -> list[str]:
    """The file's requirements, and those of the files that it names."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found += requirements(file.parent / line[3:].strip())
        elif line:
            found.append(line)
    return found


train = requirements(ROOT / "requirements.txt")
extras = {
    file.stem.removeprefix("requirements-"): requirements(file)
    for file in sorted(ROOT.glob("requirements-*.txt"))
}
setup(
    install_requires=[line for line in train if line.startswith("jax>")],
    extras_require={"train": train, **extras},
)
