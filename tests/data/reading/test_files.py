"""Stores behind addresses: the same rows, and the same word for what is missing or has changed."""

import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data.reading import files
from data.reading.loader import train_batches
from data.reading.store import StoreChangedError, TokenStore
from tests import buckets
from tests.training import runs

STREAM = [1, *range(100, 1000), 1]


def upload(folder, address):
    """Copies a store to an address; its file system."""
    system, path = fsspec.core.url_to_fs(address)
    for file in folder.iterdir():
        system.pipe_file(f"{path}/{file.name}", file.read_bytes())
    return system, path


@pytest.fixture
def bucket(monkeypatch):
    """Address of an empty bucket, for this process and those that it starts."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    with buckets.running() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        yield server.address


@pytest.fixture(params=["memory", "bucket"])
def address(request, tmp_path):
    """Of a folder that is not there yet."""
    if request.param == "memory":
        return f"memory://{tmp_path.name}/store"
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}/store"


@pytest.fixture
def shown(make_store, address):
    """A store on disk, its copy behind an address, and where that is."""
    local = make_store(train=[STREAM[:500], STREAM[500:]], validation=[STREAM[:50]])
    system, path = upload(local.path, address)
    return local, TokenStore(address), system, path


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\r\r", b"\n--"])
def test_the_bucket_of_these_tests_keeps_every_byte(bucket, end):
    system, path = fsspec.core.url_to_fs(f"{bucket}/file")
    system.pipe_file(path, end + b"\n" + end)
    assert system.cat_file(path) == end + b"\n" + end


def test_a_store_behind_an_address_is_the_same(shown):
    local, store, _, _ = shown
    assert store.fingerprint == local.fingerprint
    assert store.is_verified
    assert Path(store.tokenizer_path).read_bytes() == b"model"
    for name in ("train", "validation"):
        here, there = local.split(name), store.split(name)
        for seq_len in (7, 40):
            rows = here.num_rows(seq_len, partial=True)
            np.testing.assert_array_equal(
                there.piece(0, rows, seq_len), here.piece(0, rows, seq_len)
            )
        for found, expected in zip(there.document_lengths(), here.document_lengths(), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_what_is_missing_or_damaged_is_said_as_of_a_folder(shown, address):
    _, _, system, path = shown
    system.pipe_file(f"{path}/train-00001.bin", bytes(2 * len(STREAM[500:])))
    with pytest.raises(ValueError, match=f"{address}/train-00001.bin is corrupt: SHA-256 is"):
        TokenStore(address)
    system.pipe_file(f"{path}/train-00001.bin", b"short")
    with pytest.raises(ValueError, match=f"{address}/train-00001.bin has 5 bytes, expected"):
        TokenStore(address)
    system.rm_file(f"{path}/train-00001.bin")
    with pytest.raises(ValueError, match=f"{address}/train-00001.bin: no such file; delete"):
        TokenStore(address)
    system.rm_file(f"{path}/manifest.json")
    with pytest.raises(ValueError, match=rf"{address}: no finished token store \(manifest.json"):
        TokenStore(address)
    with pytest.raises(ValueError, match=r"no finished token store|cannot be read"):
        TokenStore(f"{address.partition('//')[0]}//no-such-bucket/store")


def test_a_file_that_changes_while_it_is_read_is_named(shown, address, monkeypatch):
    _, store, system, path = shown
    split = store.split("train")
    split.piece(0, 3, 5)
    monkeypatch.setattr(files, "CHECKED_AGAIN_SECONDS", 0.0)
    split.piece(0, 3, 5)
    system.pipe_file(f"{path}/train-00000.bin", bytes(2 * 500))
    with pytest.raises(StoreChangedError, match=f"{address}/train-00000.bin: was written to"):
        split.piece(0, 3, 5)
    system.pipe_file(f"{path}/train-00000.bin", bytes(10))
    with pytest.raises(StoreChangedError, match=f"{address}/train-00000.bin: was cut off"):
        split.piece(20, 3, 5)
    system.rm_file(f"{path}/train-00000.bin")
    with pytest.raises(StoreChangedError, match=f"{address}/train-00000.bin: is gone"):
        split.piece(0, 3, 5)


def test_a_network_that_dies_while_training_is_one_line(store, tmp_path, monkeypatch):
    """What the library could not read after all of its tries, the loop hears as an OSError."""
    address = f"memory://{tmp_path.name}/dies"
    system, _ = upload(store, address)
    split = TokenStore(address).split("train")
    with train_batches(
        split, seq_len=32, batch_size=4, seed=0, start_step=0, stop_step=1000, segment_ids=False,
        eos_id=1, block_rows=2, read_ahead=2,
    ) as batches:  # fmt: skip
        next(batches)

        def dies(*rest, **named):
            raise RuntimeError("connection reset\nand more lines")

        monkeypatch.setattr(type(system), "cat_file", dies)
        with pytest.raises(
            OSError, match=r"cannot be read \(RuntimeError: connection reset\)"
        ) as error:
            for _ in batches:
                pass
    assert address in str(error.value)


def test_addresses_that_nothing_reads_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="nothing://x/y: Protocol not known: nothing"):
        TokenStore("nothing://x/y")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for protocol in ("gs", "gcs"):  # if it was imported before
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(ValueError, match=r"gs://x/y: .*; `pip install -r requirements-bucket.txt`"):
        TokenStore("gs://x/y")


@pytest.mark.slow
def test_a_bucket_that_is_gone_ends_the_run_in_one_line(store, bucket, arguments, tmp_path):
    upload(store, f"{bucket}/store")
    gone = [f"--config.data.store={bucket}/other", "--config.data.requests=4"]
    done = runs.train(arguments, tmp_path / "run", *gone)
    assert done.returncode == 2
    assert f"{bucket}/other: no finished token store" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_store_is_listed_and_not_asked_for_file_by_file(shown, address, monkeypatch, caplog):
    asked = []
    info = files.Address.info
    monkeypatch.setattr(files.Address, "info", lambda self: asked.append(str(self)) or info(self))
    store = TokenStore(address)
    assert len(asked) == 1  # of the manifest
    monkeypatch.setattr(files, "CHECKED_AGAIN_SECONDS", 0.0)
    store.split("train").piece(0, 3, 5)  # a listing tells versions as a look at the file does

    def nothing(self):
        raise OSError(5, "no listing here")

    monkeypatch.setattr(files.Address, "list_files", nothing)
    with caplog.at_level("INFO"):
        assert TokenStore(address).fingerprint == store.fingerprint
    assert "asking for each file by itself (no listing here)" in caplog.text


def test_looking_again_costs_one_listing_however_many_files_are_read(
    make_store, tmp_path, monkeypatch
):
    local = make_store(train=[STREAM] * 30)
    address = f"memory://{tmp_path.name}/many"
    system, path = upload(local.path, address)
    clock = [0.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: clock[0])
    split = TokenStore(address).split("train")
    asked = []
    for name in ("info", "list_files"):
        look = getattr(files.Address, name)
        monkeypatch.setattr(
            files.Address, name, lambda self, look=look: asked.append(str(self)) or look(self)
        )
    for i in range(300):  # each file once in 75 seconds
        clock[0] += 2.5
        split.piece(i % 30 * 90, 1, 10)
    assert asked == [address] * 12  # once a minute
    system.pipe_file(f"{path}/README", b"no file of the store")
    system.pipe_file(f"{path}/train-00007.bin", bytes(2 * len(STREAM)))
    clock[0] += 60  # also where another file is read
    with pytest.raises(StoreChangedError, match=r"train-00007\.bin: was written to"):
        split.piece(0, 1, 10)


def test_a_bucket_that_does_not_answer_is_no_reason_to_prepare_again(shown, address, monkeypatch):
    def dies(self):
        raise OSError(5, "cannot be read (timed out)")

    monkeypatch.setattr(files.Address, "read_bytes", dies)
    with pytest.raises(ValueError, match=r"\(timed out\)\); start again once it can be") as error:
        TokenStore(address)
    assert "prepare_data" not in str(error.value)
