"""Exact duplicates: the same ones in any number of ranges, and nothing else is dropped."""

import random

import pytest

from data.preparation import duplicates
from data.preparation.duplicates import (
    document_rank,
    find_duplicates,
    hash_part,
    rank_place,
    read_duplicates,
)
from data.sources.parts import Broken, Document, number_parts


class _Source:
    """Documents given as lists of (split, text); None is a broken record."""

    def __init__(self, *parts):
        self.parts = number_parts((("train", "validation"), len(part), part) for part in parts)

    def read(self, part):
        for read, record in enumerate(part.content, start=1):
            yield Document(*record, read) if record else Broken("no text", "x")


def _dropped(source, folder):
    paths = [folder / f"{part.index}.hashes" for part in source.parts]
    for part, path in zip(source.parts, paths):
        hash_part(source, part, path, lambda text, read: None)
    find_duplicates(paths, folder / "found")
    return [sorted(read_duplicates(folder / "found", part.index)) for part in source.parts]


def test_the_first_stays_and_validation_is_before_train(tmp_path):
    source = _Source(
        [("train", "a"), None, ("train", "b"), ("train", "a"), ("train", "c")],
        [("train", "a "), ("train", ""), ("train", "b")],
        [],
        [("validation", "c"), ("train", ""), ("validation", "c")],
    )
    assert _dropped(source, tmp_path) == [[2, 3], [2], [], [1, 2]]


@pytest.mark.parametrize("range_documents", [1, 7, 50, 10**6])
def test_the_number_of_ranges_changes_nothing(tmp_path, monkeypatch, range_documents):
    monkeypatch.setattr(duplicates, "RANGE_DOCUMENTS", range_documents)
    rng = random.Random(0)
    parts = [[("train", str(rng.randrange(150))) for _ in range(60)] for _ in range(5)]
    seen, expected = set(), []
    for part in parts:
        expected.append([])
        for i, (_, text) in enumerate(part):
            if text in seen:
                expected[-1].append(i)
            seen.add(text)
    assert sum(map(len, expected)) > 100
    assert _dropped(_Source(*parts), tmp_path) == expected


def test_an_unfinished_search_is_begun_anew(tmp_path):
    source = _Source([("train", "a"), ("train", "a")])
    (tmp_path / "found.unfinished").mkdir()
    (tmp_path / "found.unfinished" / "00000.u8").write_bytes(bytes(8))
    assert _dropped(source, tmp_path) == [[1]]


@pytest.mark.parametrize(
    "name, again",
    [
        ("0.hashes", lambda folder: find_duplicates([folder / "0.hashes"], folder / "again")),
        ("found/00001.u8", lambda folder: read_duplicates(folder / "found", 1)),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, again):
    source = _Source([("train", "a"), ("train", "b")], [("train", "a")])
    assert _dropped(source, tmp_path) == [[], [0]]
    path = tmp_path / name
    whole = path.read_bytes()
    flips = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    other = path.with_name("1.hashes" if "hashes" in name else "00000.u8").read_bytes()
    for damaged in (*flips, whole[:-8], b"", other):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path}: missing or damaged"):
            again(tmp_path)
    path.unlink()
    if "u8" in name:  # a file of hashes that is gone is made again
        with pytest.raises(ValueError, match=f"{path}: missing or damaged"):
            again(tmp_path)


def test_ranks_keep_their_order_and_fit_into_a_signed_integer():
    ranks = [
        document_rank(split, part, index)
        for split in ("validation", "train")
        for part in (0, 1, 2**22 - 1)
        for index in (0, 1, 2**40 - 1)
    ]
    assert ranks == sorted(set(ranks))
    assert ranks[-1] < 2**63
    assert rank_place(document_rank("train", 1023, 356_000)) == (1023, 356_000)
