"""A store holds every document once, is the same after any crash, and is never mixed up."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from data import atomic
from data.preparation import prepare as prepare_module
from data.preparation import shards as shards_module
from data.preparation.config import StoreConfig
from data.preparation.estimate import estimate
from data.preparation.prepare import prepare
from data.reading.store import TokenStore
from data.sources import text_files
from data.sources.parts import texts
from data.sources.text_files import TextFolder
from data.tokenizer import SPACE_MARK, Tokenizer
from tests.data.padded import documents_of, padded_rows
from tests.system import contents

DOCUMENTS = 60
CONTROL = "".join(map(chr, range(32))) + "\x7f\x80\u2028\ufeff"


@pytest.fixture
def source(tmp_path):
    """Files of several kinds; documents of many lengths, whitespace and other alphabets."""
    folder = tmp_path / "source"
    folder.mkdir()
    originals = [
        f"{i} {SPACE_MARK} In\n\n the  beginning ü 日 " * (i % 7) + CONTROL * (i % 3)
        for i in range(DOCUMENTS)
    ]
    assert "" in originals
    for i in range(20):
        (folder / f"{i:02d}.txt").write_bytes(originals[i].encode())
    for start in (20, 40):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in originals[start : start + 20])
        (folder / f"{start}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def run(source, tmp_path, tokenizer_path):
    """Prepares the source in small batches and parts."""

    def run_into(name="store", workers=1, **changes):
        fields = {"tokenizer": tokenizer_path, "validation_fraction": 0.2} | changes
        return prepare(StoreConfig(str(source), **fields), tmp_path / name, workers=workers)

    return run_into


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(shards_module, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(text_files, "MIN_PART", 1000)


def _stream(folder, name):
    split = TokenStore(folder).split(name)
    return split.rows([0], split.num_tokens - 1)[0].tolist()


def _expected(source, tokenizer, split):
    """EOS, and then every document with an EOS after it."""
    documents = list(texts(TextFolder(source, validation_fraction=0.2), split))
    ids = [tokenizer.encode(text) + [tokenizer.eos_id] for text in documents]
    return documents, [tokenizer.eos_id] + [token for document in ids for token in document]


def test_the_store_is_eos_and_then_every_document_with_eos(run, source, tmp_path):
    manifest = run()
    store = TokenStore(tmp_path / "store")
    tokenizer = Tokenizer(store.tokenizer_path)
    total = 0
    for name in ("train", "validation"):
        split = store.split(name)
        documents, tokens = _expected(source, tokenizer, name)
        assert _stream(tmp_path / "store", name) == tokens
        assert split.num_documents == len(documents)
        assert split.num_bytes == sum(len(text.encode()) for text in documents)
        found = [tokenizer.decode(document) for document in documents_of(split)]
        assert found == documents
        assert len(manifest["splits"][name]["shards"]) > 3
        total += len(documents)
    assert total == DOCUMENTS
    assert manifest["broken"] == {}


def test_documents_longer_than_a_row_and_rows_of_many_documents(run, source, tmp_path):
    long = "".join(f"{i} " for i in range(20_000))
    (source / "99.txt").write_text(long)
    run()
    split = TokenStore(tmp_path / "store").split("train")
    tokenizer = Tokenizer(tmp_path / "store" / "tokenizer.model")
    _, tokens = _expected(source, tokenizer, "train")
    for seq_len in (3, 1024):
        rows, valid = padded_rows(split, range(split.num_rows(seq_len, partial=True)), seq_len, 0)
        targets = [token for row, n in zip(rows, valid) for token in row[1 : n + 1].tolist()]
        assert targets == tokens[1:]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_nothing(run, tmp_path, workers):
    run("reference")
    run(workers=workers)
    assert contents(tmp_path / "store") == contents(tmp_path / "reference")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_the_parts_changes_nothing(run, tmp_path, monkeypatch, seed):
    run("reference")
    original = prepare_module.run_parts

    def shuffled(job, todo, *arguments):
        order = np.random.default_rng(seed).permutation(len(todo))
        assert len(order) > 5
        return original(job, [todo[i] for i in order], *arguments)

    monkeypatch.setattr(prepare_module, "run_parts", shuffled)
    run()
    assert contents(tmp_path / "store") == contents(tmp_path / "reference")


def test_a_tokenizer_is_trained_on_the_train_split_alone(run, source, tmp_path):
    (source / "validation.jsonl").write_text(json.dumps({"text": "ЖЖЖ " * 2000}) + "\n")
    arguments = {"tokenizer": None, "validation_fraction": None}
    manifest = run(vocab_size=318, **arguments)
    assert manifest["vocab_size"] == TokenStore(tmp_path / "store").vocab_size == 318
    tokenizer = Tokenizer(tmp_path / "store" / "tokenizer.model")
    assert len(tokenizer.encode("日")) == 1
    assert len(tokenizer.encode("Ж")) == 2  # its bytes: never seen in training
    run("again", vocab_size=318, **arguments)
    assert contents(tmp_path / "store") == contents(tmp_path / "again")


def test_a_tokenizer_that_loses_newlines_is_used_with_a_warning(run, tmp_path, caplog, monkeypatch):
    run("reference")
    assert "loses" not in caplog.text
    monkeypatch.setattr(Tokenizer, "lost", lambda self: ["newlines"])
    run()
    assert "loses newlines in decode(encode(text))" in caplog.text


class Crash(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.slow
@pytest.mark.parametrize(("when", "drop"), [("before", True), ("after", True), ("after", False)])
def test_a_crash_at_any_write_leaves_what_can_be_continued(run, tmp_path, monkeypatch, when, drop):
    """Also at those of looking for duplicates, which come before all others."""

    def publish_or_crash(temporary, path):
        number = next(calls)
        assert not path.exists()
        if number == count and when == "before":
            raise Crash
        publish(temporary, path)
        if number == count:
            raise Crash

    monkeypatch.setattr(text_files, "MIN_PART", 4000)
    run("reference", drop_duplicates=drop)
    reference = contents(tmp_path / "reference")
    publish = atomic.publish
    crashes = 0
    for count in range(1, 200):
        calls = iter(range(1, 1000))
        monkeypatch.setattr(atomic, "publish", publish_or_crash)
        name = f"store{count}"
        try:
            run(name, drop_duplicates=drop)
        except Crash:
            crashes += 1
        else:
            break
        monkeypatch.setattr(atomic, "publish", publish)
        left = contents(tmp_path / name)
        if "manifest.json" not in left:
            with pytest.raises(ValueError):
                TokenStore(tmp_path / name)
            if "progress/request.json" in left:
                (tmp_path / name / "train-00000.bin.1.tmp").write_bytes(b"what a kill leaves")
        run(name, drop_duplicates=drop)
        assert contents(tmp_path / name) == reference
    assert crashes > (10 if drop else 5)


def test_finished_parts_are_not_written_again(run, tmp_path, monkeypatch):
    write_json = prepare_module.write_json

    def crash_at_the_manifest(path, content):
        if path.name == "manifest.json":
            raise Crash
        write_json(path, content)

    monkeypatch.setattr(prepare_module, "write_json", crash_at_the_manifest)
    with pytest.raises(Crash):
        run()
    monkeypatch.setattr(prepare_module, "write_json", write_json)
    monkeypatch.setattr(prepare_module, "write_part", None)  # any new one would fail
    run()
    TokenStore(tmp_path / "store")


@pytest.fixture
def crash_at(monkeypatch):
    """Lets preparation crash where it would write a file of JSON whose name begins so."""

    def arm(start):
        def crash(path, content):
            if start and path.name.startswith(start):
                raise Crash
            write_json(path, content)

        monkeypatch.setattr(prepare_module, "write_json", crash)

    write_json = prepare_module.write_json
    return arm


def _other_bytes(path):
    """Other content of the same size, as if nothing had happened."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_a_source_that_changes_before_the_store_is_finished_is_refused(
    run, source, tmp_path, crash_at, drop_duplicates
):
    crash_at("part-00003")
    with pytest.raises(Crash):
        run(drop_duplicates=drop_duplicates)
    crash_at("")
    whole, path = (source / "01.txt").read_bytes(), source / "01.txt"
    _other_bytes(path)
    assert path.read_bytes() != whole
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            run(drop_duplicates=drop_duplicates)
        assert "files of the source have changed since this prep" in str(error.value)
        assert "as 01.txt; put them back" in str(error.value)
    path.write_bytes(whole)
    run(drop_duplicates=drop_duplicates)
    run("reference", drop_duplicates=drop_duplicates)
    assert contents(tmp_path / "store") == contents(tmp_path / "reference")


