"""A store holds every document once, is the same after any crash, and is never mixed up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import prepare as prepare_module
from data.prepare import prepare
from data.store import TokenStore
from data.text_files import TextFolder
from data.tokenizer import SPACE_MARK, Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = 60


@pytest.fixture
def source(tmp_path):
    """Files of several kinds; documents of many lengths, whitespace and other alphabets."""
    folder = tmp_path / "source"
    folder.mkdir()
    texts = [
        f"{i} {SPACE_MARK} In\n\n the  beginning ü 日 " * (i % 7) + "." for i in range(DOCUMENTS)
    ]
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(texts[i])
    for start in (20, 40):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[start : start + 20])
        (folder / f"{start}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def run(source, tmp_path, tokenizer_path):
    """Prepares the source with small shards and batches."""

    def run_into(name="store", **changes):
        arguments = {"tokenizer": tokenizer_path, "validation_fraction": 0.2, "shard_tokens": 400}
        return prepare(str(source), tmp_path / name, **(arguments | changes))

    return run_into


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(prepare_module, "SOURCE_SHARDS", 5)


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_store_is_eos_and_then_every_document_with_eos(run, source, tmp_path):
    manifest = run()
    store = TokenStore(tmp_path / "store")
    tokenizer = Tokenizer(store.tokenizer_path)
    found = {}
    for name in ("train", "validation"):
        split = store.split(name)
        tokens = split.rows([0], split.num_tokens - 1)[0].tolist()
        assert tokens[0] == tokens[-1] == tokenizer.eos_id
        documents, current = [], []
        for token in tokens[1:]:
            if token == tokenizer.eos_id:
                documents.append(tokenizer.decode(current))
                current = []
            else:
                current.append(token)
        found[name] = documents
        assert split.num_documents == len(documents)
        assert split.num_bytes == sum(len(text.encode()) for text in documents)
        shards = manifest["splits"][name]["shards"]
        assert len(shards) > 1
        assert all(shard["tokens"] <= 400 for shard in shards)
    folder = TextFolder(source, validation_fraction=0.2)
    for name, documents in found.items():
        assert sorted(documents) == sorted(folder.documents(name))
    assert sum(map(len, found.values())) == DOCUMENTS


def test_a_tokenizer_is_trained_on_the_train_split_alone(run, source, tmp_path):
    (source / "validation.jsonl").write_text(json.dumps({"text": "ЖЖЖ " * 2000}) + "\n")
    arguments = {"tokenizer": None, "validation_fraction": None}
    manifest = run(vocab_size=290, **arguments)
    assert manifest["vocab_size"] == TokenStore(tmp_path / "store").vocab_size == 290
    tokenizer = Tokenizer(tmp_path / "store" / "tokenizer.model")
    assert len(tokenizer.encode("日")) == 1
    assert len(tokenizer.encode("Ж")) == 2  # its bytes: never seen in training
    run("again", vocab_size=290, **arguments)
    assert _contents(tmp_path / "store") == _contents(tmp_path / "again")


class Crash(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_write_leaves_what_can_be_continued(
    run, source, tmp_path, monkeypatch, when
):
    folder = TextFolder(source, validation_fraction=0.2)

    def read_without_tensorflow(task, split, start):
        texts = list(folder.documents(split))
        yield from ((texts[i], (0, i + 1)) for i in range(start[1], len(texts)))

    monkeypatch.setattr(prepare_module, "_read", read_without_tensorflow)
    run("reference")
    reference = _contents(tmp_path / "reference")
    publish = prepare_module._publish
    crashes = 0
    for count in range(1, 100):
        calls = iter(range(1, 1000))

        def crashing(temporary, path, calls=calls, count=count):
            number = next(calls)
            if number == count and when == "before":
                raise Crash
            publish(temporary, path)
            if number == count:
                raise Crash

        monkeypatch.setattr(prepare_module, "_publish", crashing)
        name = f"store{count}"
        try:
            run(name)
        except Crash:
            crashes += 1
        else:
            break
        monkeypatch.setattr(prepare_module, "_publish", publish)
        if "manifest.json" not in _contents(tmp_path / name):
            with pytest.raises(ValueError):
                TokenStore(tmp_path / name)
        run(name)
        assert _contents(tmp_path / name) == reference
    assert crashes > 10


def test_reading_goes_on_from_any_position(source):
    task = prepare_module._task(str(source), TextFolder(source, validation_fraction=0.2))
    everything = list(prepare_module._read(task, "train", (0, 0)))
    assert len({position for _, position in everything}) == len(everything) > 40
    for done in range(1, len(everything), 9):
        start = everything[done - 1][1]
        assert list(prepare_module._read(task, "train", start)) == everything[done:]


def test_finished_shards_are_not_written_again(run, tmp_path, monkeypatch):
    write_json = prepare_module._write_json

    def crash_at_the_manifest(path, content):
        if path.name == "manifest.json":
            raise Crash
        write_json(path, content)

    monkeypatch.setattr(prepare_module, "_write_json", crash_at_the_manifest)
    with pytest.raises(Crash):
        run()
    monkeypatch.setattr(prepare_module, "_write_json", write_json)
    monkeypatch.setattr(prepare_module, "Shard", None)  # any new one would fail
    run()
    TokenStore(tmp_path / "store")


KILLED = """
import sys
from data.prepare import prepare
prepare("bible", sys.argv[1], tokenizer=sys.argv[2], shard_tokens=20_000)
"""


@pytest.mark.slow
def test_kill_9_and_again_gives_the_same_bytes(tmp_path, tokenizer_path):
    prepare("bible", tmp_path / "reference", tokenizer=tokenizer_path, shard_tokens=20_000)
    store = tmp_path / "store"
    command = [sys.executable, "-c", KILLED, str(store), str(tokenizer_path)]
    shards_at_kill = []
    for shards in (1, 60):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while len(list(store.glob("*.bin"))) < shards:
            assert process.poll() is None
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        shards_at_kill.append(len(list(store.glob("*.bin"))))
        assert not (store / "manifest.json").exists()
    assert shards_at_kill[0] < shards_at_kill[1]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert _contents(store) == _contents(tmp_path / "reference")


def test_a_finished_store_is_left_alone(run, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    first = run()
    monkeypatch.setattr(prepare_module, "_task", None)  # reading the source would fail
    assert run() == first
    assert f"{tmp_path / 'store'} is complete already" in caplog.text


def test_other_arguments_or_other_files_are_refused(run, source, tmp_path, tokenizer_path):
    run()
    before = _contents(tmp_path / "store")
    other_model = tmp_path / "other.model"
    other_model.write_bytes(tokenizer_path.read_bytes() + b"\x0a\x00")
    cases = [
        ({"tokenizer": None, "vocab_size": 300}, "vocab_size: None there, 300 asked for"),
        ({"validation_fraction": 0.3}, "source.validation: 0.2 there, 0.3 asked for"),
        ({"shard_tokens": 500}, "shard_tokens: 400 there, 500 asked for"),
    ]
    for changes, difference in cases:
        with pytest.raises(ValueError) as error:
            run(**changes)
        assert difference in str(error.value)
    (source / "00.txt").write_text("longer than before")
    with pytest.raises(ValueError) as error:
        run()
    assert "source.file_bytes" in str(error.value)
    assert _contents(tmp_path / "store") == before


def test_a_folder_with_other_things_in_it_is_refused(run, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError) as error:
        run()
    assert "thesis.tex" in str(error.value)
    assert _contents(tmp_path / "store") == {"thesis.tex": b"years of work"}


def test_a_mistake_before_the_first_shard_can_be_mended(run, source, tmp_path):
    bad = source / "15.txt"
    good = bad.read_text()
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError) as error:
        run(shard_tokens=10**6)
    assert f"{bad}: not UTF-8 at byte 0" in str(error.value)
    with pytest.raises(ValueError) as error:
        run(tokenizer=None, vocab_size=30_000, shard_tokens=10**6)
    bad.write_text(good)
    run(shard_tokens=10**6)
    assert TokenStore(tmp_path / "store").split("train").num_documents > 30


def test_a_split_without_documents_is_an_error(tmp_path, tokenizer_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_text("all I have")  # falls on the validation side
    with pytest.raises(ValueError) as error:
        prepare(str(tmp_path / "source"), tmp_path / "store", tokenizer=tokenizer_path)
    assert "no documents for the train split" in str(error.value)


@pytest.mark.parametrize(
    "source, changes, reason",
    [
        ("bible", {"vocab_size": 300, "tokenizer": "x"}, "give one of the two"),
        ("bible", {}, "give one of the two"),
        ("bible", {"vocab_size": 300, "validation_fraction": 0.1}, "validation_fraction=0.1"),
        ("bibel", {"vocab_size": 300}, "source=bibel: no such folder, and no task"),
        ("bible", {"tokenizer": "missing.model"}, "tokenizer=missing.model: no such file"),
    ],
)
def test_wrong_arguments_are_errors_and_leave_no_folder(tmp_path, source, changes, reason):
    with pytest.raises(ValueError) as error:
        prepare(source, tmp_path / "store", **changes)
    assert reason in str(error.value)
    assert not (tmp_path / "store").exists()


def test_ids_above_65535_need_four_bytes(run, tmp_path, monkeypatch):
    class Large(Tokenizer):
        def __init__(self, path):
            super().__init__(path)
            self.vocab_size = 2**16 + 1

        def encode_batch(self, texts):
            return [[2**16] * len(text) for text in texts]

    monkeypatch.setattr(prepare_module, "Tokenizer", Large)
    assert run(shard_tokens=10**6)["dtype"] == "<u4"
    assert TokenStore(tmp_path / "store").split("train").rows([0], 5)[0].max() == 2**16


def _script(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


def test_the_script_prepares_from_anywhere_and_sums_up(source, tmp_path, tokenizer_path):
    result = _script(
        f"--source={source}",
        f"--output={tmp_path / 'store'}",
        f"--tokenizer={tokenizer_path}",
        "--validation_fraction=0.2",
    )
    assert result.returncode == 0, result.stderr
    split = TokenStore(tmp_path / "store").split("train")
    ratio = split.num_bytes / split.num_tokens
    assert result.stdout.splitlines()[0] == (
        f"train: {split.num_documents:,} documents, {split.num_tokens:,} tokens, "
        f"{split.num_bytes:,} bytes, {ratio:.2f} bytes per token"
    )


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--source=/nowhere", "--output=/tmp/x", "--vocab_size=300"], "source=/nowhere"),
        (["--source=bible", "--output=/tmp/x", "--vocabsize=300"], "vocabsize"),
        (["--source=bible"], "output"),
        (["--source=bible", "--output=/tmp/x", "--vocab_size=many"], "many"),
        (["--source=bible", "--output=/tmp/x", "300"], "'300'"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, reason):
    result = _script(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("prepare_data.py: error: ")
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


def test_the_script_explains_itself():
    result = _script("--help")
    assert result.returncode == 0
    assert "--validation_fraction" in result.stdout
