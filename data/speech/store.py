"""A folder of prepared speech: audio and tokenised transcripts, one memory-mapped file each.

manifest.json    sealed: tokenizer, counts, checksums, and what normalises the features
tokenizer.model
train.audio      int16, little-endian: the samples of one recording after the other, 16 kHz
train.labels     int32, little-endian: token ids of one transcript after the other, each with EOS
train.index      int64, little-endian, four of a recording: first sample, samples, first label,
                 labels
validation.*     the same
test.*           the same, if there are further recordings to evaluate on
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data.addresses import is_address
from data.reading.manifest import check_sha256, read_sealed
from data.sealed import checksum, file_sha256
from data.speech.features import log_mel
from data.tokenizer import Tokenizer

FORMAT = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.model"
SPLITS = ("train", "validation", "test")  # the last one where there is one
DTYPES = {"audio": "<i2", "labels": "<i4", "index": "<i8"}
VERIFIED_BYTES = 2**34  # of audio; more would keep every host busy for minutes at every start
AGAIN = "delete the folder and run scripts/prepare_speech.py again"


class Split:
    """Recordings of one split, by their numbers.

    Attributes:
      tokenizer: of the labels.
      longest: (samples, labels) of the longest recording and of the longest transcript.
    """

    def __init__(self, folder: Path, name: str, manifest: dict[str, Any], tokenizer: Tokenizer):
        arrays = [np.memmap(folder / f"{name}.{part}", DTYPES[part], "r") for part in DTYPES]
        self._audio, self._labels, index = arrays
        self._index = index.reshape(-1, 4)
        self.tokenizer = tokenizer
        self._mean = np.array(manifest["mean"], np.float32)
        self._deviation = np.array(manifest["deviation"], np.float32)
        self.longest = tuple(self._index[:, [1, 3]].max(axis=0).tolist())

    def __len__(self) -> int:
        return len(self._index)

    def audio(self, number: int) -> np.ndarray:
        """(samples,) int16."""
        start, count, _, _ = self._index[number]
        return self._audio[start : start + count]

    def features(self, number: int) -> np.ndarray:
        """(frames, MEL_BINS) float32: log-mel of mean 0 and variance 1 over the train split."""
        features = log_mel(self.audio(number))
        features -= self._mean
        features /= self._deviation
        return features

    def labels(self, number: int) -> np.ndarray:
        """(labels,) int32, the last one EOS."""
        _, _, start, count = self._index[number]
        return self._labels[start : start + count]

    def text(self, number: int) -> str:
        """The transcript."""
        return self.tokenizer.decode(self.labels(number))


class SpeechStore:
    """A finished store.

    Attributes:
      fingerprint: equal for equal recordings, transcripts and tokenizer, as hex digits.
      tokenizer, tokenizer_path: of the labels.
      train, validation: the splits.
      test: further recordings, or None.
    """

    def __init__(self, path: str | Path):
        """Opens a folder: checks the sizes of all files, and the content of tokenizer, labels and
        index, and that of the audio where it has up to 16 GiB.

        Raises ValueError if there is no finished store, or a file differs from the manifest.
        """
        if is_address(path):
            raise ValueError(
                f"data.store={str(path)!r}: speech is read from folders alone; copy the store to a "
                "disk, or mount the bucket"
            )
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            raise ValueError(
                f"data.store={str(path)!r}: no finished store of speech ({MANIFEST} is missing); "
                "run scripts/prepare_speech.py"
            )
        manifest = read_sealed(folder / MANIFEST, AGAIN)
        if manifest.get("format") != f"speech, {FORMAT}":
            raise ValueError(
                f"data.store={str(path)!r}: format={manifest.get('format')!r}, this code reads "
                f"'speech, {FORMAT}'; {AGAIN}"
            )
        for name, size in manifest["sizes"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise ValueError(f"{folder / name}: is not of {size} bytes; {AGAIN}")
        _verify(folder, manifest)
        self.tokenizer_path = str(folder / TOKENIZER)
        self.tokenizer = Tokenizer(self.tokenizer_path)
        self.fingerprint = checksum([manifest[key] for key in ("sha256s", "mean", "deviation")])
        splits = {
            name: Split(folder, name, manifest, self.tokenizer) for name in manifest["splits"]
        }
        self.train, self.validation = splits["train"], splits["validation"]
        self.test = splits.get("test")


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError for a file whose content is not that of its checksum."""
    sizes, expected = manifest["sizes"], manifest["sha256s"]
    audio = {name for name in sizes if name.endswith(".audio")}
    is_large = sum(sizes[name] for name in audio) > VERIFIED_BYTES
    names = sorted(sizes.keys() - (audio if is_large else set()))
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        list(pool.map(lambda name: check_sha256(folder / name, expected[name], AGAIN), names))


def checksums(folder: Path, splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Sizes and SHA-256 of a store's files, for its manifest."""
    paths = [folder / f"{split}.{part}" for split in splits for part in DTYPES]
    paths.append(folder / TOKENIZER)
    return {
        "sizes": {path.name: path.stat().st_size for path in paths},
        "sha256s": {path.name: file_sha256(path) for path in paths},
    }
