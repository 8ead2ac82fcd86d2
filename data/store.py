"""Reads a token store: a folder of flat token shards and a manifest, written by data/prepare.py.

    manifest.json        what the store holds: counts and checksums of every shard
    tokenizer.model      SentencePiece
    train-00000.bin      little-endian uint16 (uint32 where the vocabulary needs it)
    train-00000.offsets  little-endian uint64: where in the .bin each document begins

A split is one long stream: EOS, then every document followed by EOS. Row i of length L is
tokens[i·L : (i+1)·L + 1], so neighbours share one token, any L works without preparing again, and
every token but the leading EOS is a target exactly once. Shards are memory-mapped when they are
first read, from a local disk or a mounted bucket; neither jax nor TensorFlow is imported.
"""

import functools
import hashlib
import json
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
OFFSETS, OFFSET_DTYPE = ".offsets", np.dtype("<u8")
OTHER_FILES = 256  # that a process may have open besides two for every shard
THREADS = 16  # a mounted bucket answers late, but many at a time
# Larger stores would keep every host busy for minutes at every start: they are hashed by `verify`.
VERIFIED_BYTES = 2**34


class TokenStore:
    """An opened store.

    Attributes:
      path: the folder.
      tokenizer_path: its SentencePiece model.
      vocab_size, eos_id, pad_id: of that tokenizer.
      fingerprint: SHA-256 over the tokenizer's and all shards' checksums, as hex digits. Equal
        fingerprints mean equal rows, wherever the store lies.
    """

    def __init__(self, path: str | Path):
        """Opens the store and checks the sizes of its files, and up to 16 GiB also their content.

        Args:
          path: folder written by scripts/prepare_data.py.

        Raises:
          ValueError: no store there, not a finished one, or a file differs from the manifest.
        """
        self.path = Path(path)
        self._manifest = _read_manifest(self.path)
        self.tokenizer_path = str(self.path / TOKENIZER)
        self.vocab_size: int = self._manifest["vocab_size"]
        self.eos_id: int = self._manifest["eos_id"]
        self.pad_id: int = self._manifest["pad_id"]
        self.fingerprint = _fingerprint(self._manifest)
        sizes = self._file_sizes()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: _check_size(self.path / name, sizes[name]), sizes))
        if sum(sizes.values()) <= VERIFIED_BYTES:
            self.verify()
        _allow_open_files(len(sizes) + OTHER_FILES)
        self._splits = {
            name: Split(self.path, record, self._manifest["dtype"])
            for name, record in self._manifest["splits"].items()
        }

    def split(self, name: str) -> "Split":
        """The rows of "train" or "validation"."""
        if name not in self._splits:
            raise ValueError(f"{self.path} has no split {name!r}, only {', '.join(self._splits)}")
        return self._splits[name]

    def verify(self) -> None:
        """Compares every file's SHA-256. Raises ValueError for one that differs."""
        expected = {TOKENIZER: self._manifest["tokenizer_sha256"]}
        for shard in self._shards():
            expected[shard["file"]] = shard["sha256"]
            expected[_offsets_file(shard)] = shard["offsets_sha256"]
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            list(pool.map(lambda name: _check_sha256(self.path / name, expected[name]), expected))

    def _shards(self) -> list[dict[str, Any]]:
        return [s for split in self._manifest["splits"].values() for s in split["shards"]]

    def _file_sizes(self) -> dict[str, int]:
        """File → its size in bytes."""
        token_size = np.dtype(self._manifest["dtype"]).itemsize
        tokens = {s["file"]: s["tokens"] * token_size for s in self._shards()}
        offset_size = OFFSET_DTYPE.itemsize
        return tokens | {_offsets_file(s): s["documents"] * offset_size for s in self._shards()}


