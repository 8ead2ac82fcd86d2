"""Checksums, and JSON records that carry one of themselves: of stores, runs and checkpoints.

A record's entry `sha256` is the SHA-256 of all other entries, so that a flipped bit or a number
edited by hand is refused, and other spacing is not.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any, Literal, Protocol

SEAL = "sha256"


def checksum(content: Any) -> str:
    """SHA-256 of anything that JSON can say, as hex digits."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Readable(Protocol):
    """A path of pathlib, or what opens as one."""

    def open(self, mode: Literal["rb"]) -> io.BufferedIOBase:
        """The file's content."""


def file_sha256(path: Readable) -> str:
    """Of a file's content, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its checksum, in place of one that it may have."""
    content = {key: value for key, value in record.items() if key != SEAL}
    return content | {SEAL: checksum(content)}


def unseal(content: bytes) -> dict[str, Any]:
    """A sealed record from JSON, checksum included. Raises ValueError if any of it has changed."""
    if not content.strip(b"\0 \r\n"):
        raise ValueError("it is empty")
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:  # no UTF-8 or no JSON
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(record, dict) or SEAL not in record:
        raise ValueError("it has no checksum of itself")
    if seal(record)[SEAL] != record[SEAL]:
        raise ValueError("its checksum differs")
    return record
