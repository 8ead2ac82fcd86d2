"""Reads a token store: a folder of flat token shards and a manifest, written by data/preparation.

    manifest.json        what the store holds: counts and checksums of every shard
    tokenizer.model      SentencePiece
    train-00000.bin      little-endian uint16 (uint32 where the vocabulary needs it)
    train-00000.offsets  little-endian uint64: where in the .bin each document begins

A split is one long stream: EOS, then every document followed by EOS. Row i of length L is
tokens[i·L : (i+1)·L + 1], so neighbours share one token, any L works without preparing again, and
every token but the leading EOS is a target exactly once. Shards are read by pieces (files.py)
and not mapped into memory: if somebody writes over a file or cuts it off, the next read is an
error. A mapped file would give other rows then, or end the process by a signal. Neither jax nor
TensorFlow is imported.
"""

import bisect
import itertools
import logging
import resource
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data.reading.cache import Cache, CachedFile
from data.reading.files import (
    Address,
    AddressFile,
    File,
    Listing,
    StoreChangedError,
    look_at,
    path_of,
)
from data.reading.manifest import (
    PREPARE_AGAIN,
    check_sha256,
    fingerprint,
    fix_of,
    read_manifest,
)
from data.reading.order import BLOCK_ROWS, Places, step_places

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.model"
OFFSETS, OFFSET_DTYPE = ".offsets", np.dtype("<u8")
OTHER_FILES = 256  # that a process may have open besides those of its splits
THREADS = 16  # a mounted bucket answers late, but many at a time
# Larger stores would keep every host busy for minutes at every start: they are hashed by `verify`.
VERIFIED_BYTES, VERIFIED_BYTES_OF_BUCKETS = 2**34, 2**28

__all__ = ["TOKENIZER", "Shard", "Split", "StoreChangedError", "TokenStore"]


class TokenStore:
    """An opened store.

    Attributes:
      path: the folder, or an address such as gs://bucket/store.
      tokenizer_path: its SentencePiece model, a file on this machine.
      tokenizer_sha256, vocab_size, eos_id, pad_id: of that tokenizer.
      fingerprint: SHA-256 over the tokenizer's and all shards' checksums and counts, as hex digits.
        Equal fingerprints mean equal rows, wherever the store lies.
      is_verified: whether the content of all files was compared with its checksums.
    """

    def __init__(self, path: str | Path, cache: Cache | None = None):
        """Opens the store: checks the manifest, the tokenizer and the sizes of all files, and up to
        16 GiB also their content; behind an address up to 256 MiB.

        Args:
          path: folder written by scripts/prepare_data.py, or the address of its copy.
          cache: for what is read from an address.

        Raises:
          ValueError: no store there, not a finished one, or a file differs from the manifest.
        """
        self.path = path_of(path)
        self._manifest = read_manifest(self.path)
        self.tokenizer_sha256: str = self._manifest["tokenizer_sha256"]
        self.vocab_size: int = self._manifest["vocab_size"]
        self.eos_id: int = self._manifest["eos_id"]
        self.pad_id: int = self._manifest["pad_id"]
        self.fingerprint = fingerprint(self._manifest)
        self.is_verified = False
        check_sha256(self.path / TOKENIZER, self.tokenizer_sha256)
        self.tokenizer_path = str(self.path / TOKENIZER)
        if isinstance(self.path, Address):
            self._temporary = tempfile.TemporaryDirectory(prefix="store-")  # as long as the store
            self.tokenizer_path = f"{self._temporary.name}/{TOKENIZER}"
            Path(self.tokenizer_path).write_bytes((self.path / TOKENIZER).read_bytes())
        sizes, listed = self._file_sizes(), _listing(self.path)
        with ThreadPoolExecutor(THREADS) as pool:
            files = list(
                pool.map(
                    lambda name: _found(self.path / name, sizes[name], cache, listed),
                    sizes,
                )
            )
        self._files = dict(zip(sizes, files))
        afar = isinstance(self.path, Address)
        if sum(sizes.values()) <= (VERIFIED_BYTES_OF_BUCKETS if afar else VERIFIED_BYTES):
            self.verify()
        self._splits = {
            name: Split([self._shard(shard) for shard in record["shards"]])
            for name, record in self._manifest["splits"].items()
        }

    @property
    def split_names(self) -> list[str]:
        """As "train" and "validation"."""
        return list(self._splits)

    def split(self, name: str) -> "Split":
        """The rows of "train" or "validation"."""
        if name not in self._splits:
            raise ValueError(f"{self.path} has no split {name!r}, only {', '.join(self._splits)}")
        split = self._splits[name]
        if not isinstance(self.path, Address):
            _read_from_disks.add(split)
            _allow_open_files()
        return split

    def verify(self) -> None:
        """Compares every file's SHA-256. Raises ValueError for one that differs."""
        expected = {}
        for shard in self._shards():
            expected[shard["file"]] = shard["sha256"]
            expected[_offsets_file(shard)] = shard["offsets_sha256"]
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            list(pool.map(lambda name: check_sha256(self.path / name, expected[name]), expected))
        self.is_verified = True

    def _shards(self) -> list[dict[str, Any]]:
        return [s for split in self._manifest["splits"].values() for s in split["shards"]]

    def _file_sizes(self) -> dict[str, int]:
        """File → its size in bytes."""
        token_size = np.dtype(self._manifest["dtype"]).itemsize
        tokens = {s["file"]: s["tokens"] * token_size for s in self._shards()}
        offset_size = OFFSET_DTYPE.itemsize
        return tokens | {_offsets_file(s): s["documents"] * offset_size for s in self._shards()}

    def _shard(self, record: dict[str, Any]) -> "Shard":
        tokens, offsets = self._files[record["file"]], self._files[_offsets_file(record)]
        return Shard(record, np.dtype(self._manifest["dtype"]), tokens, offsets)


