"""SeqIO tasks: text without a tokenizer, its tokens with one, and errors that stay readable."""

import pytest

from data import corpus
from data.tokenizer import Tokenizer

seqio = pytest.importorskip("seqio")
tasks = pytest.importorskip("data.tasks")


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


def test_c4_is_registered_and_not_touched():
    assert set(seqio.TaskRegistry.get("c4").splits) == {"train", "validation"}


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
    assert sorted(sum(parts, [])) == _targets(task, "train")


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
