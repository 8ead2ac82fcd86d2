"""Folders on disks and behind addresses have one form; what nothing reads is one line."""

import contextlib
import errno
import os
import platform
import sys
from pathlib import Path

import pytest

from data import atomic
from data.addresses import is_address, told_as_os_errors
from laser.training.folders import folder_of, write_atomically


def test_a_path_stays_one_of_pathlib(tmp_path):
    assert folder_of("runs/a") == Path("runs/a")
    assert type(folder_of(str(tmp_path))) is type(tmp_path)
    assert not is_address(tmp_path)


def test_addresses_keep_their_form():
    pytest.importorskip("gcsfs")
    folder = folder_of("gs://bucket/runs")
    assert str(folder / "a" / "config.json") == "gs://bucket/runs/a/config.json"
    assert is_address(folder)
    assert folder_of(folder) == folder


def test_addresses_that_nothing_reads(monkeypatch):
    with pytest.raises(ValueError, match="s3://b/run: runs and data of tasks have addresses of gs"):
        folder_of("s3://b/run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for protocol in ("gs", "gcs"):  # if it was imported before
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(ValueError, match=r"gs://x/y: .*`pip install -r requirements-bucket.txt`"):
        folder_of("gs://x/y")


def test_an_error_of_a_library_is_one_line():
    theirs = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})
    for error in (theirs("no rights\nfor you"), OSError("no rights\nfor you")):
        with pytest.raises(OSError, match=r"no rights: 'gs://b'$"):
            with told_as_os_errors("gs://b"):
                raise error
    missing = "gs://b: no gcsfs; `pip install -r requirements-bucket.txt` has what it needs"
    with pytest.raises(ValueError, match=missing), told_as_os_errors("gs://b"):
        raise ImportError("no gcsfs")
    with pytest.raises(ImportError), told_as_os_errors("runs/a"):
        raise ImportError("no gcsfs")
    with pytest.raises(KeyError), told_as_os_errors("gs://b"):
        raise KeyError


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "sync", lambda path: synced.append(path.name))
    path = tmp_path / "file"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    host = f"{platform.node()}-{os.getpid()}"  # hosts that share a folder may have equal numbers
    assert synced == 2 * [f"file.{host}.tmp", tmp_path.name]  # the name, too, outlives a power cut


@pytest.mark.parametrize(("number", "matters"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_syncs_no_folders_is_written_to(tmp_path, monkeypatch, number, matters):
    def sync(path):
        if path.is_dir():
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic, "sync", sync)
    with pytest.raises(OSError) if matters else contextlib.nullcontext():
        write_atomically(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"
