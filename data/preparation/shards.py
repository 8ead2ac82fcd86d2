"""Writes the shards of one part: tokens, and where each document begins.

    train-00000.bin      tokens of the documents, an EOS after each; the first shard begins with one
    train-00000.offsets  little-endian uint64: the place in the shard of each document's first token

The bytes follow from the part and the tokenizer alone. Under its own name a file is complete
(data/atomic.py).
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data import atomic
from data.reading.manifest import DTYPES
from data.reading.store import OFFSET_DTYPE, OFFSETS
from data.sealed import seal
from data.sources.parts import Broken, Document, Part, Source
from data.tokenizer import Tokenizer

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 2**21  # tokenised at a time; the first limit counts
SHOWN = 3  # messages about broken records that each part keeps

Record = dict[str, Any]
Progress = Callable[[int, int], None]  # more bytes of text, and more of the source, are done


@dataclass
class Counts:
    """Records of a part that did not become documents of the store."""

    broken: dict[str, int] = field(default_factory=dict)  # what is wrong → records
    messages: list[str] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)  # split → documents

    def add(self, record: Broken, limit: int) -> None:
        """Counts a broken record. Raises ValueError if there are more than `limit` now."""
        self.broken[record.kind] = self.broken.get(record.kind, 0) + 1
        if len(self.messages) < SHOWN:
            self.messages.append(record.message)
        check_broken([{"broken": self.broken, "messages": self.messages}], limit)


def broken_records(records: Iterable[Record]) -> dict[str, int]:
    """What is wrong → how many records of all these parts."""
    total: dict[str, int] = {}
    for record in records:
        for kind, count in record["broken"].items():
            total[kind] = total.get(kind, 0) + count
    return dict(sorted(total.items()))


def check_broken(records: Sequence[Record], limit: int) -> None:
    """Raises ValueError if more records are broken than are allowed."""
    total = broken_records(records)
    if sum(total.values()) > limit:
        counts = ", ".join(f"{count} {kind}" for kind, count in total.items())
        messages = [message for record in records for message in record["messages"]]
        raise ValueError(
            f"max_broken={limit}: more broken records than that ({counts}); mend them, or allow "
            f"more. {'; '.join(messages[:SHOWN])}"
        )


def write_part(
    source: Source,
    part: Part,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    drop: Collection[int] = (),
    max_broken: int = 0,
    threads: int = 1,
    progress: Progress = lambda text, read: None,
) -> Record:
    """Writes the shards of a part.

    Args:
      source: that has the part.
      part: one of source.parts.
      tokenizer: its EOS ends every document.
      folder: to write to.
      drop: documents that are left out, by their place in the part.
      max_broken: records that may be broken; they are skipped and counted.
      threads: to tokenise with.
      progress: called after every batch.

    Returns:
      {"shards": {split: what the manifest says of it}, "broken": {kind: records},
       "messages": [str], "duplicates": {split: documents}}.

    Raises:
      ValueError: too many records are broken, or the source can't be read.
    """
    counts = Counts()
    shards = {
        split: Shard(folder, f"{split}-{number:05d}", token_dtype(tokenizer.vocab_size))
        for split, number in part.shards.items()
    }
    try:
        for split, number in part.shards.items():
            if number == 0:  # so that the first document, too, has an EOS before it
                shards[split].write(np.array([tokenizer.eos_id]))
        done = 0
        for batch in _batches(_kept(source, part, drop, max_broken, counts)):
            text_bytes = _add(shards, batch, tokenizer, threads)
            progress(text_bytes, batch[-1].read - done)
            done = batch[-1].read
        progress(0, part.size - done)
        # A shard without a token would be an empty file.
        records = {split: shard.close() for split, shard in shards.items() if shard.num_tokens}
    finally:
        for shard in shards.values():
            shard.discard()
    return {
        "shards": records,
        "broken": counts.broken,
        "messages": counts.messages,
        "duplicates": counts.duplicates,
    }


def _add(
    shards: dict[str, "Shard"], batch: list[Document], tokenizer: Tokenizer, threads: int
) -> int:
    """Appends documents to the shards of their splits; returns the bytes of their text."""
    sizes = [len(document.text.encode()) for document in batch]
    ids = tokenizer.encode_arrays([document.text for document in batch], threads)
    eos = np.array([tokenizer.eos_id], np.int32)
    for split, shard in shards.items():
        chosen = [i for i, document in enumerate(batch) if document.split == split]
        shard.add([ids[i] for i in chosen], sum(sizes[i] for i in chosen), eos)
    return sum(sizes)


def token_dtype(vocab_size: int) -> str:
    """Little-endian, 2 bytes where they are enough."""
    return next(dtype for dtype, ids in DTYPES.items() if vocab_size <= ids)


class Shard:
    """Two files that are being written, under temporary names."""

    def __init__(self, folder: Path, name: str, dtype: str):
        self._tokens = _HashedFile(folder / f"{name}.bin")
        self._offsets = _HashedFile(folder / f"{name}{OFFSETS}")
        self._dtype = np.dtype(dtype)
        self.num_tokens = self._num_documents = self._num_bytes = 0

    def add(self, documents: list[np.ndarray], num_bytes: int, eos: np.ndarray) -> None:
        """Appends documents, whose texts have `num_bytes` in UTF-8, and an EOS after each."""
        if not documents:
            return
        lengths = np.fromiter((len(ids) + 1 for ids in documents), np.int64, len(documents))
        starts = self.num_tokens + np.cumsum(lengths) - lengths
        self._offsets.write(starts.astype(OFFSET_DTYPE).tobytes())
        self.write(np.concatenate([piece for ids in documents for piece in (ids, eos)]))
        self._num_documents += len(documents)
        self._num_bytes += num_bytes

    def write(self, ids: np.ndarray) -> None:
        """Appends tokens that are no document."""
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self.num_tokens += len(ids)

    def close(self) -> Record:
        """Puts the files in their places; returns what the manifest says of them."""
        return {
            "file": self._tokens.path.name,
            "tokens": self.num_tokens,
            "documents": self._num_documents,
            "bytes": self._num_bytes,
            "sha256": self._tokens.close(),
            "offsets_sha256": self._offsets.close(),
        }

    def discard(self) -> None:
        """Removes what was written, unless it is in its place already."""
        self._tokens.discard()
        self._offsets.discard()


class _HashedFile:
    """A file that appears under its name when it is complete, and the SHA-256 of its content."""

    def __init__(self, path: Path):
        self.path = path
        self._temporary = atomic.temporary_path(path)
        self._file = self._temporary.open("wb")
        self._sha256 = hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._sha256.update(content)
        self._file.write(content)

    def close(self) -> str:
        self._file.close()
        atomic.publish(self._temporary, self.path)
        return self._sha256.hexdigest()

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Record) -> None:
    """Writes a file of JSON with its checksum, all or nothing."""
    atomic.write(path, json.dumps(seal(content), indent=2) + "\n")


def _kept(
    source: Source, part: Part, drop: Collection[int], max_broken: int, counts: Counts
) -> Iterator[Document]:
    """Documents without those to drop; the others are counted."""
    index = -1
    for record in source.read(part):
        if isinstance(record, Broken):
            counts.add(record, max_broken)
            continue
        index += 1
        if index in drop:
            counts.duplicates[record.split] = counts.duplicates.get(record.split, 0) + 1
        else:
            yield record


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
