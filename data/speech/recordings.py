"""Recordings with their transcripts: LibriSpeech's folders of FLAC, TFDS, and made-up tones.

    DIR                                     *.trans.txt, lines of NAME TEXT, beside NAME.flac
    tfds:librispeech:2.1.1@dev_clean        a prepared set and its split, or a+b of several
    tones:300                               that many, made up: nothing is read
    tones:300@1                             others, by another seed

A folder is read with soundfile (requirements-speech.txt). Each source yields its recordings in an
order of its own, the same every time; what cannot be read comes as `Broken`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.sources.parts import Broken
from data.speech import tones
from data.speech.features import SAMPLE_RATE

TFDS, TONES = "tfds:", "tones:"


class Recording(NamedTuple):
    """Its name within the source, (samples,) int16 at 16 kHz, and what is said in it."""

    name: str
    audio: np.ndarray
    text: str


def read(source: str) -> Iterator[Recording | Broken]:
    """All recordings of a source. Raises ValueError if it is none."""
    if source.startswith(TONES):
        return _tones(source)
    if source.startswith(TFDS):
        return _tfds(source)
    return _folder(source)


def _tones(source: str) -> Iterator[Recording]:
    count, _, seed = source.removeprefix(TONES).partition("@")
    if not count.isdigit() or not (seed or "0").isdigit():
        raise ValueError(f"source={source}: write {TONES}COUNT or {TONES}COUNT@SEED")
    for i in range(int(count)):
        yield Recording(f"{source} {i}", *tones.recording(int(seed or 0), i))


def _folder(folder: str) -> Iterator[Recording | Broken]:
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
    for listing in listings:
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


def _tfds(source: str) -> Iterator[Recording]:
    import tensorflow_datasets as tfds

    dataset, _, split = source.removeprefix(TFDS).partition("@")
    if not split:
        raise ValueError(f"source={source}: write {TFDS}NAME:VERSION@SPLIT")
    try:
        builder = tfds.builder(dataset, data_dir=os.environ.get("TFDS_DATA_DIR"))
        examples = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"source={source}: {first}; build it with `tfds build {dataset}`, and point "
            "TFDS_DATA_DIR to where it is"
        ) from error
    for example in examples:
        audio = np.asarray(example["speech"]).astype(np.int16)
        yield Recording(example["id"].decode(), audio, example["text"].decode())
