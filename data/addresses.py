"""What lies behind an address, as gs://bucket/data, and on no disk: to tell it, and its errors."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from data.errors import first_line

# Before epath, which TFDS uses, is asked for the first time: it would take TensorFlow's client,
# which is 2 seconds and 700 MB to import, instead of gcsfs.
os.environ["EPATH_USE_TF"] = "false"

# The libraries behind addresses, whose errors are of as many types as there are libraries.
LIBRARIES = (
    "aiohttp", "fsspec", "gcsfs", "google.api_core", "google.auth", "google.cloud", "requests",
)  # fmt: skip


def is_address(text: str | Path) -> bool:
    """Whether it lies behind an address of any kind, and on no disk."""
    return "://" in str(text)


@contextlib.contextmanager
def told_as_os_errors(where: str | Path) -> Iterator[None]:
    """What the libraries behind an address raise, no bucket or no rights for example, is an OSError
    with one line; and where one of them is not installed, a ValueError that says how to."""
    try:
        yield
    except ImportError as error:
        if not is_address(where):
            raise
        need = "pip install -r requirements-bucket.txt"
        raise ValueError(f"{where}: {error}; `{need}` has what it needs") from error
    except Exception as error:
        theirs = type(error).__module__.startswith(LIBRARIES)
        if not theirs and not (isinstance(error, OSError) and "\n" in str(error)):
            raise
        words = f"{type(error).__name__}: {first_line(error)}"
        raise OSError(errno.EIO, words, str(where)) from error
