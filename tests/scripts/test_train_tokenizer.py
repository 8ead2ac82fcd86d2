"""The command that trains a tokenizer: what the model is like, and how mistakes end."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.sources import corpus
from data.sources.registry import BibleSource, sample_texts
from data.sources.text_files import TextFolder
from data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    texts = list(corpus.documents("validation"))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(lines + '{"text": "cut\n')
    (folder / "validation.txt").write_text("ЖЖЖ " * 2000)
    return folder


def _script(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


def test_the_model_is_lossless_and_the_same_every_time(source, tmp_path):
    models = []
    for name in ("a.model", "b.model"):
        result = _script(
            f"--source={source}", f"--output={tmp_path / name}", "--vocab_size=400",
            "--sample_bytes=100000",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        models.append(Tokenizer(tmp_path / name))
    assert models[0].sha256 == models[1].sha256
    assert result.stdout == f"{tmp_path / 'b.model'}: 400 pieces, sha256 {models[0].sha256}\n"
    assert (models[0].pad_id, models[0].eos_id) == (0, 1)
    assert models[0].lost() == []
    assert len(models[0].encode("Ж")) == 2  # its bytes: the validation split is never seen


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--source=bible", "--output=/nowhere/x.model"], "no folder /nowhere"),
        (["--source=bible", "--output=/etc/passwd"], "is there already"),
        (["--source=/nowhere", "--output=/tmp/never.model"], "source=/nowhere: no such folder"),
        (["--source=bible", "--output=/tmp/never.model", "--vocab_size=10"], "vocab_size=10"),
        (["--source=bible", "--output=/tmp/never.model", "--sample_bytes=0"], "sample_bytes"),
        (["--source=bible"], "output"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, reason):
    result = _script(*arguments)
    assert result.returncode == 2
    assert "train_tokenizer.py: error: " in result.stderr
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("/tmp/never.model").exists()


def test_the_sample_is_of_parts_all_over_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.text_files.MIN_PART", 1)
    monkeypatch.setattr("data.sources.registry.SAMPLE_PARTS", 10)
    monkeypatch.setattr("data.sources.registry.SAMPLE_DOCUMENTS", 50)
    for i in range(40):
        lines = "".join(json.dumps({"text": f"{i} {j}"}) + "\n" for j in range(20))
        (tmp_path / f"{i:02d}.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "validation.txt").write_text("never")
    found = [tuple(map(int, text.split())) for text in sample_texts(TextFolder(tmp_path))]
    parts = sorted({part for part, _ in found})
    assert len(found) == 50
    assert len(parts) == 10
    assert parts[0] < 12
    assert parts[-1] > 28
    assert found == list(dict.fromkeys(found))


def test_the_sample_of_a_small_source_is_all_of_it():
    assert list(sample_texts(BibleSource())) == list(corpus.documents("train"))
