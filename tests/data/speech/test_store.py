"""Recordings to a store and back; what is left out, and what is broken, is named and counted."""

import dataclasses
import functools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.sources.parts import Broken
from data.speech import recordings, tones
from data.speech import store as store_module
from data.speech.prepare import SpeechConfig, prepare
from data.speech.recordings import Part, Recording
from data.speech.store import SpeechStore

ROOT = Path(__file__).resolve().parents[3]
SECOND = np.ones(16_000, np.int16)


def read(source):
    """All recordings of a source."""
    return [recording for part in recordings.parts(source) for recording in part.read()]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "tones"
    prepare(SpeechConfig("tones:40", "tones:8@1,tones:2@2", vocab_size=12), folder)
    return folder


def test_what_comes_out_is_what_went_in(store):
    opened = SpeechStore(store)
    assert (len(opened.train), len(opened.validation)) == (40, 10)
    for i in range(40):
        audio, text = tones.recording(0, i)
        np.testing.assert_array_equal(opened.train.audio(i), audio)
        assert opened.train.text(i) == text
        assert opened.train.labels(i)[-1] == opened.tokenizer.eos_id
    assert opened.validation.text(9) == tones.recording(2, 1)[1]
    longest = max(len(tones.recording(0, i)[0]) for i in range(40))
    assert opened.train.longest[0] == longest


def test_features_are_normalised_over_the_train_split(store):
    split = SpeechStore(store).train
    features = np.concatenate([split.features(i) for i in range(len(split))])
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(features.std(axis=0), 1, atol=1e-3)


