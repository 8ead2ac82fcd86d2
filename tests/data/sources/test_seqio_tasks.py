"""SeqIO tasks: text without a tokenizer, its tokens with one, and errors that stay readable."""

import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare
from data.reading.store import TokenStore
from data.sources import corpus, text_files
from data.sources.parts import Broken, texts
from data.sources.registry import open_source
from data.tokenizer import Tokenizer
from tests import buckets
from tests.lazily import Lazily

pytestmark = pytest.mark.slow  # they import TensorFlow
seqio, tfds = Lazily("seqio"), Lazily("tensorflow_datasets")
seqio_tasks = Lazily("data.sources.seqio_tasks")
ROOT = Path(__file__).resolve().parents[3]


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


C4_DOCUMENTS = {
    "train": [f"{i}\n\nü {chr(i)}\0" * (i % 5) for i in range(80)],  # some empty, some control
    "validation": ["held out", "\u2028 too"],
}


def _write_tfds(folder, name="c4/en:3.1.0", file_format="tfrecord", documents=C4_DOCUMENTS):
    """A small C4 by TFDS's own builder and writer; the train split in several files."""
    builder = tfds.builder(name, data_dir=str(folder), file_format=file_format)
    Path(builder.data_dir).mkdir(parents=True)
    writer = tfds.core.SequentialWriter(builder.info, 30, file_format=file_format)
    writer.initialize_splits(list(documents))
    fields = {key: "" for key in builder.info.features if key != "text"}
    for split, docs in documents.items():
        writer.add_examples({split: [{"text": text} | fields for text in docs]})
    writer.close_all()


def _write_json_gz(folder):
    """The same as files of the kind that is published, with the same documents in each."""
    folder.mkdir()
    for split, docs in C4_DOCUMENTS.items():
        files = [docs[i : i + 30] for i in range(0, len(docs), 30)]
        for i, part in enumerate(files):
            lines = [{"text": t, "timestamp": "2019-04-25T12:57:54Z", "url": "x"} for t in part]
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            name = f"c4-{split}.{i:05d}-of-{len(files):05d}.json.gz"
            (folder / name).write_bytes(gzip.compress(content))


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    folder = tmp_path / "tfds"
    folder.mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return folder


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds_and_json_gz_give_the_same_documents_and_the_same_store(
    tmp_path, tfds_folder, tokenizer_path, file_format, monkeypatch
):
    monkeypatch.setattr(text_files, "MIN_PART", 1)
    _write_tfds(tfds_folder, file_format=file_format)
    _write_json_gz(tmp_path / "json")
    for source in ("c4", "tfds:c4/en:3.1.0", str(tmp_path / "json")):
        opened = open_source(source)
        assert {s: list(texts(opened, s)) for s in C4_DOCUMENTS} == C4_DOCUMENTS
        assert [part.size for part in open_source("c4").parts] == [30, 30, 20, 2]
    stores = []
    for name, source, workers in (("a", "c4", 1), ("b", str(tmp_path / "json"), 2)):
        prepare(StoreConfig(source, tokenizer=tokenizer_path), tmp_path / name, workers=workers)
        stores.append(TokenStore(tmp_path / name))
    assert len({store.fingerprint for store in stores}) == 1
    files = [sorted(path.name for path in store.path.iterdir()) for store in stores]
    assert files[0] == files[1]
    assert "train-00002.offsets" in files[0]
    for name in files[0]:
        if name != "manifest.json":  # which says what the source was
            assert (stores[0].path / name).read_bytes() == (stores[1].path / name).read_bytes()


def test_workers_read_tfds_as_one_process_does(tmp_path, tfds_folder, tokenizer_path):
    _write_tfds(tfds_folder)
    for name, workers in (("one", 1), ("two", 2)):
        prepare(StoreConfig("c4", tokenizer=tokenizer_path), tmp_path / name, workers=workers)
    files = sorted((tmp_path / "one").iterdir())
    assert len(files) == 10
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


