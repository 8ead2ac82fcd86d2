"""What every source of text has in common: parts that are read on their own, in any order.

A part is a file or a run of small files. Its documents become one shard of the store for each split
that it holds, so the bytes of a shard follow from its part and the tokenizer alone: parts may be
prepared by any number of processes or machines, in any order, again after a crash, and the store is
the same. C4's 1,024 files make 1,024 shards of 340 MB.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

SPLITS = ("train", "validation")


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


class Source(Protocol):
    """Documents in parts. Can be pickled, so that other processes read it, too."""

    @property
    def parts(self) -> Sequence[Part]: ...

    def description(self) -> dict[str, Any]:
        """What tells this source from another one, for the manifest; the same wherever it lies."""
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
