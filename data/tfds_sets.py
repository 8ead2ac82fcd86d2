"""Sets that TensorFlow Datasets has prepared: to open one, and the records of its TFRecord files.

Text, images and speech are read from such sets. The package is imported where a set is opened, and
without TensorFlow, which is 2 seconds and 700 MB. The format of TFRecord files is described at
tensorflow.org/tutorials/load_data/tfrecord: length, checksum, content, checksum of each record.
"""

import os
from collections.abc import Sequence
from typing import Any

import google_crc32c

from data.addresses import told_as_os_errors
from data.errors import first_line

TFDS = "tfds:"  # before the name of a set, where it is a source
LENGTH_BYTES, CHECKSUM_BYTES = 8, 4  # in TFRecord files
HEAD_BYTES = LENGTH_BYTES + CHECKSUM_BYTES
REBUILD = "damaged or cut off: copy or build the set again"


def ways_to(dataset: str) -> str:
    """How to get a set, in words."""
    return f"point TFDS_DATA_DIR to where it is, or build it with `tfds build {dataset}`"


def open_builder(dataset: str, splits: Sequence[str], key: str, ways: str = "") -> Any:
    """The builder of a set that is prepared in $TFDS_DATA_DIR, or where TFDS has its sets.

    Args:
      dataset: NAME:VERSION or NAME/CONFIG:VERSION.
      splits: those that it must have.
      key: of the setting that names it, for messages.
      ways: to get a split that is not there, in words; those of `ways_to` if empty.

    Raises:
      ValueError: there is no such set, or a split is not there.
      OSError: the bucket that it is in cannot be read.
    """
    import tensorflow_datasets as tfds

    place = f"{key}={TFDS}{dataset}"
    written = f"write it as NAME/CONFIG:VERSION, as in {TFDS}c4/en:3.1.0, or as NAME:VERSION"
    if ":" not in dataset:
        raise ValueError(f"{place}: has no version; {written}")
    data_dir = os.environ.get("TFDS_DATA_DIR")
    try:
        with told_as_os_errors(data_dir or ""):
            builder = tfds.builder(dataset, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        first = first_line(error)
        raise ValueError(
            f"{place}: TensorFlow Datasets has no such set ({first}); {written}"
        ) from error
    info = builder.info
    for split in splits:
        if split not in info.splits:
            has = f"only {', '.join(info.splits)}" if info.splits else "nothing at all"
            raise ValueError(
                f"{place}: no split {split!r} in {info.data_dir}, {has}; {ways or ways_to(dataset)}"
            )
    return builder


def record_size(file: str, head: bytes) -> int:
    """Bytes of the content behind a record's first HEAD_BYTES. Raises ValueError as `verified`."""
    return int.from_bytes(verified(file, head, LENGTH_BYTES), "little")


def verified(file: str, content: bytes, size: int) -> bytes:
    """The first `size` bytes, if the rest is their checksum: a CRC-32C, rotated and shifted.

    Raises ValueError that names the file.
    """
    body, checksum = content[:size], content[size:]
    crc = google_crc32c.value(body)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if checksum != masked.to_bytes(CHECKSUM_BYTES, "little"):
        raise ValueError(f"{file}: {REBUILD} (a checksum differs)")
    return body
