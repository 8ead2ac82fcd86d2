"""The command line of preparation: what it prints, and how mistakes end."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags

import train
from configs import c4
from data.preparation import estimate as estimate_module
from data.preparation.config import StoreConfig
from data.reading.store import TokenStore
from data.sources import corpus
from data.sources.text_files import TextFolder
from data.tokenizer import Tokenizer
from laser.training.flags import parse
from scripts import prepare_data
from tests.system import NAMESPACE, children, contents, needs_mounts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "prepare_data.py")]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    texts = list(corpus.documents("validation"))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts + texts[:3])
    (folder / "a.jsonl").write_text(lines + "[]\n{\n")
    return folder


def _script(*arguments):
    command = [*SCRIPT, *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TQDM_")}  # as they are
    return subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, check=False
    )


def test_the_script_prepares_from_anywhere_and_sums_up(source, tmp_path, tokenizer_path):
    result = _script(
        f"--source={source}",
        f"--output={tmp_path / 'store'}",
        f"--tokenizer={tokenizer_path}",
        "--validation_fraction=0.2",
        "--drop_duplicates",
        "--max_broken=2",
        "--workers=2",
    )
    assert result.returncode == 0, result.stderr
    split = TokenStore(tmp_path / "store").split("train")
    ratio = split.num_bytes / split.num_tokens
    lines = result.stdout.splitlines()
    assert lines[0] == (
        f"train: {split.num_documents:,} documents, {split.num_tokens:,} tokens, "
        f"{split.num_bytes:,} bytes, {ratio:.2f} bytes per token"
    )
    assert sum(int(line.split()[1]) for line in lines if "duplicates dropped" in line) == 3
    assert lines[-4:-2] == ["skipped: 1 records, no text", "skipped: 1 records, not JSON"]
    command = shlex.split(lines[-1])
    assert command[:2] == ["python", "train.py"]
    config, values = parse(command[1:], train.define_flags)
    assert config.model.vocab_size == Tokenizer(tokenizer_path).vocab_size
    assert (config.data.store, values.workdir) == (str(tmp_path / "store"), "runs/store")
    assert "MB/s" in result.stderr
    assert "left" in result.stderr


def test_the_command_for_a_chip_is_in_bfloat16(monkeypatch):
    monkeypatch.setattr(prepare_data, "VALUES", SimpleNamespace(output="stores/mine"))
    for there, dtype in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(prepare_data, "has_accelerator", lambda there=there: there)
        command = shlex.split(prepare_data._training_command(400))
        config, _ = parse(command[1:], train.define_flags)
        assert (config.model.dtype, config.data.store) == (dtype, "stores/mine")


def test_a_file_of_flags_is_a_config_and_the_command_line_goes_over_it(
    source, tmp_path, tokenizer_path
):
    config = tmp_path / "mine.flags"
    lines = [f"--source={source}", f"--tokenizer={tokenizer_path}", f"--output={tmp_path / 'a'}"]
    config.write_text("\n".join(["# comment", *lines, "--max_broken=1", "--drop_duplicates"]))
    refused = _script(f"--flagfile={config}")
    assert refused.returncode == 2
    assert "max_broken=1: more broken records than that (1 no text, 1 not JSON)" in refused.stderr
    assert _script(f"--flagfile={config}", "--max_broken=2").returncode == 0
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["max_broken"] == 2
    assert manifest["request"]["drop_duplicates"]


def test_the_config_of_c4_names_real_flags():
    values = prepare_data.VALUES
    config = flags.FlagValues()
    for name in values:
        config[name] = values[name]
    config(["prepare_data.py", f"--flagfile={ROOT / 'configs' / 'c4_store.flags'}"])
    assert config.source == "c4/en"  # a folder as it is published, and no set that must be built
    assert config.output == c4.get_config().data.store


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four files, a part each."""
    folder = tmp_path_factory.mktemp("large")
    texts = list(corpus.documents("validation"))
    for i in range(4):
        lines = (json.dumps({"text": f"{i}{j} {t}"}) + "\n" for j in range(12) for t in texts)
        (folder / f"{i}.jsonl").write_text("".join(lines))
    return folder


