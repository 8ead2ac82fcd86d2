"""What every source of text has in common: parts that are read on their own, in any order.

A part is a file or a run of small files. Its documents become one shard of the store for each split
that it holds, so the bytes of a shard follow from its part and the tokenizer alone: parts may be
prepared by any number of processes or machines, in any order, again after a crash, and the store is
the same. C4's 1,024 files make 1,024 shards of 340 MB.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

SPLITS = ("train", "validation")
END_BYTES = 2**16  # of a file, at either end, that are looked at to know it again
THREADS = 16  # a mounted bucket answers late, but many at a time


class Document(NamedTuple):
    """A text, the split that it belongs to, and how much of the part has been read after it."""

    split: str
    text: str
    read: int  # in the unit of Part.size


class Broken(NamedTuple):
    """A record that has no text: what is wrong with it, and a message that says where it is."""

    kind: str
    message: str


@dataclass(frozen=True)
class Part:
    """A piece of a source.

    Attributes:
      index: its place among the parts of the source.
      size: how much there is to read, in bytes of files or in examples, as the source counts.
      shards: split → number of the shard that its documents of that split become.
      content: what the source needs to find it.
    """

    index: int
    size: int
    shards: dict[str, int]
    content: Any

    def split_of(self, text: str, validation_fraction: float) -> str:
        """The split of a document. In a part of both splits it follows from the text alone:
        wherever that stands, it stays in its split."""
        if len(self.shards) == 1:
            return next(iter(self.shards))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return SPLITS[int.from_bytes(digest) < validation_fraction * 2**64]


class Source(Protocol):
    """Documents in parts. Can be pickled, so that other processes read it, too."""

    @property
    def parts(self) -> Sequence[Part]: ...

    def description(self) -> dict[str, Any]:
        """What tells this source from another one, for the manifest; the same wherever it lies."""
        ...

    def files(self) -> dict[str, str]:
        """What must stay the same until the store is finished: file → what tells its content from
        another, at the cost of a look. Empty where the description says it all."""
        ...

    def read(self, part: Part) -> Iterator[Document | Broken]:
        """Records of a part, in order.

        Raises:
          ValueError: the part can't be read to its end, as where a gzip file is cut off.
        """
        ...


def number_parts(contents: Iterable[tuple[tuple[str, ...], int, Any]]) -> list[Part]:
    """Parts from (splits, size, content), with shards numbered from 0 in each split."""
    parts: list[Part] = []
    count = dict.fromkeys(SPLITS, 0)
    for splits, size, content in contents:
        shards = {split: count[split] for split in splits}
        parts.append(Part(len(parts), size, shards, content))
        for split in splits:
            count[split] += 1
    return parts


def texts(source: Source, split: str, parts: Iterable[Part] | None = None) -> Iterator[str]:
    """Documents of a split in the order of the store. Raises ValueError at a broken record."""
    for part in source.parts if parts is None else parts:
        if split not in part.shards:
            continue
        for record in source.read(part):
            if isinstance(record, Broken):
                raise ValueError(record.message)
            if record.split == split:
                yield record.text


def look_at_files(paths: Sequence[Path]) -> list[str]:
    """What tells each file from one of other content: its beginning and end, and if that is not
    all of it, its size and the time of the last write.

    Raises:
      ValueError: one can't be read, or is no regular file.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_look_at, paths))


def _look_at(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a fifo would wait for a writer
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); move it away") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is no regular file; move it away")
        size = status.st_size
        digest = hashlib.blake2b(os.pread(handle, END_BYTES, 0), digest_size=16)
        digest.update(os.pread(handle, END_BYTES, max(END_BYTES, size - END_BYTES)))
    finally:
        os.close(handle)
    when = f", {status.st_mtime_ns}" if size > 2 * END_BYTES else ""
    return f"{digest.hexdigest()}, {size}{when}"
