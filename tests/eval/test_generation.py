"""Text from a run's folder: repeatable, and what the model's own probabilities say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.tokenizer import Tokenizer
from eval.generation import load_model, sample
from laser.training.checkpoint import CheckpointError
from models.config import ModelConfig
from models.decoder import init_parameters, structure
from tests.training import runs

PROMPT = "And God said"


@pytest.fixture
def model(store):
    config = ModelConfig(
        vocab_size=400, num_layers=2, model_dim=32, mlp_dim=64, num_heads=2, head_dim=16
    )
    return config, init_parameters(config, 0), Tokenizer(store / "tokenizer.model")


def test_nearly_cold_sampling_takes_the_likeliest_token_each_time(model):
    config, params, tokenizer = model
    text = sample(*model, PROMPT, new_tokens=5, temperature=1e-4, seed=0)
    network = nnx.merge(structure(config), params)
    tokens = [tokenizer.eos_id, *tokenizer.encode(PROMPT)]
    start = len(tokens)
    for _ in range(5):
        logits = network.logits(network(jnp.asarray([tokens]))[0])
        tokens.append(int(np.argmax(logits[0, -1])))
    assert tokenizer.eos_id not in tokens[start:]
    assert text == tokenizer.decode(tokens[start:])


def test_same_seed_same_text(model):
    first, again, other = (
        sample(*model, PROMPT, new_tokens=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_load_model_reads_the_folder_of_a_run(arguments, tmp_path):
    done = runs.train([*arguments, "--config.training.steps=3"], tmp_path)
    assert done.returncode == 0, done.stderr
    config, params, tokenizer = load_model(tmp_path)
    assert config.vocab_size == 400
    assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    with pytest.raises(CheckpointError, match="no checkpoint 2"):
        load_model(tmp_path, 2)
    with pytest.raises(ValueError, match="no run here"):
        load_model(tmp_path / "nowhere")
