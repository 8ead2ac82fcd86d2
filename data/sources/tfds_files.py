"""TensorFlow Datasets as a source: the files of a prepared set, and the text alone of each example.

seqio_tasks.py has the same documents as a SeqIO task. Its pipeline, and TFDS's own, spend half as
long on an example as SentencePiece does, so preparation takes the files' records as they are. That
needs no TensorFlow either, which is 2 seconds and 700 MB for each worker; what lies in a bucket is
read by gcsfs (requirements-bucket.txt).
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from data.addresses import is_address, told_as_os_errors
from data.sources.parts import (
    SPLITS,
    THREADS,
    Broken,
    Document,
    Part,
    look_at_files,
    number_parts,
)
from data.tfds_sets import (
    CHECKSUM_BYTES,
    HEAD_BYTES,
    REBUILD,
    TFDS,
    open_builder,
    record_size,
    verified,
    ways_to,
)

C4 = "tfds:c4/en:3.1.0"
BUFFER = 2**20  # bytes of an array_record file


class TfdsSource:
    """A prepared set; a part is one of its files, its size in examples.

    Attributes:
      dataset: NAME/CONFIG:VERSION.
      splits: what the set calls "train" and "validation".
      by_hash: whether the set has a train split alone, of which some documents are validation.
      data_dir: where sets are; None is TFDS's own place.
      is_array_record: or else TFRecord.
    """

    def __init__(self, name: str, validation_fraction: float | None = None):
        """Reads what TFDS says of the set.

        Args:
          name: as in registry.py.
          validation_fraction: of the documents, chosen by a hash of each, where the set has no
            validation split.

        Raises:
          ValueError: the set is not there, or the fraction is of no use.
          OSError: the bucket that it is in cannot be read.
        """
        self.dataset, _, language = name.removeprefix(TFDS).partition("@")
        self.splits = (language, f"{language}-validation") if language else SPLITS
        self.data_dir = os.environ.get("TFDS_DATA_DIR")
        self.by_hash = validation_fraction is not None
        self._fraction = validation_fraction or 0.0
        if self.by_hash and not 0 < self._fraction < 1:
            raise ValueError(f"validation_fraction={self._fraction}: must be between 0 and 1")
        info = _info(self.dataset, self.splits[: 1 if self.by_hash else 2])
        if self.by_hash and self.splits[1] in info.splits:
            raise ValueError(
                f"validation_fraction={self._fraction}: {name} has its own validation split, "
                f"{self.splits[1]!r}; leave it out"
            )
        self.is_array_record = info.file_format == tfds.core.FileFormat.ARRAY_RECORD
        self._description: dict[str, Any] = {"kind": "TFDS", "name": info.full_name, "splits": {}}
        contents: list[tuple[tuple[str, ...], int, str]] = []
        if self.by_hash:
            self._description["validation"] = self._fraction
        groups = [SPLITS] if self.by_hash else [(split,) for split in SPLITS]
        for ours, theirs in zip(groups, self.splits):
            files = info.splits[theirs].file_instructions  # those with an example in them
            sizes = [file.examples_in_shard for file in files]
            listing = [*sizes, info.splits[theirs].num_bytes]
            self._description["splits"][theirs] = {
                "examples": sum(sizes),
                "files": len(sizes),
                "listing_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
            }
            contents += [(ours, size, f.filename) for size, f in zip(sizes, files)]
        self.parts = number_parts(contents)

    def description(self) -> dict[str, Any]:
        """Name with version, and the numbers of examples in all files."""
        return self._description

    def files(self) -> dict[str, str]:
        """All files, by their names; in a bucket their sizes and times of the last write."""
        paths = [tfds.core.Path(part.content) for part in self.parts]
        names = [path.name for path in paths]
        if not any(is_address(part.content) for part in self.parts):
            return dict(zip(names, look_at_files([Path(path) for path in paths])))
        with told_as_os_errors(str(paths[0].parent)), ThreadPoolExecutor(THREADS) as pool:
            statuses = pool.map(lambda path: path.stat(), paths)
            return {name: f"{s.length}, {s.mtime}" for name, s in zip(names, statuses)}

    def read(self, part: Part) -> Iterator[Document | Broken]:
        """Examples of one file, in order.

        Raises:
          ValueError: the file is damaged, or has fewer or more examples than the set says.
          OSError: the file cannot be read.
        """
        file, read = part.content, 0
        records = _array_records(file) if self.is_array_record else _tfrecords(file)
        for record in islice(records, part.size + 1):
            read += 1
            try:
                text = _text(record)
                yield Document(part.split_of(text, self._fraction), text, read)
            except UnicodeDecodeError as error:
                yield Broken("not UTF-8", f"{file}, example {read - 1}: {error}")
        if read != part.size:
            found = "more" if read > part.size else f"only {read}"
            raise ValueError(f"{file}: {part.size} examples expected, {found} found; {REBUILD}")


def _text(record: bytes) -> str:
    (text,) = tf_example_pb2.Example.FromString(record).features.feature["text"].bytes_list.value
    return text.decode("utf-8")


def _tfrecords(file: str) -> Iterator[bytes]:
    with told_as_os_errors(file), tfds.core.Path(file).open("rb") as stream:
        while head := stream.read(HEAD_BYTES):
            size = record_size(file, head)
            yield verified(file, stream.read(size + CHECKSUM_BYTES), size)


def _array_records(file: str) -> Iterator[bytes]:
    from array_record.python.array_record_module import ArrayRecordReader

    # One thread: each core has a process of its own.
    reader = ArrayRecordReader(file, f"readahead_buffer_size:{BUFFER},max_parallelism:1")
    try:
        for _ in range(reader.num_records()):  # 0 where the file is cut off
            yield reader.read()
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{file}: {REBUILD} ({error})") from error


def _ways_to(dataset: str) -> str:
    """How to get a set with both splits, in words."""
    ways = ways_to(dataset)
    if dataset.startswith("c4/"):
        ways = f"give a folder with allenai's .json.gz files of C4, {ways}, a cluster's work"
    return (
        f"{ways}; splits of other names are given as in tfds:c4/multilingual:3.1.0@af, and of a "
        "set with a train split alone a part becomes validation by --validation_fraction=0.01"
    )


def _info(dataset: str, splits: tuple[str, ...]) -> tfds.core.DatasetInfo:
    info = open_builder(dataset, splits, "source", _ways_to(dataset)).info
    fields = info.features
    is_dict = isinstance(fields, tfds.features.FeaturesDict)
    text = fields["text"] if is_dict and "text" in fields else None
    if not isinstance(text, tfds.features.Text) or text.encoder is not None:
        raise ValueError(f"source={TFDS}{dataset}: no feature 'text', only {fields}")
    formats = (tfds.core.FileFormat.TFRECORD, tfds.core.FileFormat.ARRAY_RECORD)
    if info.file_format not in formats:
        raise ValueError(
            f"source={TFDS}{dataset}: file_format={info.file_format.value} is not read, only "
            f"{' and '.join(known.value for known in formats)}; convert it with "
            "`tfds convert_format`"
        )
    return info