def test_the_same_command_makes_the_same_store(store, tmp_path):
    (tmp_path / "again.partial").mkdir()  # of a preparation that was killed
    (tmp_path / "again.partial" / "train.audio").write_bytes(b"half")
    command = [
        sys.executable, "scripts/prepare_speech.py", "--train=tones:40", "--vocab_size=12",
        "--validation=tones:8@1,tones:2@2", f"--output={tmp_path / 'again'}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train: 40 recordings of 0.0" in done.stdout
    files = sorted(path.name for path in store.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (store / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    command[2] = "--train=tones:39"
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "source.train: tones:40 there, tones:39 asked for" in other.stderr


class Stopped(Exception):
    pass


@pytest.fixture
def stopped(monkeypatch):
    """Ends a preparation at the recording of a number, of those that it makes."""
    monkeypatch.setattr(recordings, "AT_A_TIME", 4)
    made, make = [], tones.recording

    def recording(seed, number):
        made.append((seed, number))
        if len(made) == recording.end:
            raise Stopped
        return make(seed, number)

    recording.made, recording.end = made, 0
    monkeypatch.setattr(tones, "recording", recording)
    return recording


CONFIG = SpeechConfig("tones:10", "tones:5@1", vocab_size=12)


@pytest.mark.parametrize("end", [1, 7, 13, 15])
def test_a_preparation_that_was_stopped_goes_on(tmp_path, stopped, end):
    """Nothing that is finished is read again, and the store is the same to the byte."""
    whole = prepare(CONFIG, tmp_path / "whole")
    stopped.made.clear()
    stopped.end = end
    with pytest.raises(Stopped):
        prepare(CONFIG, tmp_path / "parts")
    assert [path.name for path in tmp_path.iterdir()].count("parts") == 0
    assert not list(tmp_path.glob("parts.partial/manifest.json"))
    stopped.end = 0
    stopped.made.clear()
    assert prepare(CONFIG, tmp_path / "parts") == whole
    order = [(0, i) for i in range(10)] + [(1, i) for i in range(5)]
    starts = [0, 4, 8, 10, 14, 15]  # of parts
    first = max(start for start in starts if start < end)
    assert stopped.made == order[first:]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_what_is_begun_goes_on_with_the_same_source_alone(tmp_path, stopped):
    stopped.end = 7
    with pytest.raises(Stopped):
        prepare(CONFIG, tmp_path / "out")
    with pytest.raises(ValueError, match=r"source.train: tones:10 there, tones:9 asked for"):
        prepare(SpeechConfig("tones:9", "tones:5@1", vocab_size=12), tmp_path / "out")
    audio = tmp_path / "out.partial" / "train.audio"
    audio.write_bytes(audio.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"train.audio: was cut off; delete .*out.partial"):
        prepare(CONFIG, tmp_path / "out")


def test_a_source_that_changes_is_seen(tmp_path, monkeypatch, store):
    """Before it goes on, and at the end."""
    seen = iter(["as it was", "other", "as it was", "other"])

    def second():
        if "other" in said:
            yield from MADE_UP["good"]
        else:
            raise Stopped

    said = []

    def parts(source):
        said.append(next(seen) if source == "it" else "")
        return [
            Part("first", "", said[-1], functools.partial(iter, MADE_UP["good"])),
            Part("second", "", "", second if source == "it" else tuple),
        ]

    monkeypatch.setattr(recordings, "parts", parts)
    config = SpeechConfig("it", "good", tokenizer=str(store / "tokenizer.model"))
    with pytest.raises(Stopped):
        prepare(config, tmp_path / "out")
    with pytest.raises(ValueError, match="changed since this preparation began, as train: first"):
        prepare(config, tmp_path / "out")
    with pytest.raises(ValueError, match="changed while they were read"):
        prepare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_that_has_finished_no_part_is_begun_anew(tmp_path, stopped):
    stopped.end = 3
    with pytest.raises(Stopped):
        prepare(CONFIG, tmp_path / "out")
    stopped.end = 0
    manifest = prepare(SpeechConfig("tones:9", "tones:5@1", vocab_size=12), tmp_path / "out")
    assert manifest["splits"]["train"]["recordings"] == 9


def test_one_process_writes_at_a_time(tmp_path, stopped, monkeypatch):
    def second(seed, number):
        prepare(CONFIG, tmp_path / "out")

    monkeypatch.setattr(tones, "recording", second)
    with pytest.raises(ValueError, match="another process is writing it"):
        prepare(CONFIG, tmp_path / "out")


def test_one_that_ended_before_its_folder_had_its_name(store, tmp_path):
    config = SpeechConfig("tones:40", "tones:8@1,tones:2@2", vocab_size=12)
    shutil.copytree(store, tmp_path / "out.partial")
    manifest = prepare(config, tmp_path / "out")
    assert manifest == prepare(config, store)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


IN_SMALL_PARTS = """
import runpy, sys
from data.speech import recordings
recordings.AT_A_TIME = 400
sys.argv[0] = "scripts/prepare_speech.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path):
    """By SIGKILL, at moments that come as they come."""
    command = [
        sys.executable, "-c", IN_SMALL_PARTS, "--train=tones:1200", "--vocab_size=12",
        "--validation=tones:20@1", f"--output={tmp_path / 'out'}",
    ]  # fmt: skip
    for record in ("train-00000.json", "train-00001.json"):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        path = tmp_path / "out.partial" / "progress" / record
        while not path.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on after 2 of 3 parts" in done.stderr
    opened = SpeechStore(tmp_path / "out").train
    for i in (0, 399, 400, 1199):
        np.testing.assert_array_equal(opened.audio(i), tones.recording(0, i)[0])


MADE_UP = {
    "good": [Recording("a", SECOND, " NI  USA "), Recording("b", SECOND, "OE NI")],
    "long": [Recording("c", np.ones(16_001, np.int16), "NI"), Recording("d", SECOND, "NI " * 10)],
    "empty": [Recording("e", SECOND[:0], "NI")],
    "wordless": [Recording("f", SECOND, "  ")],
    "foreign": [Recording("g", SECOND, "NI Ü USA?")],
    "hurried": [Recording("h", SECOND[:1600], "NI USA")],
    "torn": [Broken("unreadable", "i.flac: Error opening")],
}


@pytest.fixture
def made_up(monkeypatch, store):
    """Prepares from MADE_UP; returns a function of the sources and the limit of broken ones."""

    def parts(source):
        return [Part(source, source, source, functools.partial(iter, MADE_UP[source]))]

    monkeypatch.setattr(recordings, "parts", parts)

    def make(sources, output, max_broken=0):
        tokenizer = str(store / "tokenizer.model")
        limits = {"max_seconds": 1.0, "max_characters": 20, "max_broken": max_broken}
        return prepare(SpeechConfig(sources, "good", tokenizer=tokenizer, **limits), output)

    return make


def test_lengths_that_are_not_wanted_are_left_out_and_counted(made_up, tmp_path):
    split = made_up("long,good", tmp_path / "out")["splits"]["train"]
    assert split["recordings"] == 2
    assert split["left_out"] == {"longer than 1 s": 1, "of more than 20 characters": 1}
    assert SpeechStore(tmp_path / "out").train.text(0) == "NI USA"


@pytest.mark.parametrize(
    "source, kind, message",
    [
        ("empty", "of no length", "e: a recording of no length"),
        ("wordless", "without a word", "f: its transcript is empty"),
        ("foreign", "with letters outside of the vocabulary", "g: '?', 'Ü' of 'NI Ü USA?'"),
        ("hurried", "too short for its transcript", "h: 3 positions of 0.04 s, and CTC needs 7"),
        ("torn", "unreadable", "i.flac: Error opening"),
    ],
)
def test_what_is_broken_is_named_counted_and_skipped(made_up, tmp_path, source, kind, message):
    with pytest.raises(ValueError) as error:
        made_up(f"{source},good", tmp_path / "refused")
    assert "max_broken=0" in str(error.value)
    assert message in str(error.value)
    assert not (tmp_path / "refused").exists()

    manifest = made_up(f"good,{source}", tmp_path / "out", max_broken=1)
    split = manifest["splits"]["train"]
    assert (split["recordings"], split["broken"]) == (2, {kind: 1})
    assert made_up(f"good,{source}", tmp_path / "out", max_broken=1) == manifest
    with pytest.raises(ValueError) as error:
        made_up(f"good,{source}", tmp_path / "out", max_broken=0)
    assert "is complete and lacks 1 broken recordings of train" in str(error.value)
    with pytest.raises(ValueError) as error:
        made_up(f"{source},{source}", tmp_path / "twice", max_broken=1)
    assert message in str(error.value)


def test_folders_as_librispeech_comes(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    chapter = tmp_path / "19" / "198"
    chapter.mkdir(parents=True)
    for name, rate, channels in (("0", 16_000, 1), ("1", 8_000, 1), ("2", 16_000, 2)):
        audio = np.arange(1600 * channels, dtype=np.int16).reshape(-1, channels)
        soundfile.write(chapter / f"19-198-000{name}.flac", audio, rate, subtype="PCM_16")
    (chapter / "19-198-0003.flac").write_bytes(b"fLaC and then nothing")
    whole = (chapter / "19-198-0000.flac").read_bytes()
    (chapter / "19-198-0004.flac").write_bytes(whole[: len(whole) // 2])
    lines = [f"19-198-000{i} A TALE OF {i}" for i in range(6)]
    (chapter / "19-198.trans.txt").write_text("\n".join(lines) + "\n")

    first, *rest = read(str(tmp_path))
    assert first.text == "A TALE OF 0"
    np.testing.assert_array_equal(first.audio, np.arange(1600))
    kinds = ["of another format"] * 2 + ["unreadable"] * 2 + ["without its file"]
    assert [record.kind for record in rest] == kinds
    assert "8000 Hz, 1 channels" in rest[0].message

    (before,) = recordings.parts(str(tmp_path))
    other = tmp_path / "copy"
    shutil.copytree(tmp_path / "19", other)
    (copied,) = recordings.parts(str(other))
    assert copied.content == before.content
    (other / "198" / "19-198-0000.flac").write_bytes(whole + b"0")
    (changed,) = recordings.parts(str(other))
    assert changed.content != before.content
    assert changed.seen != copied.seen


@pytest.mark.slow  # it imports TensorFlow
def test_tensorflow_datasets(monkeypatch):
    """As its `librispeech` is, by its own stand-in for data; a thousand in a part."""
    tfds = pytest.importorskip("tensorflow_datasets")
    asked = []

    def as_dataset(self, *rest, split, **more):
        import tensorflow as tf

        asked.append(split)
        one = {"speech": tf.range(5, dtype=tf.int64), "text": "SO IT IS", "id": "19-198-0000"}
        return tf.data.Dataset.from_tensors(one)

    sizes = {"dev_clean": [900, 800], "dev_other": [5]}
    splits = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=0)
        for name, lengths in sizes.items()
    }
    monkeypatch.setattr(tfds.core.DatasetInfo, "splits", splits)
    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        one, *rest = read("tfds:librispeech:2.*.*@dev_clean+dev_other")
        with pytest.raises(ValueError, match="tfds build librispeech"):
            recordings.parts("tfds:librispeech:2.*.*@nothing")
    assert (one.name, one.text, one.audio.tolist()) == ("19-198-0000", "SO IT IS", [0, 1, 2, 3, 4])
    assert asked == ["dev_clean[0:1000]", "dev_clean[1000:1700]", "dev_other[0:5]"]
    assert len(rest) == 2


def test_sources_that_are_none(tmp_path):
    for source, message in (
        ("tones:many", "write tones:COUNT"),
        (str(tmp_path / "nowhere"), "no such folder"),
        (str(tmp_path), "no *.trans.txt"),
        ("tfds:librispeech:2.*.*", "@SPLIT"),
    ):
        with pytest.raises(ValueError) as error:
            read(source)
        assert message in str(error.value)


def test_damage_is_refused(store, tmp_path):
    with pytest.raises(ValueError) as error:
        SpeechStore(tmp_path)
    assert "no finished store of speech" in str(error.value)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in store.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "train.audio").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        SpeechStore(copy)
    assert "train.audio: is not of" in str(error.value)


def test_a_test_split_lies_beside_the_others(tmp_path, store):
    config = SpeechConfig("tones:40", "tones:8@1,tones:2@2", "tones:3@3", vocab_size=12)
    manifest = prepare(config, tmp_path / "tones")
    assert manifest["splits"]["test"]["recordings"] == 3
    opened = SpeechStore(tmp_path / "tones")
    assert [opened.test.text(i) for i in range(3)] == [tones.recording(3, i)[1] for i in range(3)]
    assert SpeechStore(store).test is None
    assert opened.fingerprint != SpeechStore(store).fingerprint
    with pytest.raises(ValueError, match=r"source\.test: tones:3@3 there, None asked for"):
        prepare(dataclasses.replace(config, test=""), tmp_path / "tones")


FILES = [f"{split}.{part}" for split in ("train", "validation") for part in store_module.DTYPES]


@pytest.mark.parametrize("name", [*FILES, "tokenizer.model"])
def test_a_flipped_bit_is_refused(store, tmp_path, name):
    copy = shutil.copytree(store, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        SpeechStore(copy)
    assert f"{copy / name} is corrupt: SHA-256 is" in str(error.value)


def test_of_much_audio_the_content_is_not_read(store, monkeypatch):
    read = []
    monkeypatch.setattr(store_module, "VERIFIED_BYTES", 1000)
    real = store_module.check_sha256
    monkeypatch.setattr(
        store_module, "check_sha256", lambda path, *s: read.append(path.name) or real(path, *s)
    )
    SpeechStore(store)
    assert {name for name in FILES if not name.endswith(".audio")} < set(read)
    assert not any(name.endswith(".audio") for name in read)
