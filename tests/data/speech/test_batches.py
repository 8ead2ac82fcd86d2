"""Batches of recordings: a function of seed and step, each recording once an epoch."""

import jax
import numpy as np
import pytest

from data.reading.examples import eval_ids, example_ids
from data.speech.augment import SpecAugment
from data.speech.batches import Shape, eval_batches, train_batches
from data.speech.prepare import SpeechConfig, prepare
from data.speech.store import SpeechStore

NONE, SOME = SpecAugment(0, 0, 0, 0.0), SpecAugment(2, 27, 3, 0.05)
SHAPE = Shape(rows=4, frames=400, labels=30)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "tones"
    prepare(SpeechConfig("tones:10", "tones:6@1", vocab_size=12), folder)
    return SpeechStore(folder)


def train(store, start, stop, augment=SOME, sharding=None):
    options = {"seed": 5, "start_step": start, "stop_step": stop, "sharding": sharding}
    with train_batches(store.train, SHAPE, augment, **options) as batches:
        return {step: jax.tree.map(np.asarray, batch) for step, batch in batches}


def test_an_epoch_has_each_recording_once(store):
    batches = train(store, 0, 3, NONE)
    ids = [i for step in range(3) for i in example_ids(5, step, 4, 10)]
    assert sorted(ids) == list(range(10))
    rows = [(batch, row) for batch in batches.values() for row in range(4)]
    for number, (batch, row) in zip(ids, rows):
        features = store.train.features(number)
        frames, labels = len(features), store.train.labels(number)
        assert (batch["frames"][row], batch["labels"][row]) == (frames, len(labels))
        np.testing.assert_array_equal(batch["inputs"][row, :frames], features)
        assert not batch["inputs"][row, frames:].any()
        np.testing.assert_array_equal(batch["targets"][row, : len(labels)], labels)
    for batch, row in rows[10:]:  # fill up the last batch
        assert not any(array[row].any() for array in batch.values())


def test_what_is_drawn_follows_from_seed_and_step(store):
    whole, resumed = train(store, 0, 5), train(store, 2, 5)
    for step in (2, 3, 4):
        jax.tree.map(np.testing.assert_array_equal, whole[step], resumed[step])
    plain = train(store, 0, 1, NONE)[0]
    assert (plain["inputs"] != whole[0]["inputs"]).any()
    noise = np.concatenate([batch["noise"] for batch in whole.values()])
    assert len(set(noise[noise > 0].tolist())) == 4 + 4 + 2 + 4 + 4


def test_devices_split_the_rows_and_change_nothing(store):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    split, whole = train(store, 0, 1, sharding=sharding)[0], train(store, 0, 1)[0]
    jax.tree.map(np.testing.assert_array_equal, split, whole)


def test_evaluation_has_each_recording_once_and_nothing_drawn(store):
    batches = [jax.tree.map(np.asarray, batch) for batch in eval_batches(store.validation, SHAPE)]
    assert [batch["frames"].astype(bool).tolist() for batch in batches] == [
        [True] * 4,
        [True] * 2 + [False] * 2,
    ]
    assert "noise" not in batches[0]
    features = store.validation.features(5)
    np.testing.assert_array_equal(batches[1]["inputs"][1, : len(features)], features)


def test_a_part_of_a_split_is_taken_all_over_it(store):
    """The first recordings are of the first speakers."""
    (batch,) = eval_batches(store.train, SHAPE, max_batches=1)
    ids = eval_ids(len(store.train), SHAPE.rows, 1)
    assert len(set(ids.tolist())) == 4
    assert sorted(ids.tolist()) != [0, 1, 2, 3]
    for row, number in enumerate(ids):
        features = store.train.features(number)
        np.testing.assert_array_equal(batch["inputs"][row, : len(features)], features)
    assert set(eval_ids(10, 4, 3).tolist()) == set(range(10))
    assert eval_ids(10, 4, 0).tolist() == list(range(10))
