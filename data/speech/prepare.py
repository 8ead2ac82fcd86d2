"""From recordings to a store of speech, see store.py.

The folder gets its name when it is whole; until then it is NAME.partial. There the audio is written
part by part (recordings.py), and what was taken of a part is recorded in the folder `progress`:
stopped at any moment and started again, the preparation goes on behind the last part that was
finished, and the store comes out the same to the byte. The audio alone takes long; all else is made
at the end.

Recordings and transcripts of lengths that are not wanted are left out and counted, as the recipe
has it. What is broken is named, counted and skipped, up to a limit.
"""

import dataclasses
import itertools
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data import atomic
from data.preparation.prepare import (
    PROGRESS,
    REQUEST,
    alone_in,
    check_files,
    check_same,
    goes_on,
)
from data.preparation.shards import (
    SHOWN,
    Counts,
    Record,
    broken_records,
    check_broken,
    write_json,
)
from data.reading.files import folder_to_write
from data.reading.manifest import read_sealed
from data.sealed import checksum
from data.sources.parts import Broken
from data.speech import recordings
from data.speech.features import MEL_BINS, SAMPLE_RATE, log_mel, num_frames
from data.speech.store import AGAIN, DTYPES, FORMAT, MANIFEST, SPLITS, TOKENIZER, checksums
from data.tokenizer import Tokenizer, train_tokenizer

log = logging.getLogger(__name__)