WITHOUT = """
import sys
from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare
prepare(StoreConfig("c4", tokenizer=sys.argv[1]), sys.argv[2], workers=1)
print(*sys.modules)
"""


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds_is_prepared_without_tensorflow(tmp_path, tfds_folder, tokenizer_path, file_format):
    _write_tfds(tfds_folder, file_format=file_format)
    command = [sys.executable, "-c", WITHOUT, tokenizer_path, tmp_path / "store"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "data.sources.tfds_files" in loaded
    assert not loaded & {"tensorflow", "seqio", "jax"}
    assert TokenStore(tmp_path / "store").split("train").num_documents == 80


AFAR = """
import sys
from data.sources.registry import open_source
try:
    source = open_source("c4")
    print(*source.files().values(), sep="\\n")
    print(sum(len(list(source.read(part))) for part in source.parts))
    print(sys.modules.keys() & {"tensorflow", "seqio", "jax"})
except OSError as error:
    print(error)
"""


def test_tfds_in_a_bucket_is_read_without_tensorflow(tmp_path, tfds_folder):
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    _write_tfds(tfds_folder)

    def read(place):
        environment = {**os.environ, **bucket.environment, "TFDS_DATA_DIR": place}
        command = [sys.executable, "-c", AFAR]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with buckets.running() as bucket:
        bucket.upload(tfds_folder / "c4" / "en" / "3.1.0", "tfds/c4/en/3.1.0")
        *files, documents, loaded = read(f"{bucket.address}/tfds")
        folder = tfds_folder / "c4" / "en" / "3.1.0"
        sizes = [path.stat().st_size for path in sorted(folder.glob("c4-*"))]
        assert [int(file.split(", ")[0]) for file in files] == sizes
        assert all(int(file.split(", ")[1]) > 0 for file in files)
        assert (documents, loaded) == ("82", "set()")
        (line,) = read("gs://denied/tfds")
        assert "OSError: Forbidden" in line
        assert "gs://denied/tfds" in line


def test_other_sets_of_tfds_are_found_by_name(tfds_folder):
    languages = {"af": ["een", "twee"], "af-validation": ["drie"], "am": ["x"]}
    _write_tfds(tfds_folder, "c4/multilingual:3.1.0", documents=languages)
    variants = ("realnewslike:3.1.0", "en.noclean:3.1.0", "webtextlike:3.1.0", "en:2.3.1")
    for name in (f"c4/{variant}" for variant in variants):
        _write_tfds(tfds_folder, name)
        source = open_source(f"tfds:{name}")
        assert list(texts(source, "train")) == C4_DOCUMENTS["train"]
        assert source.description()["name"] == name.replace(":", "/")
    source = open_source("tfds:c4/multilingual:3.1.0@af")
    assert list(texts(source, "train")) == languages["af"]
    assert list(texts(source, "validation")) == languages["af-validation"]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_set_with_a_train_split_alone_gives_a_part_of_it(tfds_folder, file_format):
    """By a hash of each document, as a folder does; in a store and as a task."""
    documents = [f"article {i}" for i in range(200)]
    _write_tfds(tfds_folder, documents={"train": documents}, file_format=file_format)
    with pytest.raises(ValueError) as error:
        open_source("c4")
    assert "no split 'validation'" in str(error.value)
    assert "becomes validation by --validation_fraction=0.01" in str(error.value)
    source = open_source("c4", validation_fraction=0.2)
    train, validation = (list(texts(source, split)) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(documents)
    assert 20 < len(validation) < 60
    assert source.description()["validation"] == 0.2
    task = seqio_tasks.register("part", "c4", validation_fraction=0.2)
    assert [target.decode() for target in _targets(task, "validation")] == validation
    with pytest.raises(ValueError, match=r"validation_fraction=1\.5: must be between 0 and 1"):
        open_source("c4", validation_fraction=1.5)


def test_a_set_with_a_validation_split_takes_no_fraction(tfds_folder):
    _write_tfds(tfds_folder)
    with pytest.raises(
        ValueError, match=r"validation_fraction=0\.1: tfds:c4/en:3\.1\.0 has its own"
    ):
        open_source("c4", validation_fraction=0.1)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("c4/en:3.1.0", "give a folder with allenai's .json.gz files of C4, point TFDS_DATA_DIR"),
        ("c4/en:3.1.0", "or build it with `tfds build c4/en:3.1.0`, a cluster's work"),
        (
            "lm1b:1.1.0",
            "point TFDS_DATA_DIR to where it is, or build it with `tfds build lm1b:1.1.0`",
        ),
        ("no_such_set/en:3.1.0", "TensorFlow Datasets has no such set"),
        ("c4/en", "write it as NAME/CONFIG:VERSION"),
    ],
)
def test_sets_that_are_not_there_are_errors_with_the_ways_to_get_them(tfds_folder, name, reason):
    with pytest.raises(ValueError) as error:
        open_source(f"tfds:{name}")
    assert f"source=tfds:{name}" in str(error.value)
    assert reason in str(error.value)


