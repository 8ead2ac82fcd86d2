"""Apache Beam writes the store that the local path writes, to the byte.

Beam does not install beside the rest (requirements-beam.txt): without it these tests are skipped.
To run them: make an environment from requirements-beam.txt and pytest, and call its pytest.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare
from data.sources import corpus, text_files

pytest.importorskip("apache_beam", reason="apache-beam is not installed: requirements-beam.txt")

from data.preparation.beam_pipeline import prepare_with_beam
from tests.system import contents

ROOT = Path(__file__).resolve().parents[3]
RUNNERS = {
    "two processes": "--direct_num_workers=2 --direct_running_mode=multi_processing",
    "three threads": "--direct_num_workers=3 --direct_running_mode=multi_threading",
}
BROKEN = '{"text": "cut\n'


@pytest.fixture
def source(tmp_path):
    """Eight files: documents that are empty or there twice, and two broken records."""
    folder = tmp_path / "source"
    folder.mkdir()
    texts = list(corpus.documents("validation"))
    for i in range(8):
        documents = ["", f"only in {i}", *texts[i * 5 : i * 5 + 8]]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        name = f"c4-validation.{i}.json.gz" if i == 5 else f"c4-train.{i}.json.gz"
        (folder / name).write_bytes(gzip.compress((lines + BROKEN * (i % 4 == 1)).encode()))
    return folder


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_beam_and_one_machine_write_the_same_bytes(
    tmp_path, source, tokenizer_path, monkeypatch, runner, drop_duplicates
):
    monkeypatch.setattr(text_files, "MIN_PART", 1)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    config = StoreConfig(
        str(source), tokenizer=tokenizer_path, drop_duplicates=drop_duplicates, max_broken=2
    )
    manifest = prepare(config, tmp_path / "local", workers=2)
    options = ["--runner=DirectRunner", *RUNNERS[runner].split()]
    prepare_with_beam(config, str(tmp_path / "beam"), options=options)
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")
    assert len(contents(tmp_path / "beam")) == 2 + 2 * 8
    assert manifest["broken"] == {"not JSON": 2}
    dropped = sum(split["duplicates_dropped"] for split in manifest["splits"].values())
    assert (dropped > 20) == drop_duplicates


def test_too_many_broken_records_end_the_pipeline(tmp_path, source, tokenizer_path):
    config = StoreConfig(str(source), tokenizer=tokenizer_path, max_broken=1)
    options = ["--runner=DirectRunner", "--direct_num_workers=1"]
    with pytest.raises(Exception, match="max_broken=1: more broken records than that"):
        prepare_with_beam(config, str(tmp_path / "beam"), options=options)
    assert not (tmp_path / "beam" / "manifest.json").exists()


def test_a_store_that_is_there_is_not_written_over(tmp_path, source, tokenizer_path):
    config = StoreConfig(str(source), tokenizer=tokenizer_path, max_broken=2)
    prepare(config, tmp_path / "store")
    before = contents(tmp_path / "store")
    with pytest.raises(ValueError) as error:
        prepare_with_beam(config, str(tmp_path / "store"), options=[])
    assert "holds a store already" in str(error.value)
    assert contents(tmp_path / "store") == before


def test_the_script_prepares_by_beam(tmp_path, source, tokenizer_path):
    arguments = [f"--source={source}", f"--tokenizer={tokenizer_path}", "--max_broken=2"]
    for name, more in (("local", []), ("beam", ["--beam=--runner=DirectRunner"])):
        subprocess.run(
            [
                *(sys.executable, ROOT / "scripts" / "prepare_data.py"),
                *(f"--output={tmp_path / name}", *arguments, *more),
            ],
            cwd="/",
            check=True,
            capture_output=True,
        )
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")


def test_beam_prepares_from_tfds(tmp_path, tokenizer_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder("c4/en:3.1.0", data_dir=str(tmp_path / "tfds"))
    Path(builder.data_dir).mkdir(parents=True)
    writer = tfds.core.SequentialWriter(builder.info, 30)
    writer.initialize_splits(["train", "validation"])
    other = dict.fromkeys(("url", "content-type", "content-length", "timestamp"), "")
    for split in ("train", "validation"):
        writer.add_examples({split: [{"text": f"{i} ü"} | other for i in range(80)]})
    writer.close_all()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    config = StoreConfig("c4", tokenizer=tokenizer_path)
    prepare(config, tmp_path / "local", workers=1)
    options = ["--runner=DirectRunner"]
    prepare_with_beam(config, str(tmp_path / "beam"), options=options)
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")
    assert len(contents(tmp_path / "beam")) == 2 + 2 * 6
