"""Pieces of files behind addresses, kept in a folder of this machine.

A file is kept in pieces of 1 MiB, each beside the SHA-256 of its place and its content: a piece
that was damaged on the disk is read from the bucket again. A file that was written again has
another version and so other pieces. When the folder is full, pieces of files that this process does
not read make room, as those of stores of before; when none are left nothing more is kept: an epoch
reads each place once, so to go on would throw away each piece just before it is of use.
"""

import hashlib
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path

from data.reading.files import File

PIECE = 2**20
DIGEST = hashlib.sha256().digest_size
LEFT_BEHIND_SECONDS = 3600.0  # a file that was begun so long ago is nobody's any more

log = logging.getLogger(__name__)


class Cache:
    """A folder of pieces, which several processes may share. Safe for threads."""

    def __init__(self, folder: str | Path, limit: int):
        """Args:
          folder: made if it is not there.
          limit: bytes that all of it may take.

        Raises:
          OSError: the folder cannot be made.
        """
        self._folder, self._limit = Path(folder), limit
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._used, self._is_full = 0, False
        self._in_use: set[str] = set()  # beginnings of the names of pieces
        there = []
        for path in self._folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process has given it its name, or dropped it
                continue
            is_begun = path.suffix == ".tmp"
            if is_begun and time.time() - status.st_mtime > LEFT_BEHIND_SECONDS:
                path.unlink(missing_ok=True)
                continue
            self._used += status.st_size
            if not is_begun:
                there.append((status.st_mtime, path.name, status.st_size))
        self._there = deque(sorted(there))  # at the start, the oldest first

    def use(self, file: str) -> None:
        """From now on the pieces of a file make no room for others."""
        self._in_use.add(_beginning(file))

    def get(self, file: str, piece: int) -> bytes | None:
        """What was kept of a piece of a file, or None."""
        path = self._path(file, piece)
        try:
            kept = path.read_bytes()
        except FileNotFoundError:
            return None
        content = kept[:-DIGEST]
        if _digest(file, piece, content) != kept[-DIGEST:]:
            log.warning("%s in the cache is damaged: it is read from the bucket again", path)
            path.unlink(missing_ok=True)
            with self._lock:
                self._used -= len(kept)
            return None
        return content

    def keep(self, file: str, piece: int, content: bytes) -> None:
        """Keeps it, if there is room."""
        size = len(content) + DIGEST
        with self._lock:
            if not self.has_room(size):
                return
            self._used += size
        path = self._path(file, piece)
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            temporary.write_bytes(content + _digest(file, piece, content))
            temporary.replace(path)
        except OSError as error:  # a full disk, above all
            self._end(f"it cannot be written ({error.strerror})")
            temporary.unlink(missing_ok=True)

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more would be kept; makes room for them if it can."""
        with self._lock:
            while self._there and not self._is_full and self._used + size > self._limit:
                _, name, there = self._there.popleft()
                if name.partition("-")[0] not in self._in_use:
                    try:
                        (self._folder / name).unlink(missing_ok=True)  # another process was first
                    except OSError as error:  # as of another user's; no read may fail of it
                        log.warning("cache %s: %s: %s", self._folder, name, error.strerror)
                    else:
                        self._used -= there
            if not self._is_full and self._used + size > self._limit:
                self._end(f"its limit of {self._limit / 1e9:g} GB is reached")
            return not self._is_full

    def _end(self, why: str) -> None:
        self._is_full = True
        log.warning(
            "cache %s: %s; what is there is used, and nothing more is kept", self._folder, why
        )

    def _path(self, file: str, piece: int) -> Path:
        return self._folder / f"{_beginning(file)}-{piece}"


def _beginning(file: str) -> str:
    """Of the names of a file's pieces."""
    return hashlib.sha256(file.encode()).hexdigest()


def _digest(file: str, piece: int, content: bytes) -> bytes:
    return hashlib.sha256(f"{file} {piece}\0".encode() + content).digest()


class CachedFile:
    """A `File` whose pieces are kept.

    Args:
      file: behind an address.
      name: of this content of it, other than that of any other.
      cache: for its pieces.
    """

    def __init__(self, file: File, name: str, cache: Cache):
        self._file, self._name, self._cache = file, name, cache
        self.size = file.size
        cache.use(name)

    def read(self, start: int, size: int) -> bytes:
        first, last = start // PIECE, (start + size - 1) // PIECE
        numbers = range(first, last + 1)
        found = {i: self._cache.get(self._name, i) for i in numbers}
        pieces = {i: piece for i, piece in found.items() if piece is not None}
        missing = [i for i in numbers if i not in pieces]
        if missing:  # those between them are read again: one request
            begin, end = missing[0] * PIECE, min((missing[-1] + 1) * PIECE, self.size)
            if not self._cache.has_room(end - begin + len(missing) * DIGEST):
                return self._file.read(start, size)
            content = self._file.read(begin, end - begin)
            self._file.check()  # before it is kept under its name
            for i in range(missing[0], missing[-1] + 1):
                offset = i * PIECE - begin
                pieces[i] = content[offset : offset + PIECE]
                if i in missing:
                    self._cache.keep(self._name, i, pieces[i])
        offset = start - first * PIECE
        return b"".join(pieces[i] for i in numbers)[offset : offset + size]

    def check(self) -> None:
        self._file.check()
