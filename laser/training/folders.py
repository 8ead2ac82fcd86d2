"""Folders of runs and of data, on a disk or behind an address, with the methods of pathlib.

    runs/laser                   pathlib.Path
    gs://bucket/runs/laser       etils.epath.Path, which Orbax takes, too; by gcsfs

Not s3://: there Orbax has no file that says that a checkpoint is finished, and renames folders.

What lies behind an address is not a disk. A file there is whole or absent, so that to write one is
atomic; but nothing can be added to it, no folder is renamed at once, and nothing can be locked. See
laser/training/records.py and laser/training/lease.py for what takes the place of these.
"""

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from data.errors import first_line

ADDRESS = "gs://"
MOUNTS = Path("/proc/self/mounts")  # of Linux
# The libraries behind it, whose errors are of as many types as there are libraries.
LIBRARIES = frozenset({"aiohttp", "fsspec", "gcsfs", "google", "requests"})


def folder_of(text: str | Path) -> Path:
    """A path of pathlib, or of epath where there is an address.

    Raises ValueError where nothing here reads such an address.
    """
    address = str(text)
    if "://" not in address:
        return Path(text)
    if not address.startswith(ADDRESS):
        raise ValueError(f"{address}: runs and data of tasks have addresses of {ADDRESS} alone")
    # Before epath is asked for the first time: TensorFlow's client takes seconds to import.
    os.environ["EPATH_USE_TF"] = "false"
    import fsspec
    from etils import epath

    try:
        names = fsspec.get_filesystem_class("gs").protocol
    except ImportError as error:
        need = "pip install -r requirements-bucket.txt"
        raise ValueError(f"{address}: {error}; `{need}` has what it needs") from error
    for name in names:
        # Other hosts, and tensorstore, write there, too: a listing that is kept would be wrong.
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    return cast(Path, epath.Path(address))  # has those of its methods that are used


def is_address(path: Path) -> bool:
    """Whether a folder or file lies behind an address."""
    return str(path).startswith(ADDRESS)


def absolute(path: Path) -> Path:
    """The same wherever the process goes."""
    return path if is_address(path) else path.absolute()


def is_in_bucket(folder: Path) -> bool:
    """Whether files there are written as a whole: behind an address, or in a bucket that gcsfuse
    has mounted, which shows what was written when the file is closed."""
    if is_address(folder):
        return True
    mounts = [line.split() for line in MOUNTS.read_text().splitlines()] if MOUNTS.exists() else []
    types = {mount[1]: mount[2] for mount in mounts}
    here = folder.resolve()
    place = next((str(x) for x in (here, *here.parents) if str(x) in types), "")
    return types.get(place) == "fuse.gcsfuse"


def url_of(folder: Path) -> str:
    """As tensorstore wants it."""
    return f"{folder}/" if is_address(folder) else folder.absolute().as_uri() + "/"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part, whoever else
    writes it at the same time. Raises OSError."""
    content = content.encode() if isinstance(content, str) else content
    if is_address(path):
        path.write_bytes(content)
        return
    # Hosts that share a folder may give their processes the same number.
    temporary = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def told_as_os_errors(where: str | Path) -> Iterator[None]:
    """What the libraries behind an address raise, no bucket or no rights for example, is an OSError
    with one line."""
    try:
        yield
    except Exception as error:
        theirs = type(error).__module__.partition(".")[0] in LIBRARIES
        if not theirs and not (isinstance(error, OSError) and "\n" in str(error)):
            raise
        words = f"{type(error).__name__}: {first_line(error)}"
        raise OSError(errno.EIO, words, str(where)) from error
