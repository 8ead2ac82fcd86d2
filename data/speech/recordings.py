"""Recordings with their transcripts: LibriSpeech's folders of FLAC, TFDS, and made-up tones.

    DIR                                     *.trans.txt, lines of NAME TEXT, beside NAME.flac
    tfds:librispeech:2.1.1@dev_clean        a prepared set and its split, or a+b of several
    tones:300                               that many, made up: nothing is read
    tones:300@1                             others, by another seed

A folder is read with soundfile (requirements-speech.txt). A source is a list of parts, in an order
of its own that is the same every time, so that a preparation that was stopped goes on with the part
that it was at. What cannot be read comes as `Broken`.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.sources.parts import Broken
from data.speech import tones
from data.speech.features import SAMPLE_RATE
from data.tfds_sets import TFDS, open_builder

TONES = "tones:"
AT_A_TIME = 1000  # made-up recordings, or examples of TFDS, in a part


class Recording(NamedTuple):
    """Its name within the source, (samples,) int16 at 16 kHz, and what is said in it."""

    name: str
    audio: np.ndarray
    text: str


class Part(NamedTuple):
    """A piece of a source.

    Attributes:
      name: where it is.
      content: tells it from a part of other recordings, wherever it lies.
      seen: what also differs where its files were written anew.
      read: gives its recordings.
    """

    name: str
    content: str
    seen: str
    read: Callable[[], Iterable[Recording | Broken]]


def parts(source: str) -> list[Part]:
    """All parts of a source. Raises ValueError if it is none."""
    if source.startswith(TONES):
        return _tones(source)
    if source.startswith(TFDS):
        return _tfds(source)
    return _folder(source)


def _tones(source: str) -> list[Part]:
    count, _, seed = source.removeprefix(TONES).partition("@")
    if not count.isdigit() or not (seed or "0").isdigit():
        raise ValueError(f"source={source}: write {TONES}COUNT or {TONES}COUNT@SEED")

    def made(numbers: range) -> Iterator[Recording]:
        for i in numbers:
            yield Recording(f"{source} {i}", *tones.recording(int(seed or 0), i))

    return [
        Part(f"{source} {numbers}", "", "", functools.partial(made, numbers))
        for numbers in _ranges(int(count))
    ]


def _ranges(count: int) -> list[range]:
    starts = range(0, count, AT_A_TIME)
    return [range(start, min(start + AT_A_TIME, count)) for start in starts]


def _folder(folder: str) -> list[Part]:
    """A part for each chapter."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"source={folder}: no such folder; write DIR, {TFDS}NAME:VERSION@SPLIT or {TONES}COUNT"
        )
    listings = sorted(Path(folder).rglob("*.trans.txt"))
    if not listings:
        raise ValueError(
            f"source={folder}: no *.trans.txt in it, which has the transcripts; unpack LibriSpeech "
            "as it comes"
        )
    return [_chapter(listing) for listing in listings]


def _chapter(listing: Path) -> Part:
    """Its files are looked at, and not into: their names, sizes, and when they were written."""
    content, seen = hashlib.sha256(listing.read_bytes()), hashlib.sha256()
    for entry in sorted(os.scandir(listing.parent), key=lambda entry: entry.name):
        if entry.name.endswith(".flac"):
            status = entry.stat()
            content.update(f"{entry.name} {status.st_size}\n".encode())
            seen.update(f"{status.st_mtime_ns}\n".encode())
    said = content.hexdigest()
    read = functools.partial(_read_chapter, listing)
    return Part(str(listing), said, f"{said} {seen.hexdigest()}", read)


def _read_chapter(listing: Path) -> Iterator[Recording | Broken]:
    for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip():
            name, _, text = line.partition(" ")
            yield _flac(listing.parent / f"{name}.flac", text)


def _flac(path: Path, text: str) -> Recording | Broken:
    import soundfile

    if not path.is_file():
        return Broken("without its file", f"{path}: no such file, and there is a transcript of it")
    try:
        audio, rate = soundfile.read(path, dtype="int16")
    except (soundfile.LibsndfileError, RuntimeError) as error:
        return Broken("unreadable", f"{path}: {error}")
    if rate != SAMPLE_RATE or audio.ndim != 1:
        channels = 1 if audio.ndim == 1 else audio.shape[1]
        return Broken(
            "of another format",
            f"{path}: {rate} Hz, {channels} channels; {SAMPLE_RATE} Hz and one are read",
        )
    return Recording(str(path), audio, text)


def _tfds(source: str) -> list[Part]:
    dataset, _, splits = source.removeprefix(TFDS).partition("@")
    if not splits:
        raise ValueError(f"source={source}: write {TFDS}NAME:VERSION@SPLIT")
    builder = open_builder(dataset, splits.split("+"), "source")
    found = []
    for split in splits.split("+"):
        info = builder.info.splits[split]
        content = f"{builder.info.full_name} {info.num_examples} {info.num_bytes}"
        for numbers in _ranges(info.num_examples):
            name = f"{split}[{numbers.start}:{numbers.stop}]"
            examples = functools.partial(_examples, builder, name)
            found.append(Part(f"{dataset} {name}", content, content, examples))
    return found


def _examples(builder, split: str) -> Iterator[Recording]:
    import tensorflow_datasets as tfds

    once = tfds.ReadConfig(try_autocache=False)
    dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=once)
    for example in tfds.as_numpy(dataset):
        audio = np.asarray(example["speech"]).astype(np.int16)
        yield Recording(example["id"].decode(), audio, example["text"].decode())
