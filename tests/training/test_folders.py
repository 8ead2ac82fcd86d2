"""Folders on disks and behind addresses have one form; what nothing reads is one line."""

import sys
from pathlib import Path

import pytest

from laser.training.folders import folder_of, is_address, told_as_os_errors, write_atomically


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
    with pytest.raises(KeyError), told_as_os_errors("gs://b"):
        raise KeyError


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
