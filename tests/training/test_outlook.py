"""What a run says before its first step, and the passes over its data that it counts."""

import dataclasses

import pytest

from configs import base, c4, conformer
from laser.training.config import load_config
from laser.training.outlook import outlook, warn_of_repeated_text
from laser.training.rows import StoreRows, progress
from models.families import abstract_parameters


class Rows:
    """As many of them as wanted."""

    def __init__(self, unit, rows):
        self.unit, self._rows = unit, rows

    def epochs(self, config, steps):
        return {name: steps * config.training.batch_size / n for name, n in self._rows.items()}

    def metrics(self, config, steps):
        return {}


C4 = {"stores/c4": 150_550_000}  # rows of 1,024 tokens


def test_the_paper_s_run_says_how_large_it_is_and_how_often_it_reads_c4(caplog):
    config = load_config(c4.get_config("size=301m"))
    params = abstract_parameters(config.model)
    rows = Rows("tokens", C4)
    assert outlook(config, rows, params) == (
        "301 M parameters (269 M beside the embedding); 1.05 M tokens a step, 168 B in all = "
        "1.09 epochs of stores/c4"
    )
    warn_of_repeated_text(config, rows)
    assert caplog.text == ""


def test_speech_is_told_in_recordings_and_may_come_again(caplog):
    config = load_config(conformer.get_config())
    params = abstract_parameters(config.model)
    rows = Rows("recordings", {"stores/librispeech": 281_241})
    told = outlook(config, rows, params)
    assert "parameters; 256 recordings a step, 76,000 steps = 69.2 epochs of stores/libri" in told
    warn_of_repeated_text(config, rows)
    assert caplog.text == ""
    assert progress(config, rows, 10) == {"epoch": 2560 / 281_241}


def test_text_that_comes_again_is_named_with_the_step(caplog):
    config = load_config(c4.get_config())
    warn_of_repeated_text(config, Rows("tokens", {"web": 10**9, "books": 1024 * 2000}))
    assert [record.getMessage() for record in caplog.records] == [
        "books is read 80 times: from step 2,001 on its text comes again; training.steps=2000 "
        "reads it once"
    ]


@pytest.mark.parametrize("mixed", [False, True])
def test_tokens_and_epochs_follow_from_the_step(store, mixed):
    config = base.get_config()
    config.model.vocab_size, config.data.seq_len, config.training.batch_size = 400, 32, 8
    config.data.store = f"{store}:3,{store}/:1" if mixed else str(store)
    config = load_config(config)
    rows = StoreRows(config)
    count = rows.steps_per_epoch(config) * 8 // (2 if mixed else 1)
    found = progress(config, rows, 40)
    assert found["tokens"] == 40 * 8 * 32
    epochs = [x for name, x in found.items() if name.startswith("epoch")]
    shares = [0.75, 0.25] if mixed else [1.0]
    assert epochs == pytest.approx([320 * share / count for share in shares], rel=0.05)
    assert ("epoch" in found) != mixed
    twice = dataclasses.replace(config.training, batch_size=16)
    assert progress(dataclasses.replace(config, training=twice), rows, 20) == found
