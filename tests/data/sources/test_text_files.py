"""Documents of a folder, how they are split into parts and splits, and where errors point to."""

import gzip
import json
import os
import socket

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data.sources import text_files
from data.sources.file_formats import BUFFER, lines
from data.sources.parts import Broken, texts
from data.sources.text_files import TextFolder


def _lines(*texts, field="text"):
    return "".join(json.dumps({field: text, "url": "x"}) + "\n" for text in texts).encode()


def _parquet(path, values, name="text", kind=None):
    parquet.write_table(
        pyarrow.table({name: pyarrow.array(values, kind or pyarrow.string())}), path
    )


def test_all_kinds_of_files_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes("one\r\n\ntwo ü".encode())
    (tmp_path / "b.jsonl").write_bytes(_lines("three", "") + b"\n" + _lines("four\u2028x"))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(_lines("five")))
    (tmp_path / "sub" / "d.jsonl.gz").write_bytes(gzip.compress(_lines("six", "seven")))
    _parquet(tmp_path / "sub" / "e.parquet", ["eight", "", "nine ü"])
    two_frames = zstandard.compress(_lines("ten")) + zstandard.compress(_lines("eleven"))
    (tmp_path / "sub" / "f.json.zst").write_bytes(two_frames)
    (tmp_path / "ignored.csv").write_bytes(b"\xff")
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "e.txt").write_text("held out")
    folder = TextFolder(tmp_path)
    expected = ["one\r\n\ntwo ü", "three", "", "four\u2028x", "five", "six", "seven"]
    expected += ["eight", "", "nine ü", "ten", "eleven"]
    assert list(texts(folder, "train")) == expected
    assert list(texts(folder, "validation")) == ["held out"]


def test_files_of_c4_are_told_apart_by_their_names(tmp_path):
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(_lines(name)))
    folder = TextFolder(tmp_path)
    assert list(texts(folder, "train")) == ["c4-train.00000-of-01024"]
    assert list(texts(folder, "validation")) == ["c4-validation.00000-of-00008"]


