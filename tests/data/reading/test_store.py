"""Rows of the stream, over shards and to its end, and every way in which a store can be damaged."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.reading.manifest import MANIFEST, read_manifest
from data.reading.store import StoreChangedError, TokenStore
from data.sealed import seal
from tests.data.padded import documents_of, padded_rows

STREAM = [1, *range(100, 110), 1, *range(200, 211), 1]  # 24 tokens, 2 documents


def _shards(*sizes):
    cuts = np.cumsum([0, *sizes])
    return [STREAM[a:b] for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("sizes", [(24,), (7, 17), (1, 1, 1, 20, 1), (8, 8, 8)])
@pytest.mark.parametrize("seq_len", [1, 4, 5, 8, 23])
def test_rows_are_cut_from_the_stream_whatever_the_shards(make_store, sizes, seq_len):
    split = make_store(train=_shards(*sizes)).split("train")
    assert (split.num_tokens, split.num_documents, split.num_bytes) == (24, 2, 72)
    count = split.num_rows(seq_len)
    assert count == 23 // seq_len
    rows = split.rows(np.arange(count), seq_len)
    assert rows.dtype == np.int32
    expected = [STREAM[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)]
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("seq_len", [1, 5, 7, 23, 30])
def test_padded_rows_reach_every_target_exactly_once(make_store, seq_len):
    split = make_store(validation=_shards(9, 15)).split("validation")
    count = split.num_rows(seq_len, partial=True)
    rows, valid = padded_rows(split, range(count), seq_len, pad_id=0)
    assert rows.shape == (count, seq_len + 1)
    targets = [token for row, n in zip(rows, valid) for token in row[1 : n + 1]]
    assert targets == STREAM[1:]
    assert (rows[-1, valid[-1] + 1 :] == 0).all()


def test_rows_come_in_the_order_asked_for(make_store):
    split = make_store(train=_shards(7, 17)).split("train")
    np.testing.assert_array_equal(split.rows([3, 0, 3], 5), split.rows(range(4), 5)[[3, 0, 3]])


def test_rows_that_are_not_there_are_an_error(make_store):
    split = make_store(train=_shards(24)).split("train")
    for ids in ([4], [0, -1]):
        with pytest.raises(ValueError, match="rows of 5 tokens"):
            split.rows(ids, 5)


def test_large_vocabularies(make_store):
    stream = [1, 70_000, 2**31 - 1, 1]
    split = make_store(dtype="<u4", train=[stream]).split("train")
    assert split.rows([0], 3).tolist() == [stream]


def test_the_fingerprint_follows_the_content_and_not_the_place(make_store):
    one, same = make_store(train=_shards(24)), make_store(train=_shards(24))
    other = make_store(train=[STREAM[:-2] + [5, 1]])
    assert one.path != same.path
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint


def test_a_changed_byte_is_found_and_named(make_store):
    store = make_store(train=_shards(7, 17))
    path = store.path / "train-00001.bin"
    expected = json.loads((store.path / MANIFEST).read_text())["splits"]["train"]["shards"][1]
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    with pytest.raises(ValueError) as error:
        TokenStore(store.path)
    message = str(error.value)
    assert str(path) in message
    assert expected["sha256"] in message
    assert "prepare_data.py" in message


def test_a_large_store_is_hashed_on_request_only(make_store, monkeypatch):
    store = make_store(train=_shards(7, 17))
    path = store.path / "train-00001.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    monkeypatch.setattr("data.reading.store.VERIFIED_BYTES", 47)  # it has 48
    large = TokenStore(store.path)
    with pytest.raises(ValueError) as error:
        large.verify()
    assert "train-00001.bin is corrupt" in str(error.value)


def test_a_changed_tokenizer_is_found(make_store):
    store = make_store(train=_shards(24))
    (store.path / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(ValueError) as error:
        TokenStore(store.path)
    assert "tokenizer.model is corrupt" in str(error.value)


@pytest.mark.parametrize("change", ["shorter", "longer", "missing"])
def test_sizes_are_checked_always(make_store, change, monkeypatch):
    monkeypatch.setattr("data.reading.store.VERIFIED_BYTES", 0)
    store = make_store(train=_shards(7, 17))
    path = store.path / "train-00000.bin"
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-2] if change == "shorter" else content + b"\0\0")
    with pytest.raises(ValueError) as error:
        TokenStore(store.path)
    assert "train-00000.bin" in str(error.value)


def test_what_is_no_store_is_an_error(tmp_path, make_store):
    with pytest.raises(ValueError) as error:
        TokenStore(tmp_path)
    assert "prepare_data.py" in str(error.value)
    store = make_store(train=_shards(24))
    with pytest.raises(ValueError) as error:
        store.split("test")
    assert "'test', only train" in str(error.value)
    (store.path / MANIFEST).write_text('{"format": 2}')
    with pytest.raises(ValueError) as error:
        TokenStore(store.path)
    assert "format=2, this code reads 3" in str(error.value)


def test_no_byte_of_the_manifest_can_have_a_bit_flipped(make_store):
    store = make_store(train=_shards(7, 17), validation=_shards(24))
    path = store.path / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"manifest\.json: .*prepare"):
            read_manifest(store.path)
    for damaged in (b"", whole[:-2], whole[: len(whole) // 2], b"[]", b"[" * 10**5, b"\0" * 99):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json: (can't be read|damaged or edited)"):
            TokenStore(store.path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda m: m["splits"]["train"].update(tokens=23),
            "train split says 23 tokens, its shards",
        ),
        (lambda m: m["splits"]["train"]["shards"][0].update(documents=-1), "says 2 documents"),
        (lambda m: m.update(eos_id=2**16), "eos_id=65536 is outside of the vocabulary of 65536"),
        (lambda m: m.update(vocab_size=2**16 + 1), "dtype=<u2 does not hold a vocabulary of 65537"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(make_store, change, message):
    store = make_store(train=_shards(7, 17))
    path = store.path / MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged or edited"):
        TokenStore(store.path)
    path.write_text(json.dumps(seal(content)))
    with pytest.raises(ValueError) as error:
        TokenStore(store.path)
    assert message in str(error.value)


def test_whatever_rows_follow_from_is_in_the_fingerprint(make_store):
    store = make_store(train=_shards(7, 17))
    path = store.path / MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    seen = {store.fingerprint}
    for changes in ({"eos_id": 2}, {"pad_id": 2}, {"vocab_size": 300}):
        path.write_text(json.dumps(seal(content | changes)))
        seen.add(TokenStore(store.path).fingerprint)
    split = content["splits"]["train"]
    split["bytes"] += 1
    split["shards"][0]["bytes"] += 1
    path.write_text(json.dumps(seal(content)))
    seen.add(TokenStore(store.path).fingerprint)
    assert len(seen) == 5


def _rows(store):
    return store.split("train").rows([0, 3, 1], 5)


def _later(path, content):
    """Written as it would be a moment later: the clock of a file system has coarse ticks."""
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**7))


@pytest.mark.parametrize("was_read", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda path, content: _later(path, b"\xff" + content[1:]),  # in place, of the same size
        lambda path, content: os.truncate(path, 8),
        lambda path, content: os.truncate(path, 0),
        lambda path, content: _later(path, content + b"\0\0"),
    ],
)
def test_a_store_that_is_written_over_while_it_is_read_is_an_error(make_store, was_read, change):
    store = make_store(train=_shards(7, 17))
    if was_read:
        _rows(store)
    path = store.path / "train-00001.bin"
    change(path, path.read_bytes())
    for _ in range(2):  # it stays one
        with pytest.raises(StoreChangedError) as error:
            _rows(store)
        assert f"{path}: was" in str(error.value)
        assert "prepare it in another folder" in str(error.value)
    store.split("train").rows([0], 5)  # of another file


def test_a_store_that_is_replaced_while_it_is_read_gives_its_own_rows(make_store):
    store = make_store(train=_shards(24))
    before = _rows(store)
    path = store.path / "train-00000.bin"
    other = store.path / "other"
    other.write_bytes(path.read_bytes()[::-1])
    other.replace(path)
    np.testing.assert_array_equal(_rows(store), before)
    path.unlink()
    np.testing.assert_array_equal(_rows(store), before)
    (store.path / "train-00000.offsets").unlink()
    with pytest.raises(StoreChangedError, match="offsets: is gone since the store was opened"):
        list(store.split("train").document_lengths())


DOCUMENTS = [[5, 6], [], [7], [8, 9, 10], []]


@pytest.fixture
def documents(make_store):
    shards = [[1, 5, 6, 1, 1], [7, 1], [8, 9, 10, 1, 1]]
    return make_store(train=shards).split("train")


def test_documents_are_found_by_their_lengths(documents):
    assert [document.tolist() for document in documents_of(documents)] == DOCUMENTS
    lengths = [array.tolist() for array in documents.document_lengths()]
    assert lengths == [[2, 0], [1], [3, 0]]


def test_every_token_knows_its_document(documents):
    found = [documents.document_at(i) for i in range(documents.num_tokens)]
    assert found == [-1, 0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4]
    with pytest.raises(ValueError) as error:
        documents.document_at(12)
    assert "position 12: the split has 12 tokens" in str(error.value)


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
from data.reading.store import TokenStore
split = TokenStore(sys.argv[1]).split("train")
print(split.rows(range(split.num_rows(1)), 1)[:, 1].sum())
print(sum(int(lengths.sum()) for lengths in split.document_lengths()))
"""


@pytest.mark.parametrize("hard", [4096, 400])
def test_more_shards_than_files_may_be_open(make_store, hard):
    store = make_store(train=[[1], *[[2 + i, 1] for i in range(300)]])
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(store.path), "64", str(hard)],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    if hard == 400:
        assert "ValueError: the data need 858 open files and this system allows 400" in done.stderr
    else:
        assert done.stdout.split() == [str(sum(2 + i for i in range(300)) + 300), "300"]


SEVERAL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
from data.reading.store import TokenStore
splits = [TokenStore(path).split("train") for path in sys.argv[1:]]
for split in splits:
    print(split.rows(range(split.num_rows(1)), 1)[:, 1].sum())
"""


def test_stores_of_a_mixture_have_open_files_enough_together(make_store):
    stores = [make_store(train=[[1], *[[2 + i, 1] for i in range(400)]]) for _ in range(3)]
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, *(str(store.path) for store in stores)],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [str(sum(range(2, 402)) + 400)] * 3, done.stderr


def test_a_changed_offsets_file_is_found(make_store):
    store = make_store(train=_shards(24))
    path = store.path / "train-00000.offsets"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError) as error:
        TokenStore(store.path)
    assert "train-00000.offsets is corrupt" in str(error.value)
