"""A bucket on this machine, for tests: a server in a process of its own that speaks as Google's."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import fsspec

from tests.training.runs import free_port

SERVER = Path(__file__).with_name("bucket_server.py")


class Bucket:
    """One that is empty at first.

    Attributes:
      address: of the bucket.
      environment: variables for programs that use it.
      process: the server.
    """

    address = "gs://bucket"

    def __init__(self, port: int, process: subprocess.Popen, folder: str):
        self.process = process
        url = f"http://localhost:{port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # as in conftest.py
            "FSSPEC_GCS": json.dumps({"token": "anon"}),
            "TENSORSTORE_GCS_HTTP_URL": url,
            "TENSORSTORE_GCS_HTTP_VERSION": "1",  # the server knows no newer one
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "TMPDIR": folder,  # where processes of a machine lock an address: others have its name
        }

    def upload(self, folder: Path, name: str) -> None:
        """Copies the files of a folder of this machine, without those of folders in it."""
        files = self.files()
        for path in folder.iterdir():
            if path.is_file():
                files.pipe_file(f"bucket/{name}/{path.name}", path.read_bytes())

    def files(self):
        """fsspec's file system of it, in this process."""
        url = self.environment["STORAGE_EMULATOR_HOST"]
        return fsspec.filesystem("gs", token="anon", endpoint_url=url, use_listings_cache=False)


@contextlib.contextmanager
def running(fail_every=0):
    """A `Bucket`, which ends with the context; see bucket_server.py."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="bucket-")
    process = subprocess.Popen(
        [sys.executable, SERVER, str(port), str(fail_every)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not answer"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{port}/storage/v1/b/bucket").close()
                break
            time.sleep(0.1)
        yield Bucket(port, process, folder)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
