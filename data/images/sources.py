"""Images with their classes by the name of where they are, read one by one in any order.

    digits                          scikit-learn's handwritten digits, 8 x 8, in its package
    tfds:imagenet2012:5.1.0         TensorFlow Datasets, any prepared set with `image` and `label`;
    tfds:NAME:VERSION@SPLIT         `validation` is its split of that name unless another is given
    anything else                   a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, or of
                                    classes itself, as ImageNet-v2's 0 to 999

A folder of the class's name holds its images, and classes are numbered in the order of the names of
the training folders: those of numbers by their value. Other folders may have their labels for
names. Neither TensorFlow nor TFDS is imported but to find a prepared set.
"""

import csv
import gzip
import hashlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data.errors import first_line
from data.images.augment import Image
from data.images.draws import mixed
from data.tfds_sets import (
    CHECKSUM_BYTES,
    HEAD_BYTES,
    REBUILD,
    TFDS,
    open_builder,
    record_size,
    verified,
)

log = logging.getLogger(__name__)

DIGITS = "digits"
ENDINGS = (".jpeg", ".jpg", ".png")
HELD_OUT_OF = 5  # digits: one
VALIDATION = ("validation", "val", "test")  # names of folders
SHOWN = 5  # names in a message


class Example(NamedTuple):
    """An image, encoded or as pixels, and its class."""

    image: bytes | Image
    label: int


class Images(Protocol):
    """Examples by number.

    Attributes:
      classes: their names, by the labels.
      fingerprint: hex digits, equal for equal content.
    """

    classes: Sequence[str]
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> Example: ...

    def name(self, index: int) -> str:
        """Where the example is, for messages."""
        ...


class Broken:
    """What was left out, by name and up to a limit; for many threads."""

    def __init__(self, limit: int):
        self._limit, self._lock = limit, threading.Lock()
        self.names: dict[str, str] = {}

    def add(self, name: str, why: str) -> None:
        """Says so the first time. Raises TooManyBroken beyond the limit."""
        with self._lock:
            if name in self.names:
                return
            self.names[name] = why
            count = len(self.names)
        if count > self._limit:
            some = "; ".join(f"{name}: {why}" for name, why in list(self.names.items())[:SHOWN])
            raise TooManyBroken(
                f"{count} broken images or empty classes, more than "
                f"images.max_broken={self._limit}: {some}; raise the limit, or mend or remove "
                "them: a run that has begun takes those other data by --allow_config_change"
            )
        log.warning("left out, %d of at most %d: %s: %s", count, self._limit, name, why)


class TooManyBroken(OSError):
    """More than may be left out."""


def open_images(name: str, broken: Broken) -> tuple[Images, Images]:
    """The training and the validation images of a source.

    Raises:
      ValueError: there is no such source here.
      TooManyBroken: too many classes are empty.
    """
    if name == DIGITS:
        return Digits("train"), Digits("validation")
    if name.startswith(TFDS):
        source, _, split = name.removeprefix(TFDS).partition("@")
        key = "images.source"
        return TfdsImages(source, "train", key), TfdsImages(source, split or "validation", key)
    root = Path(name).expanduser()
    if not name or not root.is_dir():
        raise ValueError(
            f"images.source={name!r}: no such folder; give one, {DIGITS}, or {TFDS}NAME:VERSION"
        )
    train = ImageFolder(root / "train", broken)
    held_out = [root / folder for folder in VALIDATION if (root / folder).is_dir()]
    if not held_out:
        raise ValueError(f"images.source={name}: no folder {' or '.join(VALIDATION)} in it")
    return train, ImageFolder(held_out[0], broken, train.classes)


def open_test_images(name: str, train: Images, broken: Broken) -> Images:
    """Further images of the classes of training, with its labels. Raises as `open_images`."""
    if not name.startswith(TFDS):
        root = Path(name).expanduser()
        if not root.is_dir():
            raise ValueError(
                f"images.test={name!r}: no such folder; give one that has a folder for each class, "
                f"{TFDS}NAME:VERSION, or nothing"
            )
        return ImageFolder(root, broken, train.classes)
    source, _, split = name.removeprefix(TFDS).partition("@")
    images = TfdsImages(source, split or "test", "images.test")
    ours, theirs = train.classes, images.classes
    if len(theirs) > len(ours):
        raise ValueError(
            f"images.test={name}: {len(theirs)} classes, and training has {len(ours)}; give a set "
            "of the classes of training"
        )
    other = [i for i, (x, y) in enumerate(zip(ours, theirs)) if x != y]
    if other and not (_are_numbers(ours) or _are_numbers(theirs)):
        i = other[0]
        raise ValueError(
            f"images.test={name}: label {i} is {theirs[i]!r} there and {ours[i]!r} in training; "
            "give a set of the classes of training, in their order"
        )
    return images


