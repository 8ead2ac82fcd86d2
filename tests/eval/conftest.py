"""A small run with two checkpoints, trained once."""

import pytest

from tests.training import runs


@pytest.fixture(scope="session")
def trained_run(store, tmp_path_factory):
    """Its folder; steps 2 and 4, rows of 128 tokens."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    fields = {
        "model.vocab_size": 400, "model.num_layers": 2, "model.model_dim": 32,
        "model.mlp_dim": 64, "model.num_heads": 2, "model.head_dim": 16, "data.store": store,
        "data.seq_len": 128, "training.steps": 4, "training.batch_size": 8,
        "optimizer.warmup_steps": 1, "checkpoint.every": 2,
    }  # fmt: skip
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    done = runs.train(["--config=configs/quickstart.py", *arguments], workdir)
    assert done.returncode == 0, done.stderr
    return workdir