SAMPLE_BYTES = 10**7  # of transcripts that a vocabulary is trained on, as AlgoPerf
NORMALISED_BY = 2000  # recordings, all over the train split
SUBSAMPLING = 4  # frames of a position, of which CTC needs one for every label


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
    """What a store is made of.

    Attributes:
      train, validation: sources as in recordings.py, several separated by commas.
      test: further ones to evaluate on; "" for none.
      vocab_size: trains a tokenizer of this size on the train split. Either this or `tokenizer`.
      tokenizer: an existing SentencePiece model.
      max_seconds: of a recording; longer ones are left out.
      max_characters: of a transcript; longer ones are left out.
      max_broken: records of each split that may be broken; they are counted and skipped.
    """

    train: str
    validation: str
    test: str = ""
    vocab_size: int | None = None
    tokenizer: str | None = None
    max_seconds: float = 20.0
    max_characters: int = 256
    max_broken: int = 0

    def __post_init__(self):
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise ValueError(
                f"vocab_size={self.vocab_size}, tokenizer={self.tokenizer}: give one of the two"
            )
        for name in ("max_seconds", "max_characters"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")

    @property
    def sources(self) -> dict[str, str]:
        """Split → its sources."""
        named = {name: getattr(self, name) for name in SPLITS}
        return {name: sources for name, sources in named.items() if sources or name != "test"}

    def request(self, parts: dict[str, list[recordings.Part]]) -> Record:
        """What a store must have been asked for to be the same as this one."""
        content = {name: checksum([part.content for part in parts[name]]) for name in parts}
        return {
            "source": self.sources | {f"content of {name}": said for name, said in content.items()},
            "vocab_size": self.vocab_size,
            "tokenizer_sha256": Tokenizer(self.tokenizer).sha256 if self.tokenizer else None,
            "max_seconds": self.max_seconds,
            "max_characters": self.max_characters,
        }

    def parts(self) -> dict[str, list[recordings.Part]]:
        """The parts of the sources of each split. Raises ValueError where one is none."""
        return {
            name: list(itertools.chain.from_iterable(map(recordings.parts, sources.split(","))))
            for name, sources in self.sources.items()
        }


def prepare(config: SpeechConfig, output: str | Path) -> dict[str, Any]:
    """Writes a store, or goes on with one, or does nothing if it is there already.

    Args:
      config: what the store is made of. An unfinished one may go on with another `max_broken`.
      output: the folder to write.

    Returns:
      The manifest.

    Raises:
      ValueError: the folder is another one, or is being written by another process, or sources or
        tokenizer are not what they should be.
    """
    folder = folder_to_write(output)
    parts = config.parts()
    request = config.request(parts)
    if folder.exists():
        return _finished(folder, request, config.max_broken)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with alone_in(partial, f"{partial}: another process is writing it; wait for it"):
        if not (partial / MANIFEST).exists():  # else it was stopped just before its end
            seen = _seen(parts)
            _begin(partial, request, seen)
            manifest = _write(config, parts, partial)
            check_files(partial, seen, _seen(config.parts()), "while they were read")
            write_json(partial / MANIFEST, {**manifest, "request": request})
        finished = _finished(partial, request, config.max_broken)
        shutil.rmtree(partial / PROGRESS, ignore_errors=True)
        partial.rename(folder)
        atomic.sync(folder.absolute().parent)
    return finished


def _seen(parts: dict[str, list[recordings.Part]]) -> dict[str, str]:
    return {f"{name}: {part.name}": part.seen for name in parts for part in parts[name]}


def _finished(folder: Path, request: Record, max_broken: int) -> Record:
    """The manifest. Raises ValueError if the folder is not the store that was asked for."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"output={folder}: is there already and no store; choose another name")
    manifest = read_sealed(folder / MANIFEST, AGAIN)
    if "request" not in manifest:
        raise ValueError(f"output={folder}: is there already; choose another name, or delete it")
    check_same(folder, manifest["request"], request)
    for name, split in manifest["splits"].items():
        if (broken := sum(split["broken"].values())) > max_broken:
            raise ValueError(
                f"max_broken={max_broken}: {folder} is complete and lacks {broken} broken "
                f"recordings of {name}; allow as many, or mend them and choose another folder"
            )
    return manifest


def _begin(partial: Path, request: Record, seen: dict[str, str]) -> None:
    """Checks that the folder was begun with this request and these very files, or empties it.

    One without a finished part, of another request, is begun anew.
    """
    progress = partial / PROGRESS
    if goes_on(partial, request, seen, f"{PROGRESS}/*-*.json", f"delete {partial}"):
        return
    for path in partial.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    progress.mkdir()
    write_json(progress / REQUEST, {"request": request, "files": seen})


def _write(config: SpeechConfig, parts: dict[str, list[recordings.Part]], partial: Path) -> Record:
    """All files but the manifest, which it returns."""
    splits = {name: _Split(partial, name) for name in parts}
    for name, split in splits.items():
        split.write_audio(parts[name], config)
    (partial / TOKENIZER).unlink(missing_ok=True)
    if config.tokenizer is None:
        assert config.vocab_size is not None
        train_tokenizer(
            splits["train"].texts,
            partial / TOKENIZER,
            config.vocab_size,
            sample_bytes=SAMPLE_BYTES,
            byte_fallback=False,
        )
    else:
        shutil.copyfile(config.tokenizer, partial / TOKENIZER)
    tokenizer = Tokenizer(partial / TOKENIZER)
    for split in splits.values():
        split.write_labels(tokenizer, config.max_broken)
    mean, deviation = splits["train"].normalisation()
    return {
        "format": f"speech, {FORMAT}",
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
        "splits": {name: split.summary() for name, split in splits.items()},
        **checksums(partial, splits),
    }


class _Split:
    """One split of a store that is being written."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.texts: list[str] = []
        self._folder = folder
        self._paths = {part: folder / f"{name}.{part}" for part in DTYPES}
        self._names: list[str] = []
        self._places: list[tuple[int, int]] = []  # first sample, samples
        self._left_out: dict[str, int] = {}
        self._broken: Record = {"broken": {}, "messages": []}
        self._samples = 0

    def write_audio(self, parts: Sequence[recordings.Part], config: SpeechConfig) -> None:
        """All recordings that are wanted, and are not there yet. Raises ValueError if there are
        none, or many broken."""
        records = [self._folder / PROGRESS / f"{self.name}-{i:05d}.json" for i in range(len(parts))]
        done = list(itertools.takewhile(Path.exists, records))
        for path in done:
            self._add(read_sealed(path, f"delete {self._folder}"), config.max_broken)
        if done:
            log.info("%s: going on after %d of %d parts", self.name, len(done), len(parts))
        with self._paths["audio"].open("ab") as file:
            size = self._samples * np.dtype(DTYPES["audio"]).itemsize
            if file.tell() < size:
                raise ValueError(f"{self._paths['audio']}: was cut off; delete {self._folder}")
            file.truncate(size)  # what a part that was not finished has left
            for path, part in zip(records[len(done) :], parts[len(done) :], strict=True):
                record = self._write_part(file, part, config)
                file.flush()
                os.fsync(file.fileno())
                write_json(path, record)
                self._add(record, config.max_broken)
        if not self.texts:
            raise ValueError(f"{self.name}={getattr(config, self.name)}: no recording in it")

    def _add(self, record: Record, max_broken: int) -> None:
        """What is recorded of a part. Raises ValueError if too many recordings are broken."""
        for samples in record["samples"]:
            self._places.append((self._samples, samples))
            self._samples += samples
        self.texts += record["texts"]
        self._names += record["names"]
        for why, count in record["left_out"].items():
            self._left_out[why] = self._left_out.get(why, 0) + count
        self._add_broken(record, max_broken)

    def _add_broken(self, record: Record, max_broken: int) -> None:
        check_broken([self._broken, record], max_broken)
        messages = [*self._broken["messages"], *record["messages"]][:SHOWN]
        broken = broken_records([self._broken, record])
        self._broken = {"broken": broken, "messages": messages}

    def _write_part(self, file: BinaryIO, part: recordings.Part, config: SpeechConfig) -> Record:
        """Its audio, and what is recorded of it."""
        counts = Counts()
        left_out: dict[str, int] = {}
        record: Record = {"names": [], "texts": [], "samples": []}
        for found in part.read():
            checked = _checked(found) if isinstance(found, recordings.Recording) else found
            if isinstance(checked, Broken):
                log.warning("%s skipped: %s", self.name, checked.message)
                counts.add(checked, config.max_broken)
                check_broken([self._broken, vars(counts)], config.max_broken)
            elif why := _unwanted(checked, config):
                left_out[why] = left_out.get(why, 0) + 1
            else:
                file.write(checked.audio.astype(DTYPES["audio"]).tobytes())
                record["names"].append(checked.name)
                record["texts"].append(checked.text)
                record["samples"].append(len(checked.audio))
        broken = {"broken": counts.broken, "messages": counts.messages}
        return {**record, **broken, "left_out": left_out}

    def write_labels(self, tokenizer: Tokenizer, max_broken: int) -> None:
        """Labels and index of the recordings whose transcripts the tokenizer can write."""
        first, index = 0, []
        with self._paths["labels"].open("wb") as file:
            for name, text, place in zip(self._names, self.texts, self._places):
                labels = [*tokenizer.encode(text), tokenizer.eos_id]
                if broken := _unwritable(name, text, labels, place[1], tokenizer):
                    log.warning("%s skipped: %s", self.name, broken.message)
                    one = {"broken": {broken.kind: 1}, "messages": [broken.message]}
                    self._add_broken(one, max_broken)
                    continue
                file.write(np.array(labels, DTYPES["labels"]).tobytes())
                index.append((*place, first, len(labels)))
                first += len(labels)
        if not index:
            raise ValueError(f"{self.name}: the tokenizer can write none of its transcripts")
        self._index = np.array(index, DTYPES["index"])
        self._paths["index"].write_bytes(self._index.tobytes())

    def normalisation(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of every bin, (MEL_BINS,) float64, over a sample of it."""
        audio = np.memmap(self._paths["audio"], DTYPES["audio"], "r")
        sums, squares, count = np.zeros(MEL_BINS), np.zeros(MEL_BINS), 0
        step = -(-len(self._index) // NORMALISED_BY)
        for start, samples, _, _ in self._index[::step]:
            features = log_mel(audio[start : start + samples]).astype(np.float64)
            count += len(features)
            sums += features.sum(axis=0)
            squares += np.square(features).sum(axis=0)
        mean = sums / count
        return mean, np.sqrt(np.maximum(squares / count - np.square(mean), 1e-6))

    def summary(self) -> dict[str, Any]:
        """What the manifest says of the split."""
        samples, labels = self._index[:, [1, 3]].sum(axis=0).tolist()
        return {
            "recordings": len(self._index),
            "seconds": samples / SAMPLE_RATE,
            "labels": labels,
            "left_out": self._left_out,
            **self._broken,
        }


def _unwanted(record: recordings.Recording, config: SpeechConfig) -> str:
    """Why a recording is left out, or nothing."""
    if len(record.audio) > config.max_seconds * SAMPLE_RATE:
        return f"longer than {config.max_seconds:g} s"
    if len(record.text) > config.max_characters:
        return f"of more than {config.max_characters} characters"
    return ""


def _checked(record: recordings.Recording) -> recordings.Recording | Broken:
    """The recording, its blanks only those that separate words; or why it is of no use."""
    text = " ".join(record.text.split())
    if not len(record.audio):
        return Broken("of no length", f"{record.name}: a recording of no length")
    if not text:
        return Broken("without a word", f"{record.name}: its transcript is empty")
    return record._replace(text=text)


def _unwritable(
    name: str, text: str, labels: Sequence[int], samples: int, tokenizer: Tokenizer
) -> Broken | None:
    """What keeps CTC from learning a transcript."""
    if tokenizer.decode(labels) != text:
        lost = [c for c in sorted(set(text)) if tokenizer.decode(tokenizer.encode(c)) != c]
        letters = ", ".join(map(repr, lost)) or "spaces"
        return Broken(
            "with letters outside of the vocabulary",
            f"{name}: {letters} of {text[:60]!r} outside of the vocabulary",
        )
    # A blank must lie between equal labels.
    needed = len(labels) + sum(a == b for a, b in itertools.pairwise(labels))
    positions = -(-num_frames(samples) // SUBSAMPLING)
    if needed > positions:
        return Broken(
            "too short for its transcript",
            f"{name}: {positions} positions of {SUBSAMPLING / 100} s, and CTC needs {needed} for "
            f"{text[:60]!r}",
        )
    return None
