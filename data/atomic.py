"""Files that are whole or absent: written beside their place, forced to the disk, then renamed."""

import contextlib
import errno
import os
import platform
from pathlib import Path

TEMPORARY = ".tmp"


def write(path: Path, content: str | bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part, whoever else
    writes it at the same time. Raises OSError."""
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """Beside `path`; no other process has the same, not one that outlived a killed run either.

    The host is in it, as hosts that share a folder may give their processes the same number.
    """
    return path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}{TEMPORARY}")


def publish(temporary: Path, path: Path) -> None:
    """Renames a finished file, so that a crash leaves all of it under that name or nothing."""
    sync(temporary)
    temporary.replace(path)
    try:
        sync(path.parent)
    except OSError as error:  # some file systems know no such thing of folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def sync(path: Path) -> None:
    """Forces a file's content, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
