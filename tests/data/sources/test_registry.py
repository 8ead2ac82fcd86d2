"""Sources by their names: Hugging Face datasets, where installed, and what is refused."""

import pickle

import pytest

from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare
from data.reading.store import TokenStore
from data.sources import registry
from data.sources.parts import Broken, texts
from data.sources.registry import open_source

TEXTS = {"train": [f"{i} ü\n" * (i % 3) for i in range(70)], "validation": ["held out"]}


@pytest.fixture
def saved(tmp_path):
    """A folder that save_to_disk wrote."""
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    sets = {split: datasets.Dataset.from_dict({"text": t}) for split, t in TEXTS.items()}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_hugging_face_gives_all_documents_in_order(saved, monkeypatch):
    monkeypatch.setattr(registry, "HF_PART", 30)
    source = open_source(f"hf:{saved}")
    assert {split: list(texts(source, split)) for split in TEXTS} == TEXTS
    assert [part.size for part in source.parts] == [30, 30, 10, 1]
    other = pickle.loads(pickle.dumps(source))
    assert list(texts(other, "train")) == TEXTS["train"]
    assert other.description() == open_source(f"hf:{saved}").description()


def test_hugging_face_of_another_field_is_another_source(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    columns = {"text": ["a", "b"], "content": ["c", "d"]}
    sets = {split: datasets.Dataset.from_dict(columns) for split in TEXTS}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "saved")
    text, content = (open_source(f"hf:{tmp_path / 'saved'}", text_field=field) for field in columns)
    assert list(texts(content, "train")) == columns["content"]
    assert text.description() != content.description()


def test_hugging_face_makes_a_store_by_two_workers(saved, tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setattr(registry, "HF_PART", 30)
    config = StoreConfig(f"hf:{saved}", tokenizer=tokenizer_path)
    for workers in (1, 2):
        prepare(config, tmp_path / f"{workers}", workers=workers)
    one, two = (TokenStore(tmp_path / f"{workers}") for workers in (1, 2))
    assert one.fingerprint == two.fingerprint
    assert one.split("train").num_documents == 70


def test_what_hugging_face_lacks_is_named(saved, tmp_path):
    import datasets

    with pytest.raises(ValueError) as error:
        open_source(f"hf:{saved}", text_field="content")
    assert "text_field=content" in str(error.value)
    assert "has only text" in str(error.value)
    only_train = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["x", None]})})
    only_train.save_to_disk(tmp_path / "only")
    with pytest.raises(ValueError) as error:
        open_source(f"hf:{tmp_path / 'only'}")
    assert "no split validation, only train" in str(error.value)


def test_a_record_of_hugging_face_without_text_is_broken(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    sets = {split: datasets.Dataset.from_dict({"text": ["x", None]}) for split in TEXTS}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path / 'saved'}")
    records = list(source.read(source.parts[0]))
    assert [isinstance(record, Broken) for record in records] == [False, True]
    assert "train, row 1: no text" in records[1].message


@pytest.mark.parametrize("name", ["bible", "hf:x"])
def test_a_source_with_a_validation_split_takes_no_fraction(name):
    with pytest.raises(ValueError) as error:
        open_source(name, validation_fraction=0.1)
    assert f"validation_fraction=0.1: of {name} the split 'validation' is read" in str(error.value)


@pytest.mark.slow
def test_the_embedded_corpus_is_one_part_of_both_splits():
    source = open_source("bible")
    (part,) = source.parts
    assert part.shards == {"train": 0, "validation": 0}
    read = [record.read for record in source.read(part)]
    assert read == list(range(1, part.size + 1))
