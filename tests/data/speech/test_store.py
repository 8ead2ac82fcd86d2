"""Recordings to a store and back; what is left out, and what is broken, is named and counted."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.sources.parts import Broken
from data.speech import recordings, tones
from data.speech.prepare import SpeechConfig, prepare
from data.speech.recordings import Recording
from data.speech.store import SpeechStore

ROOT = Path(__file__).resolve().parents[3]
SECOND = np.ones(16_000, np.int16)


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
    assert again.returncode == 2
    assert "is there already" in again.stderr


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
    monkeypatch.setattr(recordings, "read", lambda source: iter(MADE_UP[source]))

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
    with pytest.raises(ValueError) as error:
        made_up(f"{source},{source}", tmp_path / "refused", max_broken=1)
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

    first, *rest = recordings.read(str(tmp_path))
    assert first.text == "A TALE OF 0"
    np.testing.assert_array_equal(first.audio, np.arange(1600))
    kinds = ["of another format"] * 2 + ["unreadable"] * 2 + ["without its file"]
    assert [record.kind for record in rest] == kinds
    assert "8000 Hz, 1 channels" in rest[0].message


@pytest.mark.slow  # it imports TensorFlow
def test_tensorflow_datasets():
    """Examples as TFDS's `librispeech` has them, by its own stand-in for data."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def as_dataset(self, *rest, **more):
        import tensorflow as tf

        one = {"speech": tf.range(5, dtype=tf.int64), "text": "SO IT IS", "id": "19-198-0000"}
        return tf.data.Dataset.from_tensors(one)

    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        (one,) = recordings.read("tfds:librispeech:2.*.*@dev_clean")
    assert (one.name, one.text, one.audio.tolist()) == ("19-198-0000", "SO IT IS", [0, 1, 2, 3, 4])


def test_sources_that_are_none(tmp_path):
    for source, message in (
        ("tones:many", "write tones:COUNT"),
        (str(tmp_path / "nowhere"), "no such folder"),
        (str(tmp_path), "no *.trans.txt"),
        ("tfds:librispeech:2.*.*", "@SPLIT"),
    ):
        with pytest.raises(ValueError) as error:
            list(recordings.read(source))
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
