"""A run that starts from the parameters of another one, its init_from."""

import functools

import jax

from data.reading.files import path_of
from laser.training.checkpoint import CheckpointError, saved_steps
from laser.training.config import RunConfig
from laser.training.folders import folder_of
from laser.training.rows import Rows
from laser.training.run_folder import load_run_config
from models.families import AnyModelConfig, init_parameters


def check_init(config: RunConfig, rows: Rows) -> int:
    """The newest step of init_from. Raises ValueError if its parameters do not fit this run."""
    start = folder_of(config.init_from)
    where = f"init_from={config.init_from}"
    try:
        theirs = load_run_config(config.init_from).model
        step = saved_steps(start)[-1]
    except (ValueError, CheckpointError) as error:
        raise ValueError(f"{where}: {error}") from error
    tokenizer = rows.tokenizer_path
    if tokenizer and (start / "tokenizer.model").read_bytes() != path_of(tokenizer).read_bytes():
        raise ValueError(
            f"{where}: its tokenizer is not that of {tokenizer}, so the same ids mean "
            "other text; prepare the data with --tokenizer=" + str(start / "tokenizer.model")
        )
    there, here = (_parameter_shapes(model) for model in (theirs, config.model))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{where}: its model has other parameters: {name} is {there.get(name, 'absent')} "
                f"there and {here.get(name, 'absent')} here; leave the sections model and "
                "attention as that run has them"
            )
    return step


def _parameter_shapes(model: AnyModelConfig) -> dict[str, tuple[int, ...]]:
    abstract = jax.eval_shape(functools.partial(init_parameters, model, 0))
    leaves = jax.tree_util.tree_flatten_with_path(abstract)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