def _interrupted(arguments, when):
    """Ctrl-C to a program that was started with SIGINT ignored, as in the background."""
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *SCRIPT, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    when(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT  # which shells call 130
    assert errors.splitlines()[-1].startswith("stopped; what is finished is kept")
    assert "Traceback" not in errors
    return errors


def _written(folder, pattern):
    """The files as they are now: each by its name and its time."""
    found = set()
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # renamed just now
            found.add((path, path.stat().st_mtime_ns))
    return found


def test_an_interrupted_preparation_says_so_and_goes_on(large, tmp_path, tokenizer_path):
    store = tmp_path / "store"
    arguments = [f"--source={large}", f"--tokenizer={tokenizer_path}", "--workers=2"]

    def wait_until(condition):
        def wait(process):
            while not condition(process):
                assert process.poll() is None
                time.sleep(0.001)

        return wait

    for when in (
        lambda process, before: (
            len(children(process.pid)) > 1
        ),  # the first is multiprocessing's own
        lambda process, before: _written(store, "*.tmp") - before,
        lambda process, before: _written(store, "progress/part-*.json") - before,
    ):
        by_the_rounds_before = _written(store, "**/*")
        now = functools.partial(when, before=by_the_rounds_before)
        _interrupted([*arguments, f"--output={store}"], wait_until(now))
        assert not (store / "manifest.json").exists()
    assert _script(*arguments, f"--output={store}").returncode == 0
    assert _script(*arguments, f"--output={tmp_path / 'reference'}").returncode == 0
    assert contents(store) == contents(tmp_path / "reference")


def test_the_training_of_a_tokenizer_can_be_interrupted(large, tmp_path):
    def wait(process):
        assert process.stderr.readline().startswith("training a tokenizer")

    store = tmp_path / "store"
    _interrupted([f"--source={large}", f"--output={store}", "--vocab_size=4000"], wait)
    assert not (store / "tokenizer.model").exists()


@needs_mounts
def test_a_full_disk_ends_it_in_one_line_and_the_same_command_goes_on(
    large, tmp_path, tokenizer_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = [f"--source={large}", f"--tokenizer={tokenizer_path}", "--workers=1"]
    shell = f"""
        mount -t tmpfs -o size=7m tmpfs {disk}
        "$@"; echo "code $?, $(ls {disk}/store/progress | grep -c part-) parts"
        mount -o remount,size=50m {disk}
        "$@" && cp -r {disk}/store {tmp_path / "store"}
    """
    command = [*NAMESPACE, "sh", "-c", shell, "sh", *SCRIPT, *arguments, f"--output={disk}/store"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, parts = re.match(r"code (\d), (\d) parts", done.stdout).groups()
    assert code == "1"
    assert 0 < int(parts) < 4
    assert "No space left on device; what is finished is kept" in done.stderr
    assert f"going on after {parts} of 4 parts" in done.stderr
    assert "Traceback" not in done.stderr
    assert _script(*arguments, f"--output={tmp_path / 'reference'}").returncode == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "reference")


def test_the_estimate_counts_the_second_reading_for_duplicates(source, tokenizer_path, monkeypatch):
    """And the time that the reading takes, of which the processor need not know."""
    config = StoreConfig(str(source), tokenizer=tokenizer_path)
    read = TextFolder.read

    def slowly(self, part):
        time.sleep(1.0)
        return read(self, part)

    monkeypatch.setattr(TextFolder, "read", slowly)
    once = estimate_module.estimate(config, "store", workers=1)
    twice = estimate_module.estimate(
        dataclasses.replace(config, drop_duplicates=True), "store", workers=1
    )
    assert once.seconds > 1
    assert (once.hashing_seconds > 0, twice.hashing_seconds > 1) == (False, True)
    assert twice.seconds > once.seconds + 0.9
    assert "0 h 01 min of it to find duplicates, for which all is read twice" in str(twice)
    assert "duplicates" not in str(once)


def test_the_estimate_is_near_what_comes_and_writes_nothing(source, tmp_path, tokenizer_path):
    for i in range(7):
        (source / f"b{i}.jsonl").write_bytes((source / "a.jsonl").read_bytes())
    arguments = [f"--source={source}", f"--output={tmp_path / 'store'}"]
    arguments += [f"--tokenizer={tokenizer_path}", "--max_broken=16"]
    result = _script(*arguments, "--estimate", "--workers=4")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "store").exists()
    assert "with 4 workers" in result.stdout
    estimated = int(result.stdout.splitlines()[1].split()[1].replace(",", ""))
    assert _script(*arguments).returncode == 0
    store = TokenStore(tmp_path / "store")
    actual = sum(store.split(name).num_tokens for name in ("train", "validation"))
    assert 0.95 < estimated / actual < 1.05


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--source=/nowhere", "--output=/tmp/x", "--vocab_size=300"], "source=/nowhere"),
        (["--source=bible", "--output=/tmp/x", "--vocabsize=300"], "vocabsize"),
        (["--source=bible"], "output"),
        (["--source=bible", "--output=/tmp/x", "--vocab_size=many"], "many"),
        (["--source=bible", "--output=/tmp/x", "300"], "'300'"),
        (["--source=hf:x", "--output=/tmp/x", "--vocab_size=300"], "pip install datasets"),
        (["--source=bible", "--output=/tmp/x", "--vocab_size=300", "--beam="], "beam.txt"),
        (["--flagfile=/nowhere.flags"], "/nowhere.flags"),
        (["--source=bible", "--output=/tmp/x", "--estimate"], "give one of the two"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, reason):
    if "hf:x" in arguments[0]:
        skip_if_installed("datasets")
    if "--beam=" in arguments:
        skip_if_installed("apache_beam")
    result = _script(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("prepare_data.py: error: ")
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


def skip_if_installed(package):
    import importlib.util

    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")


def test_the_script_explains_itself():
    result = _script("--help")
    assert result.returncode == 0
    assert "--validation_fraction" in result.stdout
