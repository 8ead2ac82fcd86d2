"""Lower bounds of a training step's time, counted by hand from the config.

Three resources, each taken to be used all the time and at its peak: matrix units, memory, links of
the torus. No program can be faster than the largest of the three; how near it comes is for a
measurement to say. Planning puts the compiled program's collectives in place of the count here.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from laser.training.config import MeshConfig, RunConfig
from laser.training.devices import check_devices
from laser.training.hardware import CHIPS, Chip
from models.families import AnyModelConfig, train_flops_per_token

NEWTON_SCHULZ_STEPS = 5  # of Muon, optax's


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that a step takes at least, by what limits it.

    Attributes:
      compute: matrix products, the recomputed ones too.
      memory: state, weights and kept activations through HBM; 0 unknown.
      interconnect: collectives within a slice; 0 unknown.
      slices: collectives between slices; 0 if there are none, or unknown.
    """

    compute: float
    memory: float
    interconnect: float
    slices: float = 0.0

    @property
    def seconds(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def binding(self) -> str:
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda name: parts[name])


def parameter_count(model: AnyModelConfig) -> int:
    """Of the matrices; norms and temperatures are fewer than 0.1 % of it."""
    layer = model.attention_weights + model.mlp_weights
    return model.num_layers * layer + model.outer_weights


def model_flops(config: RunConfig) -> float:
    """Of a step, without recomputation, causal attention counted half."""
    tokens = config.training.batch_size * config.data.seq_len
    return tokens * train_flops_per_token(config.model, config.data.seq_len)


def recomputed_flops(config: RunConfig, implementation: str) -> float:
    """What the backward pass of a step computes again.

    Args:
      config: of the run.
      implementation: of attention. `chunked` computes all its products again, `pallas` the logits.
    """
    model, length = config.model, config.data.seq_len // config.model.subsampling
    tokens = config.training.batch_size * length
    maps = model.head_dim // model.query_dim
    seen = length if model.causal else 2 * length  # twice the keys of a token
    logits = model.num_heads * maps * model.query_dim * seen  # of a layer and token
    values = model.num_heads * maps * model.head_dim * seen
    again = logits + (0 if implementation == "pallas" else values)
    if model.remat == "full":
        again += 2 * (model.attention_weights + model.mlp_weights)
        again -= 2 * model.model_dim * model.mlp_dim  # down is not needed
        again += logits + values if implementation == "pallas" else 0
    return tokens * model.num_layers * again


def kept_bytes(config: RunConfig, mesh: MeshConfig) -> float:
    """Activations that the backward pass of a micro-batch finds on a chip, between layers.

    Per token and layer, in the compute dtype: the block's input; with `dots` also queries, keys,
    values, attention's output and what the projections out of attention and into the MLP give;
    with `none` what lies between those too.
    """
    model = config.model
    heads = 2 * (model.num_heads + model.kv_heads) * model.head_dim / mesh.tensor
    hidden = model.hidden_mlp_matrices * model.mlp_dim / mesh.tensor
    items: float = model.model_dim
    if model.remat != "full":
        items += heads + model.model_dim + hidden
    if model.remat == "none":
        items += 2 * model.model_dim + hidden
    return items * model.num_layers * tokens_per_chip(config, mesh) * _itemsize(model)


def tokens_per_chip(config: RunConfig, mesh: MeshConfig) -> float:
    """Of a micro-batch, as the blocks have them."""
    length = config.data.seq_len / config.model.subsampling
    tokens = config.training.batch_size * length / config.training.accumulation
    return tokens / (mesh.data * mesh.fsdp)


def state_bytes(config: RunConfig, mesh: MeshConfig) -> float:
    """Parameters and optimizer state on a chip."""
    return 4 * sum(state_items(config)) / (mesh.fsdp * mesh.tensor)


def state_items(config: RunConfig) -> tuple[int, int]:
    """Float32 numbers of the parameters, and of the optimizer.

    Adam has two moments of each, and Muon one of those that it updates.
    """
    model, count = config.model, parameter_count(config.model)
    layers = count - model.outer_weights
    return count, 2 * count - (layers if config.optimizer.name == "muon" else 0)


def muon_flops(config: RunConfig, mesh: MeshConfig) -> float:
    """Of Muon's orthogonalisation on a chip; 0 for other optimizers.

    A step of it on m rows and n >= m columns is X Xᵀ, its square, and a product with X. Whole
    layers are spread over the chips that share parameters, so no chip has less than one.
    """
    if config.optimizer.name != "muon":
        return 0.0
    model, dim = config.model, config.model.model_dim
    wide = 2 * [model.num_heads * model.head_dim] + 2 * [model.kv_heads * model.head_dim]
    wide += (model.hidden_mlp_matrices + 1) * [model.mlp_dim]
    pairs = [(min(dim, other), max(dim, other)) for other in wide]
    layer = NEWTON_SCHULZ_STEPS * sum(4 * m * m * n + 2 * m**3 for m, n in pairs)
    return layer * math.ceil(model.num_layers / (mesh.fsdp * mesh.tensor))


