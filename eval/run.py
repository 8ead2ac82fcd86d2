"""A run's model for evaluation, from its folder alone, on the devices that are here.

Requires no token store: config, tokenizer and parameters are in the folder.
"""

import dataclasses
import hashlib
import math
from pathlib import Path

import jax

from data.tokenizer import Tokenizer
from eval.generation.generator import Generator
from eval.likelihood import oneshot
from eval.likelihood.scoring import Scorer
from eval.tasks.catalogue import OFFLINE
from laser.training import checkpoint, hosts, sharding
from laser.training.checkpoint import CheckpointError, restore_parameters
from laser.training.compiler import keep_programs
from laser.training.config import MeshConfig, RunConfig, load_config
from laser.training.hardware import CHIPS
from laser.training.run_folder import load_record, load_run_config
from models.families import Parameters, abstract_parameters


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What scores and generates: `scorer.score(params, ...)` and `generator.generate(params, ...)`,
    with prompts by `tokenizer`."""

    config: RunConfig
    step: int
    params: Parameters
    tokenizer: Tokenizer
    scorer: Scorer
    generator: Generator


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints, in order. Raises ValueError where there is no run, and
    CheckpointError where it has none."""
    load_run_config(str(workdir))
    return checkpoint.saved_steps(workdir)


def chosen_step(workdir: Path, step: int | None) -> int:
    """`step`, or that of the newest checkpoint if it is None. Raises as `saved_steps`."""
    return saved_steps(workdir)[-1] if step is None else step


def fingerprint(workdir: Path, step: int) -> str:
    """Stands for what scores depend on beside the prompts: a checkpoint's parameters (by the
    checksums it was saved with), its model's config, the length of its rows and its tokenizer.

    Raises:
      ValueError: as `load_record`.
      CheckpointError: the checkpoint's record can't be read.
    """
    record = load_record(str(workdir), step)
    config = load_config(record["config"])
    asked = (config.model, config.data.seq_len, record["tokenizer"])
    digest = hashlib.sha256(repr(asked).encode())
    path = workdir / "checkpoints" / str(step) / "record" / "metadata"
    try:
        digest.update(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()


def open_model(workdir: Path, step: int | None = None) -> TrainedModel:
    """The model of a run's checkpoint, the newest if `step` is None.

    Raises:
      ValueError: there is no run of a decoder in the folder, or there are other hosts.
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    step = chosen_step(workdir, step)
    config = load_decoder_config(workdir, step)
    params, mesh = open_parameters(workdir, config, step)
    tokenizer = Tokenizer(str(workdir / "tokenizer.model"))
    scorer = Scorer(config.model, config.data.seq_len, mesh)
    generator = Generator(config.model, tokenizer, mesh, max_length=config.data.seq_len)
    return TrainedModel(config, step, params, tokenizer, scorer, generator)


def open_parameters(
    workdir: Path, config: RunConfig, step: int
) -> tuple[Parameters, jax.sharding.Mesh]:
    """The parameters of a checkpoint of any model, and the mesh that they lie on. Raises as
    `open_model`."""
    hosts.refuse_several()
    keep_programs(workdir, jax.default_backend())
    mesh = mesh_of(config)
    abstract = abstract_parameters(config.model)
    shardings = sharding.state_shardings(mesh, abstract)
    return restore_parameters(workdir, sharding.described(abstract, shardings), step), mesh


def load_decoder_config(workdir: Path, step: int | None = None) -> RunConfig:
    """The config of a run, or of one of its checkpoints. Raises ValueError unless it is of a
    decoder."""
    config = load_run_config(str(workdir), step)
    if config.model.kind != "decoder":
        raise ValueError(
            f"{workdir}: model.kind={config.model.kind}, and only a decoder goes on with text"
        )
    return config


def offline_score(model: TrainedModel) -> tuple[float, int]:
    """Accuracy on the offline task (eval/tasks/offline.py) without demonstrations, between 0 and 1,
    and of how many passages. Chance is 0.25."""
    settings = oneshot.Settings(shots=0)
    data = oneshot.load_task(OFFLINE, settings, None)
    result = oneshot.evaluate_task(data, settings, model.scorer, model.params, model.tokenizer)
    return result["metrics"]["accuracy"]["mean"], result["n"]


def mesh_of(config: RunConfig) -> jax.sharding.Mesh:
    """All devices, with as many copies of the parameters as their memory has room for: weights that
    are split are gathered for each batch and each new token. The run's own mesh was for others."""
    device = jax.devices()[0]
    chip = CHIPS.get(device.device_kind)
    parameters = jax.tree.leaves(abstract_parameters(config.model))
    gib = sum(math.prod(x.shape) * x.dtype.itemsize for x in parameters) / 2**30
    shares = devices_a_copy(gib, chip.hbm_gib if chip else 0.0, jax.device_count())
    # The batch of training does not matter here: one that divides.
    batch = dataclasses.replace(config.training, batch_size=jax.device_count(), accumulation=1)
    mesh = MeshConfig(data=-1, fsdp=shares, tensor=1, max_unsharded=1.0)
    return sharding.make_mesh(dataclasses.replace(config, mesh=mesh, training=batch))


def devices_a_copy(parameters_gib: float, memory_gib: float, devices: int) -> int:
    """The fewest devices that hold a copy in float32, one in bfloat16 for generation, and have two
    fifths of their memory left for all else. 1 where their memory is not known, as a CPU's."""
    counts = [count for count in range(1, devices + 1) if devices % count == 0]
    fit = [count for count in counts if 1.5 * parameters_gib / count <= 0.6 * memory_gib]
    return (fit or counts[-1:])[0] if memory_gib else 1
