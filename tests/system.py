"""What tests look at outside of Python: files, processes, and disks of their own."""

import functools
import subprocess
from pathlib import Path

import pytest

NAMESPACE = ["unshare", "--map-root-user", "--mount"]  # in which a program may mount


def contents(folder: Path) -> dict[str, bytes]:
    """Path below the folder → bytes, of all files in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


@functools.cache
def can_mount() -> bool:
    try:
        probe = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(
    not can_mount(), reason="needs unshare and tmpfs, to have a disk that is full"
)
