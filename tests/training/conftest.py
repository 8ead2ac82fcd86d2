"""A small store of real text, and a small config on it, for tests that run whole trainings."""

import itertools

import pytest

from data import corpus
from data.prepare import prepare


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Folder of a token store: 60 chapters, 400 pieces."""
    folder = tmp_path_factory.mktemp("text")
    chapters = itertools.islice(corpus.documents("train"), 60)
    for i, chapter in enumerate(chapters):
        (folder / f"{i:02}.txt").write_text(chapter)
    output = tmp_path_factory.mktemp("stores") / "small"
    prepare(str(folder), output, vocab_size=400, validation_fraction=0.1)
    return output


@pytest.fixture
def arguments(store):
    """Command line of a 20-step run without --workdir."""
    fields = {
        "model.vocab_size": 400,
        "model.num_layers": 2,
        "model.model_dim": 32,
        "model.mlp_dim": 64,
        "model.num_heads": 2,
        "model.head_dim": 16,
        "data.store": store,
        "data.seq_len": 32,
        "training.steps": 20,
        "training.batch_size": 8,
        "training.log_every": 1,
        "training.eval_every": 20,
        "optimizer.warmup_steps": 3,
        "optimizer.learning_rate": 0.01,
        "checkpoint.every": 20,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config=configs/quickstart.py", *overrides]