def test_otherwise_a_hash_decides_and_copies_stay_together(tmp_path):
    originals = [f"document {i}" for i in range(2000)]
    (tmp_path / "a.jsonl").write_bytes(_lines(*originals))
    (tmp_path / "b.jsonl").write_bytes(_lines(*reversed(originals)))
    folder = TextFolder(tmp_path, validation_fraction=0.1)
    train, validation = (list(texts(folder, split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(originals * 2)
    assert not set(train) & set(validation)
    assert 300 < len(validation) < 500  # 400 is expected
    # Frozen: a document must not change sides from one version or process to the next.
    assert validation[:3] == ["document 40", "document 44", "document 59"]
    larger = texts(TextFolder(tmp_path, validation_fraction=0.2), "validation")
    assert set(validation) < set(larger)


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".jsonl.gz"])
def test_what_is_not_utf8_is_named_with_its_byte(tmp_path, ending):
    content = b"" if ending == ".txt" else _lines("fine", "also ü")
    content += b'{"text": "caf\xe9"}\n'
    file = tmp_path / f"bad{ending}"
    file.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    with pytest.raises(ValueError) as error:
        list(texts(TextFolder(tmp_path), "train"))
    assert f"{file}: not UTF-8 at byte {content.index(0xE9)} (0xE9)" in str(error.value)


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "cut of', "not valid JSON"),
        (b'{"content": "x", "url": "y"}', "no text in the field 'text', only content, url"),
        (b'{"text": 5}', "no text in the field 'text'"),
        (b"[1]", "only list"),
        (b'{"text": "\\ud800"}', "not Unicode"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, reason):
    file = tmp_path / "x.jsonl"
    file.write_bytes(_lines("one") + b"\n" + line + b"\n")
    with pytest.raises(ValueError) as error:
        list(texts(TextFolder(tmp_path), "train"))
    assert f"{file}:3: " in str(error.value)
    assert reason in str(error.value)


def test_another_field(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(_lines("one", field="content"))
    folder = TextFolder(tmp_path, text_field="content", validation_fraction=0.001)
    assert list(texts(folder, "train")) == ["one"]


DAMAGE = {
    "cut": lambda content: content[:-20],
    "cut to nothing": lambda content: b"",
    "cut to a half": lambda content: content[: len(content) // 2],
    "other": lambda content: b"something else",
    "changed": lambda content: content[:2000] + b"xxxx" + content[2004:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "ending, compress",
    [
        (".jsonl.gz", gzip.compress),
        (".jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress),
    ],
)
def test_a_damaged_compressed_file_is_named(tmp_path, damage, ending, compress):
    file = tmp_path / f"x{ending}"
    file.write_bytes(DAMAGE[damage](compress(_lines(*map(str, range(3000))))))
    with pytest.raises(ValueError) as error:
        list(texts(TextFolder(tmp_path), "train"))
    assert f"{file}: damaged or cut off" in str(error.value)


def test_files_of_other_kinds_are_told_of_and_folders_are_no_files(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "a file.jsonl").write_bytes(_lines("one"))
    (tmp_path / "folder.jsonl").mkdir()
    TextFolder(tmp_path)
    assert not caplog.text
    for name in ("b.json", "c.csv"):
        (tmp_path / "folder.jsonl" / name).write_text("x")
    folder = TextFolder(tmp_path, validation_fraction=0.001)
    assert list(texts(folder, "train")) == ["one"]
    assert "2 files of other kinds are not read, as folder.jsonl/b.json" in caplog.text


def test_folders_of_no_use_are_errors(tmp_path):
    with pytest.raises(ValueError) as error:
        TextFolder(tmp_path)
    assert f"source={tmp_path}: no files that end in .txt, .jsonl" in str(error.value)
    with pytest.raises(ValueError) as error:
        TextFolder(tmp_path / "missing")
    assert "no such folder" in str(error.value)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError) as error:
        TextFolder(tmp_path / "a.txt")
    assert "a.txt: is a file; give the folder" in str(error.value)


def test_the_fraction_is_checked(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError) as error:
            TextFolder(tmp_path, validation_fraction=fraction)
        assert f"validation_fraction={fraction}" in str(error.value)
    (tmp_path / "validation.txt").write_text("x")
    with pytest.raises(ValueError) as error:
        TextFolder(tmp_path, validation_fraction=0.1)
    assert "validation.txt" in str(error.value)


def test_the_description_follows_names_and_sizes_and_not_the_place(tmp_path):
    for name in ("one", "same", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("x" if name != "other" else "xy")
    one, same, other = (TextFolder(tmp_path / n).description() for n in ("one", "same", "other"))
    assert one == same != other


def test_a_damaged_parquet_file_and_a_wrong_column_are_named(tmp_path):
    file = tmp_path / "x.parquet"
    _parquet(file, ["a"] * 1000)
    with pytest.raises(ValueError) as error:
        list(texts(TextFolder(tmp_path, text_field="content"), "train"))
    assert f"{file}: no text in the column 'content', only text (string)" in str(error.value)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError) as error:
        list(texts(TextFolder(tmp_path), "train"))
    assert f"{file}: damaged or cut off Parquet" in str(error.value)


def test_broken_records_come_in_their_places(tmp_path):
    bad = b'{"text": "caf\xe9"}\n{"text": "cut\n{"other": 1}\n' + b"[" * 10**6 + b"\n"
    (tmp_path / "a.jsonl").write_bytes(_lines("one") + bad + _lines("two"))
    _parquet(tmp_path / "b.parquet", ["three", None, "four"])
    broken_utf8 = pyarrow.array([b"five", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken_utf8}), tmp_path / "c.parquet")
    folder = TextFolder(tmp_path, validation_fraction=1e-9)
    records = [record for part in folder.parts for record in folder.read(part)]
    found = [r.kind if isinstance(r, Broken) else r.text for r in records]
    assert found == [
        "one", "not UTF-8", "not JSON", "no text", "not JSON", "two",
        "three", "no text", "four", "five", "not UTF-8",
    ]  # fmt: skip


@pytest.mark.parametrize("part_bytes", [1, 50, 333, 10**6])
def test_parts_are_the_whole_however_they_are_cut(tmp_path, monkeypatch, part_bytes):
    documents = [f"{i}" * (i % 50) for i in range(300)]
    for start in range(0, 300, 100):
        content = _lines(*documents[start : start + 100])
        name = f"{start:03d}.jsonl"
        if start == 100:
            name, content = "100.jsonl.gz", gzip.compress(content)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(text_files, "MIN_PART", part_bytes)
    monkeypatch.setattr(text_files, "PART_SHARE", 10**6)
    folder = TextFolder(tmp_path, validation_fraction=1e-9)
    assert list(texts(folder, "train")) == documents
    assert [part.index for part in folder.parts] == list(range(len(folder.parts)))
    assert [part.shards["train"] for part in folder.parts] == list(range(len(folder.parts)))
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert sum(part.size for part in folder.parts) == size
    assert len(folder.parts) > size / part_bytes / 30
    for part in folder.parts:
        read = [record.read for record in folder.read(part)]
        assert read == sorted(read)
        assert not read or 0 < read[-1] <= part.size


def test_cutting_looks_at_each_slice_once(tmp_path, monkeypatch):
    """Hundreds of thousands of small files share a part."""
    looked = []

    class Counted(text_files.Slice):
        @property
        def stop(self):
            looked.append(self.file)
            return self[2]

    monkeypatch.setattr(text_files, "Slice", Counted)
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text("x" * i)
    parts = TextFolder(tmp_path).parts
    assert [len(part.content) for part in parts] == [100]
    assert parts[0].size == sum(range(100))
    assert len(looked) < 1000


def test_a_folder_as_large_as_c4_has_a_part_for_each_file(tmp_path, monkeypatch):
    for i in range(1024):
        name = f"c4-train.{i:05d}-of-01024.json.gz"
        (tmp_path / name).write_bytes(bytes(1000 + i % 30))
    monkeypatch.setattr(text_files, "MIN_PART", 100)
    assert len(TextFolder(tmp_path).parts) == 1024


def test_lines_at_the_edges_of_slices_are_read_once(tmp_path):
    content = b"a\n\nbb\r\n" + b"c" * (BUFFER + 5) + b"\nlast"
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    for cut in [*range(1, 12), BUFFER, BUFFER + 11, BUFFER + 15, len(content) - 1]:
        slices = [(0, cut), (cut, len(content))]
        assert b"".join(line for piece in slices for line, _ in lines(path, *piece)) == content
        for start, stop in slices:
            begins = start
            if start and content[start - 1 : start] != b"\n":
                begins = content.find(b"\n", start) + 1 or len(content)
            found = b"".join(line for line, _ in lines(path, start, stop))
            assert found == b"" or content.startswith(found, begins)


@pytest.mark.parametrize("kind", ["fifo", "socket", "link to nothing"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    (tmp_path / "a.txt").write_text("a")
    path = tmp_path / "b" / "c.jsonl"
    path.parent.mkdir()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    else:
        path.symlink_to("nowhere")
    with pytest.raises(ValueError, match=rf"b/c\.jsonl is a {kind} and no regular file"):
        TextFolder(tmp_path)
    path.rename(path.with_name("c.other"))  # which is not read
    TextFolder(tmp_path)


def test_folders_behind_links_are_read_once(tmp_path):
    folder, other = tmp_path / "texts", tmp_path / "elsewhere"
    folder.mkdir()
    other.mkdir()
    (folder / "a.txt").write_text("a")
    (other / "b.txt").write_text("b")
    (folder / "validation").symlink_to(other)
    source = TextFolder(folder)
    assert [list(texts(source, split)) for split in ("train", "validation")] == [["a"], ["b"]]
    (other / "again").symlink_to(folder)
    with pytest.raises(ValueError, match="is a folder that is read already, by a link"):
        TextFolder(folder)


def test_folders_and_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = TextFolder(tmp_path)

    def denied(name, *_):
        raise PermissionError(13, "Permission denied", str(name))

    monkeypatch.setattr("data.sources.parts.os.open", denied)  # root may read all
    with pytest.raises(ValueError, match=r"a\.txt: can't be read \(Permission denied\)"):
        source.files()
    monkeypatch.setattr("data.sources.text_files.os.scandir", denied)
    with pytest.raises(ValueError, match=r"can't be listed \(Permission denied\)"):
        TextFolder(tmp_path)


def test_files_of_other_content_are_told_apart(tmp_path):
    small, large = tmp_path / "a.txt", tmp_path / "b.txt"
    small.write_bytes(b"a" * 2**17)
    large.write_bytes(b"a" * (2**17 + 1))
    source = TextFolder(tmp_path)
    before = source.files()
    os.utime(small, (0, 0))  # all of it is looked at
    assert source.files() == before
    for path, change in ((small, b"b" * 2**17), (large, b"a" * 2**16 + b"b" + b"a" * 2**16)):
        whole, when = path.read_bytes(), path.stat().st_mtime_ns
        path.write_bytes(change)
        os.utime(path, ns=(when, when + 1))
        assert [n for n, now in source.files().items() if now != before[n]] == [path.name]
        path.write_bytes(whole)
        os.utime(path, ns=(when, when))
        assert source.files() == before
