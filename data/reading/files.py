"""Files of a store, read by pieces: on a disk or a mounted bucket, or in a bucket by its address.

    stores/mine                  a folder
    gs://bucket/stores/mine      by gcsfs (requirements-bucket.txt)
    s3://bucket/stores/mine      by s3fs, if it is installed; and so on: what fsspec knows

Addresses go through fsspec, whose file systems try again, later and later, where a request fails.
Either way a file must stay as it was when the store was opened.
"""

import errno
import functools
import io
import os
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from data.addresses import is_address
from data.errors import first_line

CHECKED_AGAIN_SECONDS = 60.0  # what lies behind an address: to look is a request
VERSIONS = ("generation", "ETag", "etag", "mtime", "created")  # what tells one content from another


class StoreChangedError(OSError):
    """A file of an opened store is not what it was when the store was opened."""


class File(Protocol):
    """One that must stay as it was when it was first looked at.

    Attributes:
      size: in bytes.
    """

    size: int

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size), as they are now. Raises StoreChangedError, or OSError."""

    def check(self) -> None:
        """Raises StoreChangedError unless what was read is as when the file was first looked at."""


def path_of(text: str | Path) -> "Path | Address":
    """A path of pathlib, or an address if it has a "://". Raises ValueError if none can read it."""
    return Address(text) if is_address(text) else Path(text)


def folder_to_write(text: str | Path) -> Path:
    """Of what is written on disks alone. Raises ValueError if it is an address."""
    if is_address(text):
        raise ValueError(f"output={text}: this is written to folders alone; copy the folder there")
    return Path(text)


def look_at(path: "Path | Address", listing: "Listing | None" = None) -> File:
    """A file that is there; `listing` is that of its folder, if there is one. Raises OSError."""
    return AddressFile(path, listing) if isinstance(path, Address) else LocalFile(path)


class LocalFile:
    """A `File` that is opened at its first read.

    Whoever replaces it by another file does no harm once it is open: the old one is read on.
    """

    def __init__(self, path: Path):
        self._path = path
        self._state = _state(os.stat(path))
        self.size = self._state[0]

    def read(self, start: int, size: int) -> bytes:
        content = os.pread(self._handle, size, start)
        if len(content) != size:
            raise changed(self._path, "was cut off")
        return content

    def check(self) -> None:
        if _state(os.fstat(self._handle)) != self._state:
            raise changed(self._path, "was written to")

    @functools.cached_property
    def _handle(self) -> int:
        try:
            handle = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            raise changed(self._path, "is gone") from None
        weakref.finalize(self, os.close, handle)
        if _state(os.fstat(handle)) != self._state:
            raise changed(self._path, "was replaced")
        return handle


def _state(status: os.stat_result) -> tuple[int, int]:
    """Size, and the time of the last write in nanoseconds. Not the inode, which mounted buckets
    make up, and not the time of the last change, which follows from a link or new permissions."""
    return status.st_size, status.st_mtime_ns


class Address:
    """As much of pathlib as a store needs, for what lies behind an address."""

    def __init__(self, address: "str | Path | Address"):
        self._address = str(address).rstrip("/")
        self._system, self._path = _file_system(self._address)

    def __truediv__(self, name: str) -> "Address":
        return Address(f"{self._address}/{name}")

    def __str__(self) -> str:
        return self._address

    @property
    def name(self) -> str:
        return self._address.rpartition("/")[2]

    def is_file(self) -> bool:
        try:
            return self.info()["type"] == "file"
        except FileNotFoundError:
            return False

    def read_bytes(self) -> bytes:
        return self._call(self._system.cat_file)

    def read_piece(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size); fewer at the end of the file."""
        return self._call(functools.partial(self._system.cat_file, start=start, end=start + size))

    def open(self, mode: str = "rb") -> io.BufferedIOBase:
        """To be read from its begin to its end."""
        if mode != "rb":
            raise ValueError(f"{self}: is read only, not opened as {mode!r}")
        return io.BytesIO(self.read_bytes())

    def info(self) -> dict[str, Any]:
        """What the bucket says of the file."""
        return self._call(self._system.info)

    def list_files(self) -> dict[str, dict[str, Any]]:
        """Name → what is said of it, of the files in a folder: a request for a thousand of them.
        Without those of which a listing does not tell one content from another."""
        found = self._call(functools.partial(self._system.ls, detail=True))
        return {
            info["name"].rpartition("/")[2]: info
            for info in found
            if info["type"] == "file" and _version(info)[1]
        }

    def _call(self, function: Callable[[str], Any]) -> Any:
        """Raises OSError with a line for `strerror`; FileNotFoundError where nothing is there."""
        try:
            return function(self._path)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "no such file", self._address) from error
        except Exception as error:  # of as many types as there are libraries behind fsspec
            line = first_line(error)
            said = f"{type(error).__name__}: {line}"
            raise OSError(errno.EIO, f"cannot be read ({said})", self._address) from error


