"""A run that starts from the parameters of another one, its init_from."""

from data.reading.files import path_of
from laser.training.checkpoint import CheckpointError, saved_steps
from laser.training.config import RunConfig
from laser.training.folders import folder_of
from laser.training.rows import Rows
from laser.training.run_folder import different_types, load_run_config
from laser.training.tensors import tensor_types
from models.families import abstract_parameters


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
    there, here = (tensor_types(abstract_parameters(model)) for model in (theirs, config.model))
    if other := different_types(there, here):
        raise ValueError(
            f"{where}: its model has other parameters: {other}; leave the sections model and "
            "attention as that run has them"
        )
    return step