def test_a_source_that_changes_while_it_is_read_is_refused(run, source, tmp_path, monkeypatch):
    run_parts = prepare_module.run_parts

    def and_change(*arguments):
        yield from run_parts(*arguments)
        _other_bytes(source / "01.txt")

    monkeypatch.setattr(prepare_module, "run_parts", and_change)
    with pytest.raises(ValueError, match=r"have changed while they were read, as 01\.txt"):
        run()
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_before_there_are_shards_a_changed_source_is_begun_anew(run, source, tmp_path, crash_at):
    crash_at("tokenizer")
    with pytest.raises(Crash):
        run(tokenizer=None, vocab_size=318)
    crash_at("")
    (tmp_path / "store" / "train-00000.bin.1.tmp").write_bytes(b"what a kill leaves")
    (source / "20.jsonl").write_text('{"text": "other"}\n')
    run(tokenizer=None, vocab_size=318)
    run("reference", tokenizer=None, vocab_size=318)
    assert contents(tmp_path / "store") == contents(tmp_path / "reference")


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "request.json", "tokenizer.json", "part-00001"]
)
def test_damage_to_what_is_finished_is_refused(run, tmp_path, crash_at, name):
    crash_at("part-00003")
    with pytest.raises(Crash):
        run()
    crash_at("")
    (path,) = (tmp_path / "store").rglob(f"{name}*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        run()
    assert str(path) in str(error.value)


def test_records_of_parts_that_were_swapped_are_refused(run, tmp_path, crash_at):
    crash_at("part-00003")
    with pytest.raises(Crash):
        run()
    crash_at("")
    one, two = (tmp_path / "store" / "progress" / f"part-0000{i}.json" for i in (1, 2))
    two.write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match="is that of part 1"):
        run()