def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and its path there. Raises ValueError."""
    try:
        from fsspec.core import url_to_fs  # only where there is an address

        # A listing that is kept would hide that a file has changed.
        return url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        need = "pip install -r requirements-bucket.txt"
        raise ValueError(f"{address}: {error}; `{need}` has what gs:// needs") from error
    except ValueError as error:  # a protocol that fsspec does not know
        raise ValueError(f"{address}: {error}") from error


class Listing:
    """What a folder's bucket says of the files in it; asked for again once a minute while any of
    those that were taken from it is read. So looking costs the same however many there are."""

    def __init__(self, folder: Address):
        """Raises OSError where nothing is listed."""
        self._folder = folder
        self._listed = folder.list_files()
        self._looked = time.monotonic()
        self._taken: dict[str, tuple[int, str]] = {}

    def take(self, name: str) -> tuple[int, str] | None:
        """A file's version, which `check` compares from now on; None if it is not listed."""
        if name not in self._listed:
            return None
        return self._taken.setdefault(name, _version(self._listed[name]))

    def check(self) -> None:
        """Raises StoreChangedError for the first file that is not as it was, or OSError."""
        if time.monotonic() - self._looked < CHECKED_AGAIN_SECONDS:
            return
        self._looked = time.monotonic()
        now = self._folder.list_files()
        for name, version in self._taken.items():
            if name not in now:
                raise changed(self._folder / name, "is gone")
            if _version(now[name]) != version:
                raise changed(self._folder / name, "was written to")


class AddressFile:
    """A `File` behind an address; looked at again once a minute while it is read, by the listing
    of its folder if it is in one.

    Attributes:
      name: of this content: another one if the file is written again.
    """

    def __init__(self, path: Address, listing: Listing | None = None):
        self._path = path
        listed = listing.take(path.name) if listing else None
        self._listing = listing if listed else None
        self._state = listed or _version(path.info())
        self.size: int = self._state[0]
        self.name = f"{path} {self._state}"
        self._looked = time.monotonic()

    def read(self, start: int, size: int) -> bytes:
        try:
            content = self._path.read_piece(start, size)
        except FileNotFoundError:
            raise changed(self._path, "is gone") from None
        if len(content) != size:
            raise changed(self._path, "was cut off")
        return content

    def check(self) -> None:
        if self._listing:
            self._listing.check()
        elif time.monotonic() - self._looked >= CHECKED_AGAIN_SECONDS:
            self._looked = time.monotonic()
            if _version(self._path.info()) != self._state:
                raise changed(self._path, "was written to")


def _version(info: Mapping[str, Any]) -> tuple[int, str]:
    """Size of a file, and what tells that it was written again."""
    return info["size"], next((str(info[key]) for key in VERSIONS if info.get(key)), "")


def changed(path: Path | Address, how: str) -> StoreChangedError:
    """The error of a file that is not what it was."""
    return StoreChangedError(
        f"{path}: {how} since the store was opened; put back the store as it was, or "
        "prepare it in another folder"
    )