class Split:
    """One split as a stream of tokens cut into rows.

    Attributes:
      num_files: that it may have open.
      num_tokens: of the whole stream, all EOS included. The first one is never a target.
      num_documents: documents in it.
      num_bytes: of their text in UTF-8, without anything for the EOS between them.
    """

    def __init__(self, shards: Sequence["Shard"]):
        self._shards = shards
        self.num_files = 2 * len(shards)
        self.num_tokens = sum(shard.num_tokens for shard in shards)
        self.num_documents = sum(shard.num_documents for shard in shards)
        self.num_bytes = sum(shard.num_bytes for shard in shards)
        self._ends = list(itertools.accumulate(shard.num_tokens for shard in shards))
        self._document_ends = list(itertools.accumulate(shard.num_documents for shard in shards))

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
          StoreChangedError: a file has changed since the store was opened; so everywhere here.
        """
        ids, num_rows = np.asarray(ids, np.int64), self.num_rows(seq_len)
        if ids.size and (ids.min() < 0 or ids.max() >= num_rows):
            raise ValueError(
                f"row ids from {ids.min()} to {ids.max()}: the split has {num_rows} rows of "
                f"{seq_len} tokens, counted from 0"
            )
        rows = np.empty((len(ids), seq_len + 1), np.int32)
        for row, start in zip(rows, (ids * seq_len).tolist(), strict=True):
            row[:] = self._stream(start, seq_len + 1)
        return rows

    def places(
        self,
        seed: int,
        step: int,
        batch_size: int,
        seq_len: int,
        block_rows: int = BLOCK_ROWS,
        steps: int = 1,
    ) -> Places:
        """Where the rows of the global batches of steps are: see `order.step_places`."""
        return step_places(seed, step, batch_size, self.num_rows(seq_len), block_rows, steps)

    def piece(self, first: int, count: int, seq_len: int) -> np.ndarray:
        """Neighbouring rows, read in one piece (of each shard that they lie in).

        Returns:
          (count, seq_len + 1), in the type of the files; not to be written to. Where the stream
          ends, zeros: only the last row that `num_rows` counts with `partial` has some.

        Raises:
          ValueError: the split has fewer rows.
        """
        if first < 0 or first + count > self.num_rows(seq_len, partial=True):
            raise ValueError(f"rows {first} to {first + count - 1} of {seq_len} are not there")
        size = count * seq_len + 1
        stream = self._stream(first * seq_len, size)
        if len(stream) < size:
            stream = np.pad(stream, (0, size - len(stream)))
        return np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len]

    def document_at(self, position: int) -> int:
        """Number of the document that a token of the stream belongs to, its EOS included; -1 for
        the leading EOS."""
        if not 0 <= position < self.num_tokens:
            raise ValueError(f"position {position}: the split has {self.num_tokens} tokens, from 0")
        index = bisect.bisect_right(self._ends, position)
        shard = self._shards[index]
        local = position - (self._ends[index] - shard.num_tokens)
        before = self._document_ends[index] - shard.num_documents
        return before + int(np.searchsorted(shard.bounds()[:-1], local, side="right")) - 1

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document, without EOS: an array (documents,) int64 for every shard."""
        return (np.diff(shard.bounds()) - 1 for shard in self._shards)

    def targets(self, ids: np.ndarray, seq_len: int) -> np.ndarray:
        """Targets of rows: seq_len, and fewer in the shorter one at the end; (len(ids),) int64."""
        return np.minimum(self.num_tokens - 1 - ids * seq_len, seq_len)

    def _stream(self, start: int, size: int) -> np.ndarray:
        """Tokens [start, start + size) of the stream, over the ends of shards, up to its end."""
        index, pieces = bisect.bisect_right(self._ends, start), []
        while size > 0 and index < len(self._shards):
            shard = self._shards[index]
            offset = start - (self._ends[index] - shard.num_tokens)
            piece = shard.tokens(offset, min(offset + size, shard.num_tokens))
            shard.check()
            pieces.append(piece)
            start, size, index = start + len(piece), size - len(piece), index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


