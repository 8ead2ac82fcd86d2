"""Text from a run's folder alone: its config, its tokenizer and the parameters of a checkpoint."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from data.tokenizer import Tokenizer
from laser.training.checkpoint import restore_parameters
from laser.training.run_folder import load_run_config
from models.config import ModelConfig
from models.decoder import Parameters, init_parameters, structure


def load_model(workdir: Path, step: int | None = None) -> tuple[ModelConfig, Parameters, Tokenizer]:
    """A run's model, on the first device. Raises ValueError or CheckpointError if there is none."""
    config = load_run_config(str(workdir)).model
    abstract = jax.eval_shape(functools.partial(init_parameters, config, 0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
    )
    params = restore_parameters(workdir, abstract, step)
    return config, params, Tokenizer(str(workdir / "tokenizer.model"))


def sample(
    config: ModelConfig,
    params: Parameters,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """A continuation of `prompt`, which begins a document, without the prompt itself.

    Ends at the end of the document or after `new_tokens`. Runs the whole model for every token.
    """
    prompt_ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    graph = structure(config)
    tokens = jnp.zeros((1, len(prompt_ids) + new_tokens), jnp.int32)
    tokens = tokens.at[0, : len(prompt_ids)].set(jnp.asarray(prompt_ids))

    @jax.jit
    def next_token(params, tokens, length, key):
        model = nnx.merge(graph, params)
        hidden_BTM, _ = model(tokens)
        logits_V = model.logits(hidden_BTM[:, length - 1])[0] / temperature
        token = jax.random.categorical(key, logits_V)
        return token, tokens.at[0, length].set(token)

    made: list[int] = []
    for i, key in enumerate(jax.random.split(jax.random.key(seed), new_tokens)):
        token, tokens = next_token(params, tokens, len(prompt_ids) + i, key)
        if int(token) == tokenizer.eos_id:
            break
        made.append(int(token))
    return tokenizer.decode(made)
