"""A mixture's turns, shares and epochs; rows of several stores; what is refused."""

import itertools
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest

from configs import base
from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare
from data.reading.loader import train_batches
from data.reading.mixture import Mixture, names, parse, turns
from data.reading.store import TokenStore
from data.sources import corpus
from laser.training.config import load_config
from laser.training.rows import StoreRows


class Rows:
    """A split of which only the number of rows matters."""

    def __init__(self, number):
        self.num_tokens = number + 1
        self._number = number

    def num_rows(self, seq_len):
        return self._number // seq_len


WEIGHTS = ["0.7,0.3", "1,1,1", "3,1", "0.5,0.25,0.125,0.125", "97,1,1,1", "5,4,3,2,1,1,1,1"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_after_any_number_of_rows_no_share_is_off_by_a_row(weights):
    parts = parse(",".join(f"s{i}:{w}" for i, w in enumerate(weights.split(","))))
    shares = [part.share for part in parts]
    assert sum(shares) == 1
    pattern = turns(shares)
    had = np.cumsum(pattern[:, None] == np.arange(len(shares)), axis=0)
    wanted = np.arange(1, len(pattern) + 1)[:, None] * np.float64(shares)
    assert np.abs(had - wanted).max() < 1 - 0.9 / (2 * len(shares) - 2) + 1e-9
    assert list(had[-1]) == [share * len(pattern) for share in shares]


@pytest.mark.slow
@pytest.mark.parametrize("block_rows", [1, 16])
def test_hundreds_of_steps_have_the_shares_and_whole_epochs(block_rows):
    """Each row once an epoch of its store, in blocks that are of one store each."""
    sizes, batch, steps = (420, 80, 23), 24, 600
    shares = [Fraction(7, 10), Fraction(1, 4), Fraction(1, 20)]
    mixture = Mixture([Rows(size) for size in sizes], shares)
    places = [mixture.places(3, step, batch, 1, block_rows) for step in range(steps)]
    ids = np.concatenate([place.rows for place in places])
    starts = np.cumsum([0, *sizes])
    for place in places[:50]:
        last = place.first + place.length - 1
        assert (
            np.searchsorted(starts, place.first, "right") == np.searchsorted(starts, last, "right")
        ).all()
    ends = np.cumsum(sizes)
    for k, share in enumerate(shares):
        mine = ids[(ids >= ends[k] - sizes[k]) & (ids < ends[k])] - (ends[k] - sizes[k])
        assert abs(len(mine) - share * len(ids)) < 1
        assert mixture.counts(len(ids))[k] == len(mine)
        epochs = mine[: len(mine) // sizes[k] * sizes[k]].reshape(-1, sizes[k])
        assert len(epochs) >= 20
        assert (np.sort(epochs, axis=1) == np.arange(sizes[k])).all()
        assert not np.array_equal(epochs[0], epochs[1])


@pytest.fixture(scope="module")
def other(store, tmp_path_factory):
    """A store of other text with the tokenizer of `store`."""
    folder = tmp_path_factory.mktemp("text")
    for i, chapter in enumerate(itertools.islice(corpus.documents("train"), 100, 130)):
        (folder / f"{i:02}.txt").write_text(chapter)
    output = tmp_path_factory.mktemp("stores") / "other"
    tokenizer = str(store / "tokenizer.model")
    prepare(StoreConfig(str(folder), tokenizer=tokenizer, validation_fraction=0.1), output)
    return output


def config_of(text, **data):
    config = base.get_config()
    config.model.vocab_size = 400
    config.training.batch_size = 8
    config.data.update({"store": text, "seq_len": 32, **data})
    return load_config(config)


def test_batches_are_the_rows_of_the_stores(store, other):
    config = config_of(f"{store}:3,{other}:1")
    rows = StoreRows(config)
    splits = [TokenStore(path).split("train") for path in (store, other)]
    first = splits[0].num_rows(32)
    with train_batches(
        Mixture(splits, [Fraction(3, 4), Fraction(1, 4)]), seq_len=32, batch_size=8, seed=0,
        start_step=5, stop_step=8, segment_ids=False, eos_id=1,
    ) as batches:  # fmt: skip
        for step, batch in batches:
            ids = rows.row_ids(config, step)
            assert (ids >= first).sum() == 2
            expected = [
                splits[int(i >= first)].rows([i - first * (i >= first)], 32)[0] for i in ids
            ]
            np.testing.assert_array_equal(batch["inputs"], np.array(expected)[:, :-1])
    assert rows.metrics(config, 7) == {f"share/{store.name}": 0.75, f"share/{other.name}": 0.25}
    both = sum(split.num_rows(32) for split in splits)
    assert rows.steps_per_epoch(config) == both // 8
    fingerprints = {
        StoreRows(config_of(text)).fingerprint
        for text in (str(store), str(other), f"{store}:3,{other}:1", f"{store}:1,{other}:1")
    }
    assert len(fingerprints) == 4
    again = StoreRows(config_of(f"{store}:0.75,{other}:0.25"))
    assert again.fingerprint == rows.fingerprint
    parts = rows.validation_parts(config, None)
    assert [(part.name, part.share) for part in parts] == [(store.name, 0.75), (other.name, 0.25)]
    for part, path in zip(parts, (store, other), strict=True):
        split = TokenStore(path).split("validation")
        seen = sum(float(batch["weights"].sum()) for batch in part.batches)
        assert seen == part.tokens == split.num_tokens - 1
        assert part.bytes == split.num_bytes


def test_one_store_is_as_ever(store):
    config = config_of(str(store))
    rows = StoreRows(config)
    assert rows.fingerprint == TokenStore(store).fingerprint
    assert rows.metrics(config, 10) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0.7,b", "'b' is no PATH:WEIGHT with a weight above 0"),
        ("a:0,b:0", "'a:0' is no PATH:WEIGHT with a weight above 0"),
        ("a:1,b:-1", "'b:-1' is no PATH:WEIGHT"),
        ("a:1,b:nan", "'b:nan' is no PATH:WEIGHT"),
        ("a:1,b:1/0", "'b:1/0' is no PATH:WEIGHT"),
        ("a:1,a:2", "'a' is there twice"),
        ("a:0.123456789,b:0.5", "repeat only after"),
        ("a:1,", "'' is no PATH:WEIGHT"),
    ],
)
def test_weights_that_mean_nothing_are_one_line(text, message):
    with pytest.raises(ValueError, match=re.escape(f"data.store={text!r}: ") + ".*" + message):
        parse(text)


def test_stores_that_do_not_fit_are_named(store, other, tmp_path):
    with pytest.raises(ValueError, match=r"data\.store='nowhere': no such folder"):
        StoreRows(config_of(f"{store}:1,nowhere:1"))
    text = tmp_path / "text"
    text.mkdir()
    for i, chapter in enumerate(itertools.islice(corpus.documents("train"), 20)):
        (text / f"{i}.txt").write_text(chapter)
    foreign = tmp_path / "foreign"
    prepare(StoreConfig(str(text), vocab_size=380, validation_fraction=0.2), foreign)
    with pytest.raises(ValueError, match=f"the tokenizer of {foreign} is not that of {store}"):
        StoreRows(config_of(f"{store}:1,{foreign}:1"))
    shutil.rmtree(foreign)


def test_names_are_short_where_they_differ():
    assert names(parse("x/a:1,y/b:1")) == ["a", "b"]
    assert names(parse("x/a:1,y/a:1")) == ["x/a", "y/a"]
    assert names(parse("x/a")) == ["a"]
