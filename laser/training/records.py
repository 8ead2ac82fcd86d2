"""Files of a run that grow line by line, where nothing can be added to a file.

On a disk they are written in the run's folder. Of a run in a bucket they are written in a folder of
this machine, and from there to the run's as a whole: before each checkpoint, so that a run which
goes on from one finds all that it keeps; at the end; and now and then for those who watch.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from data.addresses import is_address, told_as_os_errors
from laser.training.folders import is_in_bucket, write_atomically

BETWEEN_SECONDS = 30.0
SHARE = 0.02  # of the time at most goes into what is written now and then


class Records:
    """The growing files of this host.

    Attributes:
      workdir: the run's folder.
      folder: where to write them: the run's own, or one of this machine.
    """

    def __init__(self, workdir: Path, names: Sequence[str] = ()):
        """Args:
        workdir: the run's folder.
        names: of the files that are gone on with.
        """
        self.workdir, self.folder = workdir, workdir
        self._written: dict[Path, tuple[int, int]] = {}
        self._due = time.monotonic() + BETWEEN_SECONDS
        if not is_in_bucket(workdir):
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="records-")  # as long as this lives
        self.folder = Path(self._temporary.name)
        for name in names:
            with told_as_os_errors(workdir / name):
                if (workdir / name).exists():
                    (self.folder / name).write_bytes((workdir / name).read_bytes())

    def write_now_and_then(self) -> None:
        """Brings the run's folder up to date if that was not done for a while."""
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Brings the run's folder up to date. Raises OSError."""
        if self.folder is self.workdir:
            return
        began = time.monotonic()
        for path in sorted(self.folder.rglob("*")):
            status = path.stat()
            state = status.st_size, status.st_mtime_ns
            if path.is_file() and self._written.get(path) != state:
                target = self.workdir / path.relative_to(self.folder).as_posix()
                with told_as_os_errors(target):
                    if not is_address(target):  # of a bucket there are no folders to make
                        target.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(target, path.read_bytes())
                self._written[path] = state
        ended = time.monotonic()
        self._due = ended + max(BETWEEN_SECONDS, (ended - began) / SHARE)