class Split:
    """One split as a stream of tokens cut into rows.

    Attributes:
      num_tokens: of the whole stream, all EOS included. The first one is never a target.
      num_documents: documents in it.
      num_bytes: of their text in UTF-8, without anything for the EOS between them.
    """

    def __init__(self, folder: Path, record: dict[str, Any], dtype: str):
        self.num_tokens: int = record["tokens"]
        self.num_documents: int = record["documents"]
        self.num_bytes: int = record["bytes"]
        self._shards = [Shard(folder, shard, dtype) for shard in record["shards"]]
        self._ends = np.cumsum([shard.num_tokens for shard in self._shards])
        self._document_ends = np.cumsum([shard.num_documents for shard in self._shards])

    def num_rows(self, seq_len: int, partial: bool = False) -> int:
        """Rows of `seq_len` targets; `partial` counts a shorter one at the end, too."""
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}: must be at least 1")
        targets = self.num_tokens - 1
        return -(-targets // seq_len) if partial else targets // seq_len

    def rows(self, ids: Sequence[int] | np.ndarray, seq_len: int) -> np.ndarray:
        """Whole rows.

        Returns:
          (len(ids), seq_len + 1) int32: one token more than there are targets.

        Raises:
          ValueError: an id is not in [0, num_rows(seq_len)).
        """
        return self._read(ids, seq_len, self.num_rows(seq_len), 0)[0]

    def padded_rows(
        self, ids: Sequence[int] | np.ndarray, seq_len: int, pad_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows that may include the shorter one at the end, filled up with `pad_id`.

        Returns:
          (len(ids), seq_len + 1) int32, and (len(ids),) int64: the targets of each row that are
          real; they come first.

        Raises:
          ValueError: an id is not in [0, num_rows(seq_len, partial=True)).
        """
        return self._read(ids, seq_len, self.num_rows(seq_len, partial=True), pad_id)

    def document(self, number: int) -> np.ndarray:
        """Tokens of a document, without EOS, as (length,) int32; numbers count from 0.

        Raises:
          ValueError: there is no such document.
        """
        if not 0 <= number < self.num_documents:
            raise ValueError(f"document {number}: the split has {self.num_documents}, from 0")
        index = int(np.searchsorted(self._document_ends, number, side="right"))
        shard = self._shards[index]
        bounds = shard.bounds()
        local = number - (int(self._document_ends[index]) - shard.num_documents)
        return shard.tokens[bounds[local] : bounds[local + 1] - 1].astype(np.int32)

    def document_at(self, position: int) -> int:
        """Number of the document that a token of the stream belongs to, its EOS included; -1 for
        the leading EOS."""
        if not 0 <= position < self.num_tokens:
            raise ValueError(f"position {position}: the split has {self.num_tokens} tokens, from 0")
        index = int(np.searchsorted(self._ends, position, side="right"))
        shard = self._shards[index]
        local = position - (int(self._ends[index]) - shard.num_tokens)
        before = int(self._document_ends[index]) - shard.num_documents
        return before + int(np.searchsorted(shard.offsets, local, side="right")) - 1

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document, without EOS: an array (documents,) int64 for every shard."""
        return (np.diff(shard.bounds()) - 1 for shard in self._shards)

    def _read(
        self, ids: Sequence[int] | np.ndarray, seq_len: int, num_rows: int, pad_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= num_rows):
            raise ValueError(
                f"row ids from {ids.min()} to {ids.max()}: the split has {num_rows} rows of "
                f"{seq_len} tokens, counted from 0"
            )
        starts = ids * seq_len
        rows = np.full((len(ids), seq_len + 1), pad_id, np.int32)
        for row, start in zip(rows, starts):
            self._copy(int(start), row)
        return rows, np.minimum(self.num_tokens - 1 - starts, seq_len)

    def _copy(self, start: int, row: np.ndarray) -> None:
        """Fills `row` from the stream, over the ends of shards, up to the end of the stream."""
        index, filled = int(np.searchsorted(self._ends, start, side="right")), 0
        while filled < len(row) and index < len(self._shards):
            shard = self._shards[index]
            offset = start + filled - (int(self._ends[index]) - shard.num_tokens)
            piece = shard.tokens[offset : offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1


class Shard:
    """One shard, whose files are mapped when they are first read, and stay so."""

    def __init__(self, folder: Path, record: dict[str, Any], dtype: str):
        self.num_tokens: int = record["tokens"]
        self.num_documents: int = record["documents"]
        self._path = folder / record["file"]
        self._offsets_path = folder / _offsets_file(record)
        self._dtype = dtype

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        return np.memmap(self._path, dtype=self._dtype, mode="r")

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        if not self.num_documents:  # an empty file can't be mapped
            return np.empty(0, OFFSET_DTYPE)
        return np.memmap(self._offsets_path, dtype=OFFSET_DTYPE, mode="r")

    def bounds(self) -> np.ndarray:
        """Where documents begin, and the end: (documents + 1,) int64."""
        return np.append(self.offsets.astype(np.int64), self.num_tokens)


def _offsets_file(shard: dict[str, Any]) -> str:
    return Path(shard["file"]).stem + OFFSETS


def _allow_open_files(count: int) -> None:
    """Raises the process' own limit, which is 1,024 on most systems: C4 has more shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise ValueError(
                f"the store needs {count} open files and this system allows {hard}: raise the "
                f"limit, as with `ulimit -Hn {count}` by the administrator"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder}: no finished token store ({MANIFEST} is missing); "
            "run scripts/prepare_data.py, which also goes on where it was stopped"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); prepare the store again") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format={manifest.get('format')}, this code reads {FORMAT}; "
            "prepare the store again"
        )
    return manifest


def _fingerprint(manifest: dict[str, Any]) -> str:
    shards = {
        name: [shard["sha256"] for shard in split["shards"]]
        for name, split in manifest["splits"].items()
    }
    content = [manifest["tokenizer_sha256"], manifest["dtype"], shards]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_size(path: Path, expected: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual != expected:
        found = "is missing" if actual is None else f"has {actual} bytes, expected {expected}"
        raise ValueError(f"{path} {found}; delete the folder and run scripts/prepare_data.py again")


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ValueError(
            f"{path} is corrupt: SHA-256 is {actual}, expected {expected}; "
            "delete the folder and run scripts/prepare_data.py again"
        )
