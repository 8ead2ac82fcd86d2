"""The manifest of a token store: what it holds, and how a reader knows that this is so.

All JSON that preparation writes is sealed (data/sealed.py). What a store says of itself besides
must be consistent: counts of shards add up to those of their split.
"""

import json
from pathlib import Path
from typing import Any

from data.reading.files import Address
from data.sealed import SEAL, checksum, file_sha256, unseal

FORMAT = 3
MANIFEST = "manifest.json"
COUNTS = ("tokens", "documents", "bytes")
DTYPES = {"<u2": 2**16, "<u4": 2**32}  # of tokens → ids that it can hold
ROWS_FOLLOW_FROM = ("tokenizer_sha256", "vocab_size", "eos_id", "pad_id", "dtype")
PREPARE_AGAIN = "delete the folder and run scripts/prepare_data.py again"

Record = dict[str, Any]


def fix_of(error: OSError, fix: str = PREPARE_AGAIN) -> str:
    """What to do about a file that cannot be read: `fix` if it is not there. A bucket that does not
    answer is no reason to prepare anything again."""
    gone = isinstance(error, FileNotFoundError)
    return fix if gone else "start again once it can be read: see network and rights"


def check_sha256(path: Path | Address, expected: str, fix: str = PREPARE_AGAIN) -> None:
    """Raises ValueError, with `fix`, unless the file's content has this checksum."""
    try:
        actual = file_sha256(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {fix_of(error, fix)}") from error
    if actual != expected:
        raise ValueError(f"{path} is corrupt: SHA-256 is {actual}, expected {expected}; {fix}")


def read_sealed(path: Path | Address, fix: str) -> Record:
    """The content of a sealed file, without its checksum.

    Args:
      path: of JSON.
      fix: what to do if it is damaged, for the message.

    Raises:
      ValueError: it can't be read, or is not what was written.
    """
    try:
        content = unseal(path.read_bytes())
    except OSError as error:
        line = f"{path}: can't be read ({error.strerror}); {fix_of(error, fix)}"
        raise ValueError(line) from error
    except ValueError as error:
        raise ValueError(f"{path}: damaged or edited ({error}); {fix}") from error
    del content[SEAL]
    return content


def read_manifest(folder: Path | Address) -> Record:
    """The manifest of a finished store, sound in itself; the files are not looked at.

    Raises:
      ValueError: there is none, it is of another format, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        there = path.is_file()
    except OSError as error:  # no rights, or no network: of an address
        raise ValueError(f"{path}: {error.strerror}") from error
    if not there:
        raise ValueError(
            f"{folder}: no finished token store ({MANIFEST} is missing); "
            "run scripts/prepare_data.py, which also goes on where it was stopped"
        )
    _check_format(path)
    manifest = read_sealed(path, PREPARE_AGAIN)
    if problem := _inconsistency(manifest):
        raise ValueError(f"{path}: {problem}; {PREPARE_AGAIN}")
    return manifest


def fingerprint(manifest: Record) -> str:
    """SHA-256 over all that rows follow from, and their counts; not where from or how it came."""
    splits = {
        name: [
            [split[key] for key in COUNTS],
            [[s[key] for key in (*COUNTS, "sha256", "offsets_sha256")] for s in split["shards"]],
        ]
        for name, split in manifest["splits"].items()
    }
    return checksum([[manifest[key] for key in ROWS_FOLLOW_FROM], splits])


def _check_format(path: Path | Address) -> None:
    """An older store has no seal, and deserves a better word than that it is damaged."""
    try:
        found = json.loads(path.read_bytes()).get("format")
    except (OSError, ValueError, RecursionError, AttributeError):
        return  # read_sealed says what is wrong
    if type(found) is int and found != FORMAT:
        raise ValueError(
            f"{path}: format={found}, this code reads {FORMAT}, or the file is damaged; "
            f"{PREPARE_AGAIN}"
        )


def _inconsistency(manifest: Record) -> str:
    """What contradicts itself in a manifest, or "" if nothing does."""
    vocab_size, dtype = manifest["vocab_size"], manifest["dtype"]
    if not 0 < vocab_size <= DTYPES.get(dtype, 0):
        return f"dtype={dtype} does not hold a vocabulary of {vocab_size}"
    for name in ("eos_id", "pad_id"):
        if not 0 <= manifest[name] < vocab_size:
            return f"{name}={manifest[name]} is outside of the vocabulary of {vocab_size}"
    for name, split in manifest["splits"].items():
        for key in COUNTS:
            total = sum(shard[key] for shard in split["shards"])
            if split[key] != total:
                return f"the {name} split says {split[key]} {key}, its shards have {total}"
            if any(shard[key] < 0 for shard in split["shards"]):
                return f"a shard of the {name} split has fewer than 0 {key}"
    return ""
