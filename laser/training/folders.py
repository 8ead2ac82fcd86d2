"""Folders of runs and of data, on a disk or behind an address, with the methods of pathlib.

    runs/laser                   pathlib.Path
    gs://bucket/runs/laser       etils.epath.Path, which Orbax takes, too; by gcsfs

Not s3://: there Orbax has no file that says that a checkpoint is finished, and renames folders.

What lies behind an address is not a disk. A file there is whole or absent, so that to write one is
atomic; but nothing can be added to it, no folder is renamed at once, and nothing can be locked. See
laser/training/records.py and laser/training/lease.py for what takes the place of these.
"""

from pathlib import Path
from typing import cast

from data import atomic
from data.addresses import is_address

ADDRESS = "gs://"
MOUNTS = Path("/proc/self/mounts")  # of Linux


def folder_of(text: str | Path) -> Path:
    """A path of pathlib, or of epath where there is an address.

    Raises ValueError where nothing here reads such an address.
    """
    address = str(text)
    if not is_address(address):
        return Path(text)
    if not address.startswith(ADDRESS):
        raise ValueError(f"{address}: runs and data of tasks have addresses of {ADDRESS} alone")
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
    """The folder's address as tensorstore wants it."""
    return f"{folder}/" if is_address(folder) else folder.absolute().as_uri() + "/"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part, whoever else
    writes it at the same time. Raises OSError."""
    if is_address(path):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        atomic.write(path, content)
