"""SeqIO tasks: text without a tokenizer, its tokens with one, and errors that stay readable."""

import itertools
from pathlib import Path

import pytest
import seqio
import tensorflow_datasets as tfds

from data import corpus, tasks
from data.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def _clean_registry():
    before = set(seqio.TaskRegistry.names())
    yield
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)


def _targets(task, split, **arguments):
    dataset = task.get_dataset(split=split, shuffle=False, **arguments)
    return [example["targets"] for example in dataset.as_numpy_iterator()]


@pytest.fixture
def folder(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.txt").write_text(f"In the beginning {i}\n\n  end")
    (tmp_path / "validation.txt").write_text("held out")
    return tmp_path


def test_the_embedded_corpus_is_registered():
    task = seqio.TaskRegistry.get("bible")
    texts = [target.decode() for target in _targets(task, "validation")]
    assert texts == list(corpus.documents("validation"))
    assert set(task.splits) == {"train", "validation"}
    assert "c4" in seqio.TaskRegistry.names()


@pytest.fixture
def tfds_folder(tmp_path):
    seqio.set_tfds_data_dir_override(str(tmp_path))
    yield tmp_path
    seqio.set_tfds_data_dir_override(None)


def _c4_task():
    """C4 anew: SeqIO remembers the folder that a source was read from."""
    return tasks.make_task("c4_test", seqio.TfdsDataSource(tasks.C4, splits=tasks.SPLITS))


def test_c4_is_read_from_tfds_in_parts(tfds_folder):
    builder = tfds.builder(tasks.C4, data_dir=str(tfds_folder))
    Path(builder.data_dir).mkdir(parents=True)
    writer = tfds.core.SequentialWriter(builder.info, max_examples_per_shard=3)
    writer.initialize_splits(["train", "validation"])
    other = dict.fromkeys(("url", "content-type", "content-length", "timestamp"), "")
    writer.add_examples({"train": [{"text": f"{i}\n\nü"} | other for i in range(8)]})
    writer.add_examples({"validation": [{"text": "held out"} | other]})
    writer.close_all()
    task = _c4_task()
    shards = task.source.list_shards("train")
    assert len(shards) == 3
    parts = [_targets(task, "train", shard_info=seqio.ShardInfo(i, 3)) for i in range(3)]
    assert [len(part) for part in parts] == [3, 3, 2]
    assert sorted(itertools.chain.from_iterable(parts)) == [f"{i}\n\nü".encode() for i in range(8)]
    assert _targets(task, "validation") == [b"held out"]


def test_c4_that_is_not_there_is_an_error_with_the_ways_to_get_it(tfds_folder):
    seqio.TaskRegistry.add_provider("c4_test", _c4_task())
    with pytest.raises(ValueError) as error:
        tasks.registered_task("c4_test")
    assert "tfds build c4/en:3.1.0" in str(error.value)


def test_a_folder_with_a_tokenizer_gives_the_same_tokens_as_the_tokenizer(folder, tokenizer_path):
    task = tasks.register_text_folder("mine", str(folder), str(tokenizer_path))
    assert seqio.TaskRegistry.get("mine") is task
    tokenizer = Tokenizer(tokenizer_path)
    expected = [tokenizer.encode(f"In the beginning {i}\n\n  end") + [1] for i in range(7)]
    assert [ids.tolist() for ids in _targets(task, "train")] == expected
    assert task.output_features["targets"].vocabulary.vocab_size == tokenizer.vocab_size


def test_shards_are_files_and_together_the_whole(folder):
    task = tasks.register_text_folder("mine", str(folder))
    parts = [_targets(task, "train", shard_info=seqio.ShardInfo(i, 3)) for i in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(itertools.chain.from_iterable(parts)) == _targets(task, "train")


def test_shuffling_keeps_every_document(folder):
    task = tasks.register_text_folder("mine", str(folder))
    orders = [
        [e["targets"] for e in task.get_dataset(split="train", seed=s).as_numpy_iterator()]
        for s in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == _targets(task, "train")


def test_the_reason_for_an_early_end_is_kept(folder):
    (folder / "3.txt").write_bytes(b"\xff")
    task = tasks.register_text_folder("mine", str(folder))
    with pytest.raises(Exception):  # noqa: B017 TensorFlow's own class
        _targets(task, "train")
    assert "3.txt: not UTF-8 at byte 0" in str(task.source.error)


def test_a_bad_tokenizer_is_found_at_once(folder):
    with pytest.raises(ValueError) as error:
        tasks.register_text_folder("mine", str(folder), str(folder / "0.txt"))
    assert "not a SentencePiece model" in str(error.value)