def test_the_embedded_corpus_is_a_task():
    task = seqio_tasks.register("bible", "bible")
    found = [target.decode() for target in _targets(task, "validation")]
    assert found == list(corpus.documents("validation"))
    assert set(task.splits) == {"train", "validation"}


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_the_task_has_the_documents_of_the_store_shard_by_shard(tfds_folder, file_format):
    _write_tfds(tfds_folder, file_format=file_format)
    task, source = seqio_tasks.register("text", "c4"), open_source("c4")
    for split, documents in C4_DOCUMENTS.items():
        count = len(task.source.list_shards(split))
        shards = [seqio.ShardInfo(i, count) for i in range(count)]
        found = [text.decode() for s in shards for text in _targets(task, split, shard_info=s)]
        assert found == list(texts(source, split)) == documents


FILES = [("tfrecord", "c4-train.tfrecord-00001"), ("array_record", "c4-train.array_record-00001")]
DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "cut to nothing": lambda content: b"",
    "one bit": lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file_format, name", FILES)
def test_a_damaged_file_of_tfds_is_named(tfds_folder, file_format, name, damage):
    documents = {"train": [f"{i} {'text ' * i * 20}" for i in range(80)], "validation": ["x"]}
    _write_tfds(tfds_folder, file_format=file_format, documents=documents)
    file = tfds_folder / "c4" / "en" / "3.1.0" / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(ValueError) as error:
        list(texts(open_source("c4"), "train"))
    assert str(file) in str(error.value)
    assert "damaged or cut off" in str(error.value)


def test_a_file_of_tfds_with_another_number_of_examples_is_an_error(tfds_folder):
    _write_tfds(tfds_folder)
    folder = tfds_folder / "c4" / "en" / "3.1.0"
    (folder / "c4-train.tfrecord-00002").write_bytes(
        (folder / "c4-train.tfrecord-00000").read_bytes()
    )
    with pytest.raises(ValueError) as error:
        list(texts(open_source("c4"), "train"))
    assert "c4-train.tfrecord-00002: 20 examples expected, more found" in str(error.value)


def test_text_of_tfds_that_is_not_utf8_is_broken(tfds_folder):
    _write_tfds(tfds_folder, documents={"train": ["x", b"caf\xe9", "y"], "validation": ["z"]})
    source = open_source("c4")
    records = list(source.read(source.parts[0]))
    assert [isinstance(record, Broken) for record in records] == [False, True, False]
    assert "c4-train.tfrecord-00000, example 1: " in records[1].message


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds_is_a_task_with_tokens(tfds_folder, tokenizer_path, file_format):
    _write_tfds(tfds_folder, file_format=file_format)
    task = seqio_tasks.register("mine", "c4", str(tokenizer_path))
    found = _targets(task, "validation")
    tokenizer = Tokenizer(tokenizer_path)
    assert [ids.tolist() for ids in found] == [
        tokenizer.encode(text) + [1] for text in C4_DOCUMENTS["validation"]
    ]


def test_a_folder_with_a_tokenizer_gives_the_same_tokens_as_the_tokenizer(folder, tokenizer_path):
    task = seqio_tasks.register("mine", str(folder), str(tokenizer_path))
    assert seqio.TaskRegistry.get("mine") is task
    tokenizer = Tokenizer(tokenizer_path)
    expected = [tokenizer.encode(f"In the beginning {i}\n\n  end") + [1] for i in range(7)]
    assert [ids.tolist() for ids in _targets(task, "train")] == expected
    assert task.output_features["targets"].vocabulary.vocab_size == tokenizer.vocab_size


def test_shards_are_parts_and_together_the_whole(folder, monkeypatch):
    monkeypatch.setattr(text_files, "MIN_PART", 1)
    task = seqio_tasks.register("mine", str(folder))
    parts = [_targets(task, "train", shard_info=seqio.ShardInfo(i, 3)) for i in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(itertools.chain.from_iterable(parts)) == _targets(task, "train")


def test_shuffling_keeps_every_document(folder, monkeypatch):
    monkeypatch.setattr(text_files, "MIN_PART", 1)
    task = seqio_tasks.register("mine", str(folder))
    orders = [
        [e["targets"] for e in task.get_dataset(split="train", seed=s).as_numpy_iterator()]
        for s in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == _targets(task, "train")


def test_the_reason_for_an_early_end_is_kept(folder):
    (folder / "3.txt").write_bytes(b"\xff")
    task = seqio_tasks.register("mine", str(folder))
    with pytest.raises(Exception):  # noqa: B017 TensorFlow's own class
        _targets(task, "train")
    assert "3.txt: not UTF-8 at byte 0" in str(task.source.error)


def test_a_bad_tokenizer_is_found_at_once(folder):
    with pytest.raises(ValueError) as error:
        seqio_tasks.register("mine", str(folder), str(folder / "0.txt"))
    assert "not a SentencePiece model" in str(error.value)
