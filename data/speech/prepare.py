"""From recordings to a store of speech, see store.py.

The folder gets its name when it is whole; until then it has another one, and what a stopped
preparation left is begun anew. Recordings and transcripts of lengths that are not wanted are left
out and counted, as the recipe has it. What is broken is named, counted and skipped, up to a limit.
"""

import dataclasses
import itertools
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.preparation.shards import Counts, sync, write_json
from data.sources.parts import Broken
from data.speech import recordings
from data.speech.features import MEL_BINS, SAMPLE_RATE, log_mel, num_frames
from data.speech.store import DTYPES, FORMAT, MANIFEST, SPLITS, TOKENIZER, checksums
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
      vocab_size: trains a tokenizer of this size on the train split. Either this or `tokenizer`.
      tokenizer: an existing SentencePiece model.
      max_seconds: of a recording; longer ones are left out.
      max_characters: of a transcript; longer ones are left out.
      max_broken: records of each split that may be broken; they are counted and skipped.
    """

    train: str
    validation: str
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


def prepare(config: SpeechConfig, output: str | Path) -> dict[str, Any]:
    """Writes a store. Returns its manifest.

    Raises:
      ValueError: the folder is there, or sources or tokenizer are not what they should be.
    """
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"output={output}: is there already; choose another name, or delete it")
    tokenizer = Tokenizer(config.tokenizer) if config.tokenizer else None
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    splits = {}
    for name, sources in zip(SPLITS, (config.train, config.validation)):
        splits[name] = _Split(partial, name)
        splits[name].write_audio(sources.split(","), config)
    if tokenizer is None:
        assert config.vocab_size is not None
        train_tokenizer(
            splits["train"].texts,
            partial / TOKENIZER,
            config.vocab_size,
            sample_bytes=SAMPLE_BYTES,
            byte_fallback=False,
        )
        tokenizer = Tokenizer(partial / TOKENIZER)
    else:
        assert config.tokenizer is not None
        shutil.copyfile(config.tokenizer, partial / TOKENIZER)
    for split in splits.values():
        split.write_labels(tokenizer, config.max_broken)
    mean, deviation = splits["train"].normalisation()
    manifest = {
        "format": f"speech, {FORMAT}",
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
        "splits": {name: split.summary() for name, split in splits.items()},
        **checksums(partial),
    }
    write_json(partial / MANIFEST, manifest)
    partial.rename(folder)
    sync(folder.absolute().parent)
    return manifest


class _Split:
    """Of a store that is being written."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.texts: list[str] = []
        self._paths = {part: folder / f"{name}.{part}" for part in DTYPES}
        self._names: list[str] = []
        self._places: list[tuple[int, int]] = []  # first sample, samples
        self._left_out: dict[str, int] = {}
        self._counts = Counts()

    def write_audio(self, sources: Sequence[str], config: SpeechConfig) -> None:
        """All recordings that are wanted. Raises ValueError if there are none, or many broken."""
        first = 0
        with self._paths["audio"].open("wb") as file:
            for recording in self._wanted(sources, config):
                file.write(recording.audio.astype(DTYPES["audio"]).tobytes())
                self._places.append((first, len(recording.audio)))
                self.texts.append(recording.text)
                self._names.append(recording.name)
                first += len(recording.audio)
        if not self.texts:
            raise ValueError(f"{self.name}={','.join(sources)}: no recording in it")

    def _wanted(
        self, sources: Sequence[str], config: SpeechConfig
    ) -> Iterator[recordings.Recording]:
        for source in sources:
            for record in recordings.read(source):
                if isinstance(record, recordings.Recording):
                    record = _checked(record)
                if isinstance(record, Broken):
                    self._skip(record, config.max_broken)
                elif len(record.audio) > config.max_seconds * SAMPLE_RATE:
                    self._leave_out(f"longer than {config.max_seconds:g} s")
                elif len(record.text) > config.max_characters:
                    self._leave_out(f"of more than {config.max_characters} characters")
                else:
                    yield record

    def _leave_out(self, why: str) -> None:
        self._left_out[why] = self._left_out.get(why, 0) + 1

    def _skip(self, broken: Broken, limit: int) -> None:
        log.warning("%s skipped: %s", self.name, broken.message)
        self._counts.add(broken, limit)

    def write_labels(self, tokenizer: Tokenizer, max_broken: int) -> None:
        """Labels and index of the recordings whose transcripts the tokenizer can write."""
        first, index = 0, []
        with self._paths["labels"].open("wb") as file:
            for name, text, place in zip(self._names, self.texts, self._places):
                labels = [*tokenizer.encode(text), tokenizer.eos_id]
                if broken := _unwritable(name, text, labels, place[1], tokenizer):
                    self._skip(broken, max_broken)
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
        """For the manifest."""
        samples, labels = self._index[:, [1, 3]].sum(axis=0).tolist()
        return {
            "recordings": len(self._index),
            "seconds": samples / SAMPLE_RATE,
            "labels": labels,
            "left_out": self._left_out,
            "broken": self._counts.broken,
            "messages": self._counts.messages,
        }


def _checked(record: recordings.Recording) -> recordings.Recording | Broken:
    """With blanks that separate words and do no more."""
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