def test_damage_to_a_finished_store_is_not_called_complete(run, tmp_path):
    run()
    path = tmp_path / "store" / "train-00001.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"train-00001\.bin is corrupt"):
        run()


def test_a_finished_store_is_left_alone(run, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    first = run()
    monkeypatch.setattr(TextFolder, "read", None)  # reading the source would fail
    assert run() == first
    assert f"{tmp_path / 'store'} is complete already" in caplog.text


def test_other_arguments_or_other_files_are_refused(run, source, tmp_path):
    run()
    before = contents(tmp_path / "store")
    cases = [
        ({"tokenizer": None, "vocab_size": 300}, "vocab_size: None there, 300 asked for"),
        ({"validation_fraction": 0.3}, "source.validation: 0.2 there, 0.3 asked for"),
        ({"drop_duplicates": True}, "drop_duplicates: False there, True asked for"),
    ]
    for changes, difference in cases:
        with pytest.raises(ValueError) as error:
            run(**changes)
        assert difference in str(error.value)
    (source / "00.txt").write_text("longer than before")
    with pytest.raises(ValueError) as error:
        run()
    assert "source.file_bytes" in str(error.value)
    assert contents(tmp_path / "store") == before


def test_a_store_of_another_format_is_refused(run, tmp_path):
    run()
    path = tmp_path / "store" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(ValueError) as error:
        run()
    assert "format=1, this code reads 3" in str(error.value)


def test_a_folder_with_other_things_in_it_is_refused(run, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError) as error:
        run()
    assert "thesis.tex" in str(error.value)
    assert contents(tmp_path / "store") == {"thesis.tex": b"years of work"}


def test_an_output_that_no_folder_can_be_made_at_is_an_error(run, tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/store"):
        with pytest.raises(ValueError) as error:
            run(name)
        assert f"output={tmp_path / name}: no folder can be made there" in str(error.value)


def test_a_mistake_before_the_first_shard_can_be_mended(run, source, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MIN_PART", 10**6)
    bad = source / "15.txt"
    good = bad.read_bytes()
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError) as error:
        run()
    assert f"{bad}: not UTF-8 at byte 0" in str(error.value)
    with pytest.raises(ValueError) as error:
        run(tokenizer=None, vocab_size=30_000)
    bad.write_bytes(good)
    run()
    assert TokenStore(tmp_path / "store").split("train").num_documents > 30


BROKEN = [b'{"text": "caf\xe9"}\n', b'{"text": "cut\n', b"[3]\n", b'{"text": "\\ud800"}\n']


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_broken_records_are_skipped_counted_and_shown(run, source, tmp_path, caplog, workers):
    run("reference")
    for name in ("20.jsonl", "40.jsonl"):
        lines = (source / name).read_bytes().splitlines(keepends=True)
        for i, line in enumerate(BROKEN):
            lines.insert(3 * i, line)
        (source / name).write_bytes(b"".join(lines))
    manifest = run(max_broken=8, workers=workers)
    assert manifest["max_broken"] == 8
    assert manifest["broken"] == {"no text": 2, "not JSON": 2, "not UTF-8": 2, "not Unicode": 2}
    for name in ("train", "validation"):  # shards are cut elsewhere, the stream is the same
        stream, expected = (_stream(tmp_path / n, name) for n in ("store", "reference"))
        assert stream == expected
    assert f"skipped: {source / '20.jsonl'}: not UTF-8 at byte 13 (0xE9)" in caplog.text
    with pytest.raises(ValueError) as error:
        run("other", max_broken=7, workers=workers)
    assert "max_broken=7: more broken records than that (2 no text, 2 not" in str(error.value)
    assert f"{source / '20.jsonl'}: not UTF-8" in str(error.value)
    assert not (tmp_path / "other" / "manifest.json").exists()
    run("other", max_broken=8, workers=workers)  # goes on
    assert contents(tmp_path / "other") == contents(tmp_path / "store")
    assert run(max_broken=9) == manifest  # the finished store is as good for a wider limit
    with pytest.raises(ValueError) as error:
        run(max_broken=7)
    assert "max_broken=7" in str(error.value)
    assert "lacks 8 broken records" in str(error.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_of_equal_documents_the_first_stays(tmp_path, tokenizer_path, monkeypatch, workers):
    monkeypatch.setattr(text_files, "MIN_PART", 1)
    files = {
        "a.json.gz": ["one", "two", "one", "held out", ""],
        "b.json.gz": ["two", "three", ""],
        "validation.json.gz": ["held out", "held out", "four"],
    }
    source = tmp_path / "source"
    source.mkdir()
    for name, documents in files.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (source / name).write_bytes(gzip.compress(f"[]\n{lines}".encode()))
    config = StoreConfig(str(source), tokenizer=tokenizer_path, drop_duplicates=True, max_broken=3)
    manifest = prepare(config, tmp_path / "store", workers=workers)
    store, tokenizer = TokenStore(tmp_path / "store"), Tokenizer(tokenizer_path)
    found = {
        name: [tokenizer.decode(document) for document in documents_of(store.split(name))]
        for name in ("train", "validation")
    }
    assert found == {"train": ["one", "two", "", "three"], "validation": ["held out", "four"]}
    dropped = {name: split["duplicates_dropped"] for name, split in manifest["splits"].items()}
    assert dropped == {"train": 4, "validation": 1}


def test_a_part_without_a_document_of_a_split_has_no_shard(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setattr(text_files, "MIN_PART", 1)
    source = tmp_path / "source"
    source.mkdir()
    for i in range(40):
        (source / f"{i:02d}.txt").write_text(f"{i}")
    config = StoreConfig(str(source), tokenizer=tokenizer_path, validation_fraction=0.5)
    manifest = prepare(config, tmp_path / "store")
    counts = {name: len(split["shards"]) for name, split in manifest["splits"].items()}
    assert sum(counts.values()) in (40, 41)  # the first shard has an EOS, whatever else
    assert TokenStore(tmp_path / "store").split("train").num_documents + 1 >= counts["train"]


def test_a_split_without_documents_is_an_error(tmp_path, tokenizer_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_text("all I have")  # falls on the validation side
    config = StoreConfig(str(tmp_path / "source"), tokenizer=tokenizer_path)
    with pytest.raises(ValueError) as error:
        prepare(config, tmp_path / "store")
    assert "no documents for the train split" in str(error.value)


@pytest.mark.parametrize(
    "source, changes, reason",
    [
        ("bible", {"vocab_size": 300, "tokenizer": "x"}, "give one of the two"),
        ("bible", {}, "give one of the two"),
        ("bible", {"vocab_size": 300, "validation_fraction": 0.1}, "validation_fraction=0.1"),
        ("bible", {"vocab_size": 300, "text_field": "x"}, "text_field=x"),
        ("bible", {"vocab_size": 300, "max_broken": -1}, "max_broken=-1: must be at least 0"),
        ("bibel", {"vocab_size": 300}, "source=bibel: no such folder, and no other source"),
        ("bible", {"tokenizer": "missing.model"}, "tokenizer=missing.model: no such file"),
    ],
)
def test_wrong_arguments_are_errors_and_leave_no_folder(tmp_path, source, changes, reason):
    with pytest.raises(ValueError) as error:
        prepare(StoreConfig(source, **changes), tmp_path / "store")
    assert reason in str(error.value)
    assert not (tmp_path / "store").exists()


def test_no_workers_are_an_error(tmp_path):
    with pytest.raises(ValueError) as error:
        prepare(StoreConfig("bible", vocab_size=300), tmp_path / "store", workers=0)
    assert "workers=0: must be at least 1" in str(error.value)
    assert not (tmp_path / "store").exists()


def test_ids_above_65535_need_four_bytes(run, tmp_path, monkeypatch):
    class Large(Tokenizer):
        def __init__(self, path):
            super().__init__(path)
            self.vocab_size = 2**16 + 1

        def encode_arrays(self, texts, num_threads=1):
            return [np.full(len(text), 2**16, np.int32) for text in texts]

    monkeypatch.setattr(prepare_module, "Tokenizer", Large)
    monkeypatch.setattr(text_files, "MIN_PART", 10**6)
    assert run()["dtype"] == "<u4"
    assert TokenStore(tmp_path / "store").split("train").rows([0], 5)[0].max() == 2**16


def test_two_at_once_in_one_folder(run, source, tmp_path, monkeypatch):
    """The second one is told so, and what the first one writes is left alone."""
    write, told = shards_module.write_part, []

    def meanwhile(*arguments, **options):
        if not told:
            begun = tmp_path / "store" / "train-00000.bin.tmp"
            begun.write_bytes(b"the first one's")
            with pytest.raises(ValueError) as error:
                run(max_broken=1)
            told.append(str(error.value))
            assert begun.read_bytes() == b"the first one's"
            begun.unlink()
        return write(*arguments, **options)

    monkeypatch.setattr(prepare_module, "write_part", meanwhile)
    run()
    assert "store: another process prepares it; wait for its end" in told[0]
    assert run() == run()  # and none is at work any more
    run("other")
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


def test_a_tokenizer_may_lie_behind_an_address(run, tmp_path, tokenizer_path):
    fsspec = pytest.importorskip("fsspec")
    address = f"memory://{tmp_path.name}/mine.model"
    system, path = fsspec.core.url_to_fs(address)
    system.pipe_file(path, Path(tokenizer_path).read_bytes())
    run("here")
    run("there", tokenizer=address)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    config = StoreConfig(str(tmp_path / "source"), tokenizer=address)
    assert estimate(config, tmp_path / "store").tokens > 0
