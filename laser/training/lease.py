"""One process at a time in a folder: by a lock, or in a bucket by a lease, renewed while it lives.

Behind an address nothing can be locked. The file `.lock` there says who trains, and a number that
grows every few seconds. Whoever finds one of another machine looks whether it grows, and takes over
what has stood still. It is written only if it is what was last seen, which tensorstore asks of the
bucket: of two that come at once, one has it. Who finds that another one has taken over, as after a
long sleep, ends at once.
"""

import atexit
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data.addresses import is_address
from data.errors import first_line
from laser.training import exits
from laser.training.folders import url_of

log = logging.getLogger(__name__)

LOCK = ".lock"
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)  # of some file systems
# Of this process. An open file is a lock, and to close it is to give it back.
_locks: dict[Path, tuple[IO[str], "Lease | None"]] = {}
BEAT_SECONDS, SILENCE_SECONDS = 5.0, 20.0
PATIENCE_SECONDS = 10.0  # with a bucket that does not answer, at the end


def claim(folder: Path) -> None:
    """Keeps other processes from training here until this one has ended, however it ends.

    On a mounted bucket those of this machine alone. Raises ValueError if one does already, OSError
    if nothing can be written there.
    """
    if folder in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = _lock_file(folder).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"{folder}: another process trains here ({file.read().strip() or 'pid unknown'}); stop "
            "it or choose another --workdir"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: no locks there, so take care that no other process trains in it", folder)
        return
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[folder] = (file, Lease(folder) if is_address(folder) else None)


def _lock_file(folder: Path) -> Path:
    """What processes of this machine lock."""
    if not is_address(folder):
        return folder / LOCK
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"laser-{os.getuid()}-{name}.lock"


class Lease:
    """Kept until the process ends, or `give_back`. Another process of this machine must not try.

    Raises:
      ValueError: another process has it.
      OSError: nothing can be written there.
    """

    def __init__(self, folder: Path):
        import tensorstore  # not for those who only read

        self._folder = folder
        self._own = {"token": uuid.uuid4().hex, "who": _who(), "machine": _machine()}
        self._beats = 0
        self._stop = threading.Event()
        with _told_as_os_errors(folder):
            self._store = tensorstore.KvStore.open(url_of(folder)).result()
            found = self._store.read(LOCK).result()
            # Of another process of this machine that is there: `claim` knows.
            if found.state == "value" and json.loads(found.value)["machine"] != _machine():
                found = self._watched(found)
            self._generation = found.stamp.generation
            if not self._renew():
                raise _taken(folder, self._store.read(LOCK).result().value)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        atexit.register(self.give_back)

    def give_back(self) -> None:
        """So that the next process need not look first."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        deleted = self._store.write(LOCK, None, if_equal=self._generation)
        try:
            deleted.result(timeout=PATIENCE_SECONDS)
        except (TimeoutError, ValueError) as error:  # what tensorstore calls everything
            log.warning("%s/%s could not be removed: %s", self._folder, LOCK, error)

    def _watched(self, found: Any) -> Any:
        """What is there when it has stood still for long enough. Raises ValueError if it grows."""
        log.info(
            "%s: looking for %.0f s whether %s still trains here",
            self._folder, SILENCE_SECONDS, json.loads(found.value)["who"],
        )  # fmt: skip
        deadline = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(SILENCE_SECONDS / 10)
            now = self._store.read(LOCK).result()
            if now.state != "value":
                return now
            if now.value != found.value:
                raise _taken(self._folder, now.value)
        return found

    def _renew(self) -> bool:
        """False if another process has it."""
        self._beats += 1
        text = json.dumps(self._own | {"beats": self._beats})
        stamp = self._store.write(LOCK, text, if_equal=self._generation).result()
        if not stamp.generation:
            # Refused; or written by a try whose answer was lost, and refused when tried again.
            found = self._store.read(LOCK).result()
            if found.state != "value" or json.loads(found.value)["token"] != self._own["token"]:
                return False
            stamp = found.stamp
        self._generation = stamp.generation
        return True

    def _keep(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                kept = self._renew()
            except ValueError as error:
                log.warning("%s/%s: not renewed: %s", self._folder, LOCK, error)
                continue
            if not kept:
                log.error("%s: another process trains here now, so this one ends", self._folder)
                os._exit(exits.FAILED)


@contextlib.contextmanager
def _told_as_os_errors(folder: Path) -> Iterator[None]:
    """tensorstore calls everything a ValueError, as "NOT_FOUND: ..."."""
    try:
        yield
    except ValueError as error:
        if not re.match(r"[A-Z_]+: ", str(error)):
            raise
        raise OSError(errno.EIO, first_line(error), str(folder)) from error


def _taken(folder: Path, lock: bytes) -> ValueError:
    who = json.loads(lock)["who"] if lock else "which has just ended"
    return ValueError(
        f"{folder}: another process trains here ({who}); stop it or choose another --workdir"
    )


def _who() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _machine() -> str:
    """Another one after each start of the machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