class ImageFolder:
    """A folder for each class, with its images.

    Attributes:
      classes: names of their folders, in the order of the labels.
    """

    def __init__(
        self,
        root: Path,
        broken: Broken,
        classes: Sequence[str] | None = None,
    ):
        """Lists the files.

        Args:
          root: has the folders.
          broken: is told of empty ones.
          classes: by their labels, those there may be: folders have these names, or all of them
            the labels. None for those there are, in their order.

        Raises:
          ValueError: no images, or a class that is not known.
        """
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder of classes")
        there = _in_order(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.root = root
        self.classes: Sequence[str] = there if classes is None else classes
        numbers = {name: i for i, name in enumerate(self.classes)}
        if unknown := [name for name in there if name not in numbers]:
            count = len(self.classes)
            may_be_labels = _are_numbers(there) and not _are_numbers(self.classes)
            if not (may_be_labels and all(int(name) < count for name in there)):
                raise ValueError(
                    f"{root / unknown[0]}: no class of training has this name, as "
                    f"{self.classes[0]!r} is one; name folders as there, or where those are no "
                    f"numbers, all of them by labels below {count}"
                )
            numbers = {name: int(name) for name in there}
        digest = hashlib.sha256()
        self._files: list[str] = []
        labels: list[int] = []
        for name in there:
            files = [
                (entry.name, entry.stat().st_size)
                for entry in os.scandir(root / name)
                if entry.name.lower().endswith(ENDINGS)
            ]
            if not files:
                broken.add(str(root / name), "no image of this class")
            for file, size in sorted(files):
                digest.update(f"{numbers[name]}/{file}/{size}\n".encode())
                self._files.append(f"{name}/{file}")
            labels += [numbers[name]] * len(files)
        if not self._files:
            raise ValueError(f"{root}: no folder in it has images ({', '.join(ENDINGS)})")
        self._labels = np.array(labels, np.int32)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> Example:
        return Example((self.root / self._files[index]).read_bytes(), int(self._labels[index]))

    def name(self, index: int) -> str:
        return str(self.root / self._files[index])


def _in_order(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return sorted(names, key=int) if _are_numbers(names) else names


def _are_numbers(names: Iterable[str]) -> bool:
    return all(name.isdecimal() for name in names)


class TfdsImages:
    """A split of a prepared set, from its files."""

    def __init__(self, source: str, split: str, key: str):
        """Reads what TFDS says of the set, which `key` of the config names.

        Raises ValueError where it is not on this machine, or its files are damaged.
        """
        info = open_builder(source, (split,), key).info
        import tensorflow_datasets as tfds

        found = info.splits[split]
        self.classes: Sequence[str] = info.features["label"].names  # numbers where it has none
        self.fingerprint = hashlib.sha256(
            f"{info.full_name} {split} {found.shard_lengths}".encode()
        ).hexdigest()
        self._name, self._count = f"{info.full_name}/{split}", found.num_examples
        files = [str(path) for path in found.filepaths]
        self._records: Sequence[bytes]
        if info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            try:
                self._records = ArrayRecordDataSource(files)
            except RuntimeError as error:
                raise ValueError(
                    f"{key}={TFDS}{source}: {split}: {REBUILD} ({first_line(error)})"
                ) from error
        elif info.file_format == tfds.core.FileFormat.TFRECORD:
            self._records = TfRecords(files)
        else:
            raise ValueError(
                f"{key}={TFDS}{source}: file_format={info.file_format.value} is not read; convert "
                "it to array_record with `tfds convert_format`"
            )
        if len(self._records) != self._count:
            raise ValueError(
                f"{key}={TFDS}{source}: {self._count} examples expected, {len(self._records)} "
                "found; copy or build the set again"
            )

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Example:
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            record = self._records[index]
        except (ValueError, RuntimeError) as error:  # a checksum of this format or of array_record
            raise OSError(f"{self.name(index)}: {first_line(error)}") from error
        fields = tf_example_pb2.Example.FromString(record).features.feature
        return Example(fields["image"].bytes_list.value[0], fields["label"].int64_list.value[0])

    def name(self, index: int) -> str:
        return f"{self._name}, example {index}"


class TfRecords(Sequence[bytes]):
    """Records of TFRecord files by number, of which only lengths are read to find them.

    That is one read in every record when it is opened: seconds of a fast disk for ImageNet, and too
    long for a bucket. Files of array_record have an index.
    """

    def __init__(self, files: Sequence[str]):
        """Raises ValueError for a file that is damaged or cut off."""
        self._names = files
        self._files = [os.open(file, os.O_RDONLY) for file in files]
        places = [_records(number, file) for number, file in zip(self._files, files)]
        self._file = np.repeat(np.arange(len(files)), [len(found) for found in places])
        self._place = np.concatenate(places)

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, index: Any) -> Any:
        number, (start, size) = self._file[index], self._place[index].tolist()
        content = os.pread(self._files[number], size + CHECKSUM_BYTES, start)
        return verified(self._names[number], content, size)

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            os.close(file)


def _records(file: int, name: str) -> np.ndarray:
    """Where each record begins, and its bytes: (n, 2) int64."""
    end, place, found = os.fstat(file).st_size, 0, []
    while place < end:
        head = os.pread(file, HEAD_BYTES, place)
        size = record_size(name, head)
        found.append((place + HEAD_BYTES, size))
        place += HEAD_BYTES + size + CHECKSUM_BYTES
    if place != end:
        raise ValueError(f"{name}: {REBUILD}")
    return np.array(found, np.int64).reshape(-1, 2)


class Digits:
    """1,797 handwritten digits of 8 x 8 (UCI, test part) from scikit-learn's package, unimported.

    A fifth is held out, by a hash of its place: the file has an order of classes and of writers.
    """

    classes: Sequence[str] = tuple("0123456789")

    def __init__(self, split: str):
        """Raises ValueError where the package is not installed."""
        spec = importlib.util.find_spec("sklearn")
        if spec is None or spec.origin is None:
            raise ValueError(f"images.source={DIGITS}: pip install scikit-learn, which has them")
        path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        with gzip.open(path, "rt") as file:
            table = np.array([[float(x) for x in row] for row in csv.reader(file)])
        held_out = np.array([mixed(i) % HELD_OUT_OF == 0 for i in range(len(table))])
        table = table[held_out == (split == "validation")]
        grey = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        self._images, self._labels = grey.repeat(3, axis=3), table[:, -1].astype(np.int32)
        self._split = split
        self.fingerprint = hashlib.sha256(table.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]))

    def name(self, index: int) -> str:
        return f"{DIGITS}/{self._split}, image {index}"