_read_from_disks: weakref.WeakSet[Split] = weakref.WeakSet()


class Shard:
    """One shard: where its documents are, and its tokens."""

    def __init__(self, record: dict[str, Any], dtype: np.dtype, tokens: File, offsets: File):
        self.num_tokens: int = record["tokens"]
        self.num_documents: int = record["documents"]
        self.num_bytes: int = record["bytes"]
        self._dtype, self._tokens, self._offsets = dtype, tokens, offsets

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), in the type of the file. They are right if `check` passes later."""
        size = self._dtype.itemsize
        return np.frombuffer(self._tokens.read(start * size, (stop - start) * size), self._dtype)

    def check(self) -> None:
        """Raises StoreChangedError if tokens that were read may be others than they were."""
        self._tokens.check()

    def bounds(self) -> np.ndarray:
        """Where the documents begin, and then the end of the shard: (num_documents + 1,) int64."""
        size = self.num_documents * OFFSET_DTYPE.itemsize
        starts = np.frombuffer(self._offsets.read(0, size), OFFSET_DTYPE)
        self._offsets.check()
        return np.append(starts.astype(np.int64), np.int64(self.num_tokens))


def _listing(folder: Path | Address) -> Listing | None:
    """What a bucket says of a store's files, if it lists them. C4 has 2,000, and every host of a
    slice asks."""
    if not isinstance(folder, Address):
        return None
    try:
        return Listing(folder)
    except OSError as error:  # as servers of HTTP, some of which list nothing
        log.info("%s: asking for each file by itself (%s)", folder, error.strerror)
        return None


def _found(path: Path | Address, size: int, cache: Cache | None, listing: Listing | None) -> File:
    """A file of a store. Raises ValueError if it is missing or has another size."""
    try:
        file = look_at(path, listing)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {fix_of(error)}") from error
    if file.size != size:
        raise ValueError(f"{path} has {file.size} bytes, expected {size}; {PREPARE_AGAIN}")
    if cache and isinstance(file, AddressFile):
        return CachedFile(file, file.name, cache)
    return file


def _offsets_file(shard: dict[str, Any]) -> str:
    return Path(shard["file"]).stem + OFFSETS


def _allow_open_files() -> None:
    """Raises the process' own limit, which is 1,024 on most systems: C4 has more shards, and a
    mixture those of several stores."""
    count = sum(split.num_files for split in _read_from_disks) + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise ValueError(
                f"the data need {count} open files and this system allows {hard}: raise the "
                f"limit, as with `ulimit -Hn {count}` by the administrator"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