def memory_bytes(config: RunConfig, mesh: MeshConfig) -> float:
    """What a step has to move through the memory of a chip at least.

    State once in and out; for every micro-batch the whole weights read on the forward pass and on
    the backward, and written before where they are gathered or cast, their gradient written and
    read, and kept activations likewise.
    """
    weights = parameter_count(config.model) * _itemsize(config.model) / mesh.tensor
    is_written = mesh.fsdp > 1 or config.model.dtype == "bfloat16"
    passes = (6 if is_written else 4) + (config.model.remat == "full")
    per_micro_batch = passes * weights + 2 * kept_bytes(config, mesh)
    return 2 * state_bytes(config, mesh) + config.training.accumulation * per_micro_batch


def collective_bytes(config: RunConfig, mesh: MeshConfig) -> dict[str, float]:
    """Bytes that a chip receives in a step over each axis of the config's mesh.

    For every micro-batch weights come on both passes and gradients go once (fsdp), and a layer's
    activations are all-reduced four times (tensor); a step sums float32 gradients over copies. Muon
    gathers whole layers, at least one on a chip, and gives their update back, in float32.
    """
    model, accumulation = config.model, config.training.accumulation
    weights = parameter_count(model) * _itemsize(model) / mesh.tensor
    share = parameter_count(model) * 4 / (mesh.fsdp * mesh.tensor)
    activations = tokens_per_chip(config, mesh) * model.model_dim * _itemsize(model)
    muon = 0.0
    if config.optimizer.name == "muon" and mesh.fsdp > 1:
        layer = 4 * (model.attention_weights + model.mlp_weights)
        muon = layer * (math.ceil(model.num_layers / mesh.fsdp) + model.num_layers / mesh.fsdp)
    return {
        "fsdp": 3 * accumulation * weights * (1 - 1 / mesh.fsdp) + muon,
        "data": 2 * share * (1 - 1 / mesh.data),
        "tensor": 8 * accumulation * model.num_layers * activations * (1 - 1 / mesh.tensor),
    }


def analytic_bound(
    config: RunConfig, mesh: MeshConfig, chip: Chip, implementation: str = "pallas"
) -> Bound:
    """The bound before anything is compiled; several slices count as one.

    Args:
      config: of the run.
      mesh: resolved, without -1.
      chip: of `hardware.CHIPS`.
      implementation: of attention, chunked or pallas, which needs least.
    """
    devices = mesh.data * mesh.fsdp * mesh.tensor
    flops = model_flops(config) + recomputed_flops(config, implementation)
    links = 6 if chip.name in ("v4", "v5p") else 4  # of a chip: solid or flat torus
    received = sum(collective_bytes(config, mesh).values())
    return Bound(
        compute=(flops / devices + muon_flops(config, mesh)) / chip.flops,
        memory=_ratio(memory_bytes(config, mesh), chip.hbm_bandwidth),
        interconnect=_ratio(received, links * chip.link_bandwidth),
    )


def bound_seconds(config: RunConfig, devices: np.ndarray) -> float:
    """The least time of a step on these devices, of jax; 0 where their peaks are not known."""
    chip = CHIPS.get(devices.flat[0].device_kind)
    if chip is None:
        return 0.0
    return analytic_bound(config, check_devices(config, devices.size), chip).seconds


def torus_seconds(
    received: Mapping[frozenset[int], float], links: Mapping[int, int], bandwidth: float
) -> float:
    """Time that collectives need at least, each using all links of the torus' axes it goes along.

    Args:
      received: set of torus axes → bytes that a chip receives along those.
      links: torus axis → links of a chip along it, 2 in a ring.
      bandwidth: bytes/s of a link, one direction.
    """
    best = 0.0
    for mask in range(1, 2 ** len(links)):
        axes = {axis for i, axis in enumerate(links) if mask >> i & 1}
        confined = sum(size for along, size in received.items() if along <= axes)
        best = max(best, confined / (sum(links[axis] for axis in axes) * bandwidth))
    return best


def mfu(config: RunConfig, devices: int, chip: Chip, seconds: float) -> float:
    """Model FLOPs utilisation of a step that takes so long, between 0 and 1."""
    return model_flops(config) / (devices * chip.flops * seconds)


def _itemsize(model: AnyModelConfig) -> int:
    return 2 if model.dtype == "bfloat16" else 4


def _ratio(size: float, speed: float) -> float:
    return size / speed if speed else 0.0
