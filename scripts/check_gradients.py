"""Shows how far the gradients of a bfloat16 run are from those in float32, tensor by tensor.

    python scripts/check_gradients.py --config=configs/c4.py:size=2p2b,attention=laser
    python scripts/check_gradients.py --config=... --layers=4 --tokens=65536

The model is cut to --layers and has its initial parameters, but for a vision transformer's head,
which starts at 0 and would leave nothing to compare. The batch is made up, its tokens as frequent
as the words of a language (Zipf's law), since sums over many tokens are what bfloat16 loses; pixels
and features are noise. Both gradients are made by the code that train.py runs, on this machine's
devices and the config's mesh; the float32 one with products of the highest precision. An error is
the norm of the difference over the norm of the float32 gradient. Rows of the embedding are listed
by frequency; what no gradient reaches, as batch norm's moments, is left out.
Some gradients nearly cancel, and what is left is measured by another one. An offset that all keys
share changes nothing: key_bias and key_norm.bias, by those of queries. Before training a wide model
predicts the token that it reads, and so a token is added once as a target and taken away once as an
input: final_norm.bias, by final_norm.scale.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from absl import flags

from laser.training.config import RunConfig
from laser.training.console import end_on_ctrl_c, exit_with
from laser.training.devices import check_devices
from laser.training.flags import parse_or_exit
from laser.training.hardware import tune_cpu

RANKS = (0, 1, 3, 10, 30, 100, 300, 1000)  # of the rows that are listed, the most frequent first


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("layers", 1, "layers of the model", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("tokens", 16384, "of the batch, at least", flag_values=values)


def main(argv: list[str]) -> int:
    config, values = parse_or_exit(argv, define_flags, __doc__)
    tune_cpu("bfloat16")
    import jax

    try:
        config = cut(config, values.layers, values.tokens, jax.device_count())
        check_devices(config, jax.device_count())
    except ValueError as error:
        exit_with(argv[0], str(error))
    for name, distance in errors(config, batch(config)).items():
        print(f"{distance:9.3%}  {name}")
    return 0


def cut(config: RunConfig, layers: int, tokens: int, devices: int) -> RunConfig:
    """The config with that many layers and rows for that many tokens, in one micro-batch."""
    rows = -(-tokens // config.data.seq_len)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=layers),
        training=dataclasses.replace(
            config.training, batch_size=-(-rows // devices) * devices, accumulation=1
        ),
    )


Rows = dict[str, np.ndarray]


def batch(config: RunConfig) -> Rows:
    """Made-up rows to train on, as the model's objective reads them."""
    return BATCHES[config.model.kind](config, np.random.default_rng(0))


def _tokens(config: RunConfig, draws: np.random.Generator) -> Rows:
    """Tokens whose frequency is 1 / (rank + 1); a token is its rank."""
    frequency = 1 / np.arange(1, config.model.vocab_size + 1)
    shape = (config.training.batch_size, config.data.seq_len + 1)
    tokens = draws.choice(config.model.vocab_size, shape, p=frequency / frequency.sum())
    tokens = tokens.astype(np.int32)
    weights = np.ones((shape[0], shape[1] - 1), np.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def _masked_tokens(config: RunConfig, draws: np.random.Generator) -> Rows:
    """The same with 15 % of them masked, by the last token, and each row one document."""
    tokens = _tokens(config, draws)["inputs"]
    chosen = draws.random(tokens.shape) < 0.15
    mask = np.int32(config.model.vocab_size - 1)
    return {
        "inputs": np.where(chosen, mask, tokens), "targets": tokens,
        "weights": chosen.astype(np.float32), "segment_ids": np.ones_like(tokens),
    }  # fmt: skip


def _images(config: RunConfig, draws: np.random.Generator) -> Rows:
    assert config.images is not None
    count, side = config.training.batch_size, config.model.image_size
    images = draws.integers(0, 256, (count, side, side, 3), np.uint8)
    labels = draws.integers(0, config.model.num_classes, count, np.int32)
    rows = {"images": images, "labels": labels, "weights": np.ones(count, np.float32)}
    rows["noise"] = draws.integers(0, 2**32, count, np.uint32)
    if config.images.mixup:
        rows |= {"partners": np.roll(images, 1, axis=0), "partner_labels": np.roll(labels, 1)}
        rows["shares"] = np.full(count, 0.9, np.float32)
    return rows


def _recordings(config: RunConfig, draws: np.random.Generator) -> Rows:
    """Without padding, and with a label for every fourth position."""
    count, frames = config.training.batch_size, config.data.seq_len
    positions = -(-frames // config.model.subsampling)
    targets = draws.integers(1, config.model.vocab_size, (count, positions), np.int32)
    return {
        "inputs": draws.standard_normal((count, frames, config.model.mel_bins), np.float32),
        "frames": np.full(count, frames, np.int32), "targets": targets,
        "labels": np.full(count, positions // 4, np.int32),
        "noise": draws.integers(0, 2**32, count, np.uint32),
    }  # fmt: skip


BATCHES: dict[str, Callable[[RunConfig, np.random.Generator], Rows]] = {
    "decoder": _tokens, "bert": _masked_tokens, "vit": _images, "conformer": _recordings,
}  # fmt: skip


def errors(config: RunConfig, rows, devices=None) -> dict[str, float]:
    """Relative errors of the bfloat16 gradients, by tensor and by row of the embedding.

    Args:
      config: of the run.
      rows: a batch, of `batch`.
      devices: of the mesh; all if None.
    """
    exact, rounded = gradients(config, rows, ("float32", "bfloat16"), devices)

    def error(name, row=...):
        measure = name.replace("key_norm.bias", "query_norm.bias")
        measure = measure.replace("key_bias", "query_bias")
        if "embedding" in exact:
            measure = measure.replace("final_norm.bias", "final_norm.scale")
        difference = np.float64(rounded[name][row]) - exact[name][row]
        return float(np.linalg.norm(difference) / np.linalg.norm(exact[measure][row]))

    result = {name: error(name) for name in exact if exact[name].any()}
    if "embedding" not in exact:
        return result
    counts = np.bincount(rows["inputs"].ravel(), minlength=config.model.vocab_size)
    for rank in (rank for rank in RANKS if rank < len(counts) and counts[rank]):
        result[f"embedding[{rank}], {counts[rank]} times"] = error("embedding", rank)
    return result


def gradients(config: RunConfig, rows, dtypes, devices=None) -> list[dict]:
    """For each dtype of the activations, gradients in host memory by the parameters' names."""
    import jax

    from laser.training import sharding
    from laser.training.step import make_gradient
    from models.families import init_parameters

    def make():
        params = init_parameters(config.model, config.training.seed)
        if config.model.kind == "vit":
            shape = params["head"]["kernel"].shape
            params["head"]["kernel"] = jax.random.normal(jax.random.key(0), shape) / shape[0] ** 0.5
        return params

    mesh = sharding.make_mesh(config, devices)
    shardings = sharding.state_shardings(mesh, jax.eval_shape(make))
    params = jax.jit(make, out_shardings=shardings)()
    results = []
    for dtype in dtypes:
        model = dataclasses.replace(config.model, dtype=dtype)
        function = jax.jit(
            sharding.on_mesh(mesh, make_gradient(dataclasses.replace(config, model=model))),
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
        )
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            tree = jax.device_get(function(params, rows)[0])
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        results.append({jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves})
    return results


if __name__ == "__main__":
    end_on_ctrl_c("stopped")
    sys.exit(main(sys.argv))
