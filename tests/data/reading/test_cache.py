"""Blocks that are kept on this machine: read once from the bucket, and never trained on damaged."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from data.reading import cache as cache_module
from data.reading.cache import DIGEST, Cache, CachedFile
from data.reading.files import Address, AddressFile, StoreChangedError
from data.reading.store import TokenStore
from laser.training import rows
from tests.data.reading.test_files import upload

CONTENT = np.random.default_rng(0).bytes(1000)
PLENTY = 10**6


@pytest.fixture
def address(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PIECE", 64)
    address = Address(f"memory://{tmp_path.name}/file")
    address._system.pipe_file(address._path, CONTENT)
    return address


@pytest.fixture
def reads(monkeypatch):
    """(start, size) of what is asked of the bucket."""
    found = []
    read = Address.read_piece

    def counted(self, start, size):
        found.append((start, size))
        return read(self, start, size)

    monkeypatch.setattr(Address, "read_piece", counted)
    return found


def opened(address, folder, limit=PLENTY):
    file = AddressFile(address)
    return CachedFile(file, file.name, Cache(folder, limit))


def test_each_place_is_read_once_and_again_after_a_restart(address, reads, tmp_path):
    rng = np.random.default_rng(1)
    for _ in range(3):
        file = opened(address, tmp_path / "cache")
        for _ in range(40):
            start = int(rng.integers(0, 999))
            size = int(rng.integers(1, 1001 - start))
            assert file.read(start, size) == CONTENT[start : start + size]
    assert file.read(0, 1000) == CONTENT
    before = len(reads)
    assert opened(address, tmp_path / "cache").read(10, 900) == CONTENT[10:910]
    assert len(reads) == before
    first, *_ = reads
    assert first[0] % 64 == 0


def test_a_damaged_piece_is_read_again(address, reads, tmp_path, caplog):
    folder = tmp_path / "cache"
    assert opened(address, folder).read(0, 200) == CONTENT[:200]
    for path in folder.iterdir():
        kept = bytearray(path.read_bytes())
        kept[5] ^= 1
        path.write_bytes(kept)
    file = opened(address, folder)
    assert file.read(0, 200) == CONTENT[:200]
    assert caplog.text.count("in the cache is damaged: it is read from the bucket again") == 4
    assert len(reads) == 2
    (first, *_) = folder.iterdir()  # a piece in another one's place
    for path in folder.iterdir():
        path.write_bytes(first.read_bytes())
    assert opened(address, folder).read(0, 200) == CONTENT[:200]


def test_a_full_cache_keeps_what_it_has_and_says_so_once(address, reads, tmp_path, caplog):
    folder = tmp_path / "cache"
    file = opened(address, folder, limit=3 * (64 + DIGEST))
    for start in range(0, 640, 64):
        assert file.read(start, 64) == CONTENT[start : start + 64]
    assert len(list(folder.iterdir())) == 3
    assert caplog.text.count("limit of 2.88e-07 GB is reached; what is there is used") == 1
    assert file.read(100, 500) == CONTENT[100:600]
    assert reads[-1] == (100, 500)  # no more than is asked for
    before = len(reads)
    assert file.read(0, 64) == CONTENT[:64]
    assert len(reads) == before


def test_pieces_of_files_of_before_make_room(address, reads, tmp_path, caplog):
    folder = tmp_path / "cache"
    before = opened(address, folder)
    before.read(0, 640)
    for age, path in enumerate(sorted(folder.iterdir(), key=lambda p: int(p.name.split("-")[1]))):
        os.utime(path, (age, age))
    (folder / "of an older version").write_bytes(b"x")
    address._system.pipe_file(address._path, CONTENT[::-1])
    limit = 10 * (64 + DIGEST) + 1
    file = opened(address, folder, limit)
    assert file.read(0, 256) == CONTENT[::-1][:256]
    kept = {int(path.name.split("-")[1]) for path in folder.iterdir() if _is_of(path, before)}
    assert kept == set(range(4, 10))  # the oldest are gone
    for start in range(256, 896, 64):
        assert file.read(start, 64) == CONTENT[::-1][start : start + 64]
    assert not any(_is_of(path, before) for path in folder.iterdir())
    assert len(list(folder.iterdir())) == 10
    assert caplog.text.count("GB is reached; what is there is used") == 1
    asked = len(reads)  # its own pieces stay, also after a restart
    assert opened(address, folder, limit).read(0, 640) == CONTENT[::-1][:640]
    assert len(reads) == asked


def _is_of(path, file):
    return path.name.startswith(cache_module._beginning(file._name))


def test_a_disk_that_is_full_ends_the_keeping_alone(address, tmp_path, monkeypatch, caplog):
    def full(self, content):
        raise OSError(28, "No space left on device")

    file = opened(address, tmp_path / "cache")
    monkeypatch.setattr(cache_module.Path, "write_bytes", full)
    assert file.read(0, 200) == CONTENT[:200]
    assert "it cannot be written (No space left on device)" in caplog.text


def test_a_file_that_was_written_again_is_another(address, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    file = opened(address, folder)
    file.read(0, 100)
    address._system.pipe_file(address._path, bytes(1000))
    monkeypatch.setattr("data.reading.files.CHECKED_AGAIN_SECONDS", 0.0)
    with pytest.raises(StoreChangedError):
        file.read(640, 64)
    assert opened(address, folder).read(0, 1000) == bytes(1000)


def test_a_store_reads_through_it(store, reads, tmp_path):
    address = f"memory://{tmp_path.name}/store"
    upload(store, address)
    local = TokenStore(store).split("train")
    for expect in (True, False):
        split = TokenStore(address, Cache(tmp_path / "cache", PLENTY)).split("train")
        before = len(reads)
        np.testing.assert_array_equal(split.piece(3, 20, 32), local.piece(3, 20, 32))
        assert (len(reads) > before) == expect


def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "cache")
    config = SimpleNamespace(data=SimpleNamespace(cache_dir=folder, cache_gb=1.0))
    with pytest.raises(ValueError, match=f"data.cache_dir={folder}: cannot be made"):
        rows._cache(config)
