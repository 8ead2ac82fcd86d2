"""A small run with two checkpoints, trained once."""

import pytest

from tests.once import once
from tests.training import runs


def small_run(store):
    """Its command line: 4 steps, rows of 128 tokens."""
    fields = {
        "model.vocab_size": 400, "model.num_layers": 2, "model.model_dim": 32,
        "model.mlp_dim": 64, "model.num_heads": 2, "model.head_dim": 16, "data.store": store,
        "data.seq_len": 128, "training.steps": 4, "training.batch_size": 8,
        "optimizer.warmup_steps": 1, "checkpoint.every": 2,
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config=configs/quickstart.py", *overrides]


@pytest.fixture(scope="session")
def trained_run(store, tmp_path_factory):
    """Its folder; checkpoints 2 and 4."""

    def make(folder):
        done = runs.train(small_run(store), folder / "small")
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "trained-run", make) / "small"
