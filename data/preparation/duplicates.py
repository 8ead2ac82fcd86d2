"""Finds exact duplicates of documents in bounded memory, whatever the order of the parts.

Of equal documents one stays: the first, validation before train. Each part writes the 128-bit
hashes of its documents, sorted, to disk (24 bytes a document, 9 GB for C4); then the hashes of all
parts are merged one range of values at a time, a range so narrow that a few million documents are
in memory. That two different documents of C4 have the same hash has a probability of 2e-22.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data import atomic
from data.preparation.shards import Progress
from data.reading.manifest import PREPARE_AGAIN
from data.sources.parts import Broken, Part, Source

RANGE_DOCUMENTS = 2**22  # in memory at a time, at about 100 bytes each
HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("rank", "<u8")])
# Rank, which decides who is first: validation or train, part, place in the part.
TRAIN_BIT, PART_SHIFT = np.uint64(62), np.uint64(40)  # Beam wants a signed integer
DIGEST_BYTES = 32  # at the end of every file: the SHA-256 of its name and the rest
INDEX_MASK = np.uint64(2**40 - 1)
PART_MASK = np.uint64(2**22 - 1)


def hash_part(source: Source, part: Part, path: Path, progress: Progress) -> None:
    """Writes the hashes of a part's documents, sorted. Broken records are not counted."""
    rows = bytearray()
    text_bytes = read = index = 0
    for record in source.read(part):
        if isinstance(record, Broken):
            continue
        content = record.text.encode()
        rows += document_hash(content)
        rows += document_rank(record.split, part.index, index).to_bytes(8, "little")
        index += 1
        text_bytes += len(content)
        if text_bytes >= 2**22:
            progress(text_bytes, record.read - read)
            text_bytes, read = 0, record.read
    progress(text_bytes, part.size - read)
    hashes = np.frombuffer(rows, HASH)
    ordered = np.sort(hashes, order=("high", "low", "rank")).tobytes()
    atomic.write(path, ordered + _digest(path, ordered))


def document_hash(content: bytes) -> bytes:
    """16 bytes that stand for a document's text in UTF-8."""
    return hashlib.blake2b(content, digest_size=16).digest()


def document_rank(split: str, part: int, index: int) -> int:
    """The rank of a document: of those that are equal, the one with the smallest rank stays."""
    return (split == "train") << int(TRAIN_BIT) | part << int(PART_SHIFT) | index


def rank_place(rank: int) -> tuple[int, int]:
    """The part of a rank, and the place in it."""
    return rank >> int(PART_SHIFT) & int(PART_MASK), rank & int(INDEX_MASK)


def find_duplicates(hash_files: Sequence[Path], folder: Path) -> None:
    """Writes for every part the places of the documents to drop.

    Args:
      hash_files: of all parts, in their order.
      folder: is made anew; it appears when it is complete.

    Raises:
      ValueError: a file of hashes is damaged.
    """
    temporary = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for ranks in _duplicate_ranks(hash_files):
        parts = (ranks >> PART_SHIFT) & PART_MASK
        order = np.argsort(parts, kind="stable")
        for chosen in np.split(order, np.flatnonzero(np.diff(parts[order])) + 1):
            if chosen.size:
                with _drop_file(temporary, int(parts[chosen[0]])).open("ab") as file:
                    file.write((ranks[chosen] & INDEX_MASK).astype("<u8").tobytes())
    for part in range(len(hash_files)):
        path = _drop_file(temporary, part)
        places = path.read_bytes() if path.exists() else b""
        path.write_bytes(places + _digest(path, places))
    temporary.replace(folder)


def read_duplicates(folder: Path, part: int) -> frozenset[int]:
    """Places, in a part, of the documents to drop. Raises ValueError if the file is damaged."""
    return frozenset(np.frombuffer(_verified(_drop_file(folder, part)), "<u8").tolist())


def duplicate_ranks(hashes: np.ndarray) -> np.ndarray:
    """Ranks of all but the first of equal hashes."""
    ordered = np.sort(hashes, order=("high", "low", "rank"))
    same = (ordered["high"][1:] == ordered["high"][:-1]) & (
        ordered["low"][1:] == ordered["low"][:-1]
    )
    return ordered["rank"][1:][same]


def _duplicate_ranks(hash_files: Sequence[Path]) -> Iterator[np.ndarray]:
    total = sum((path.stat().st_size - DIGEST_BYTES) // HASH.itemsize for path in hash_files)
    ranges = max(1, -(-total // RANGE_DOCUMENTS))
    edges = [2**64 * i // ranges for i in range(1, ranges)]
    cuts = [_cuts(path, edges) for path in hash_files]
    for i in range(ranges):
        yield duplicate_ranks(
            np.concatenate([_load(path, c[i], c[i + 1]) for path, c in zip(hash_files, cuts)])
        )


def _cuts(path: Path, edges: Iterable[int]) -> list[int]:
    """Where a file's hashes pass the edges, with its beginning and end."""
    high = np.frombuffer(_verified(path), HASH)["high"]
    inner = np.searchsorted(high, np.array(list(edges), np.uint64))
    return [0, *inner.tolist(), len(high)]


def _load(path: Path, start: int, stop: int) -> np.ndarray:
    return np.fromfile(path, HASH, count=stop - start, offset=start * HASH.itemsize)


def _digest(path: Path, content: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + content).digest()


def _verified(path: Path) -> bytes:
    """The content of a file without its digest."""
    whole = path.read_bytes() if path.is_file() else b""
    content = whole[:-DIGEST_BYTES]
    if whole[-DIGEST_BYTES:] != _digest(path, content):
        raise ValueError(f"{path}: missing or damaged; {PREPARE_AGAIN}")
    return content


def _drop_file(folder: Path, part: int) -> Path:
    return folder / f"{part:05d}.u8"
