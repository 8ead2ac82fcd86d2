"""Vision transformers through the one trainer: loss, meshes, resuming, hosts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import vit as configs_vit
from laser.training import sharding
from laser.training.config import load_config
from laser.training.image_rows import ImageRows
from laser.training.program import Program
from laser.training.step import make_eval_step, make_gradient
from models import families
from tests.training import runs

SMALL = {
    "model.num_layers": 2,
    "model.model_dim": 16,
    "model.mlp_dim": 32,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "images.operations": 1,
    "training.batch_size": 8,
    "training.steps": 20,
    "training.eval_every": 20,
    "training.eval_batches": 2,
    "training.log_every": 1,
    "checkpoint.every": 13,
    "optimizer.warmup_steps": 2,
    "mesh.max_unsharded": 1.0,
}
ARGUMENTS = [
    "--config=configs/vit.py:size=digits",
    *[f"--config.{name}={value}" for name, value in SMALL.items()],
]


def make_config(mesh=(-1, 1, 1), arguments="size=digits", **overrides):
    config = configs_vit.get_config(arguments)
    config.update_from_flattened_dict(SMALL | overrides)
    config.mesh.update(data=mesh[0], fsdp=mesh[1], tensor=mesh[2])
    return load_config(config)


def run(config, devices, steps=4):
    """Losses, errors and gradient norms of each step, and the last state."""
    program = Program(config, sharding.make_mesh(config, devices))
    state, history = program.init_state(), []
    with ImageRows(config).train_batches(config, 0, program.batch_sharding) as batches:
        for step, batch in batches:
            assert shapes(batch) == shapes(program.abstract_batch())
            state, metrics = program.train_step(state, batch)
            history.append([float(metrics[k]) for k in ("loss", "error", "gradient_norm")])
            if step + 1 == steps:
                return np.array(history), state
    raise AssertionError


def shapes(batch):
    return {name: (x.shape, x.dtype) for name, x in batch.items()}


@functools.cache
def run_on_one_device(accumulation=1):
    return run(make_config(**{"training.accumulation": accumulation}), jax.devices()[:1])


def compare(history, expected):
    """Of eight images at the start, one may have two classes that are equal but for rounding."""
    np.testing.assert_allclose(history[:, [0, 2]], expected[:, [0, 2]], rtol=2e-4)
    np.testing.assert_allclose(history[:, 1], expected[:, 1], atol=1 / 8)


@pytest.mark.parametrize("mesh", [(1, 1, 2), (2, 2, 2)], ids=str)
@pytest.mark.slow
def test_meshes_equal_one_device(mesh):
    config = make_config(mesh)
    history, state = run(config, jax.devices()[: np.prod(mesh)])
    expected, one = run_on_one_device()
    compare(history, expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-3),
        jax.device_get(state.params),
        jax.device_get(one.params),
    )
    split = mesh[1] * mesh[2]
    for name in ("patches", "pre_logits"):
        kernel = state.params[name]["kernel"]
        assert kernel.addressable_shards[0].data.nbytes * split == kernel.nbytes


@pytest.mark.slow
def test_micro_batches_equal_one_batch():
    compare(run_on_one_device(4)[0], run_on_one_device()[0])


def make_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    size, count = config.model.image_size, config.training.batch_size

    def integers(high, shape, dtype):
        return rng.integers(0, high, shape).astype(dtype)

    return {
        "images": integers(256, (count, size, size, 3), np.uint8),
        "labels": integers(10, count, np.int32),
        "weights": np.float32([1, 1, 0, 1, 1, 1, 0, 1]),
        "noise": integers(2**32, count, np.uint32),
        "partners": integers(256, (count, size, size, 3), np.uint8),
        "partner_labels": integers(10, count, np.int32),
        "shares": np.float32([0.7, 0.7, 0.7, 1, 0.7, 0.2, 0.7, 0.7]),
    }


def parameters(config):
    """With a head that is not 0."""
    params = families.init_parameters(config.model, 0)
    shape = params["head"]["kernel"].shape
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), shape)
    return params


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_formula(training):
    config = make_config(**{"model.dropout": 0.0, "training.z_loss": 0.0})
    batch, params = make_batch(config), parameters(config)
    if not training:
        batch = {name: batch[name] for name in ("images", "labels", "weights")}
    sums = jax.jit(make_eval_step(config))(params, batch)

    mean = 255 * np.array([0.485, 0.456, 0.406])
    deviation = 255 * np.array([0.229, 0.224, 0.225])
    share = batch["shares"] if training else np.ones(8)
    images = batch["images"] * share[:, None, None, None]
    target = np.eye(10)[batch["labels"]] * share[:, None]
    if training:
        images = images + batch["partners"] * (1 - share[:, None, None, None])
        target = target + np.eye(10)[batch["partner_labels"]] * (1 - share[:, None])
    model = nnx.merge(families.structure(config.model), params)
    logits, _ = jax.jit(model)(jnp.float32((images - mean) / deviation))
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    weights = batch["weights"]
    smooth = 0.9 * target + 0.1 / 10 if training else target
    for found, labels in ((sums.nll, target), (sums.loss, smooth)):
        expected = -(weights[:, None] * labels * log_probs).sum()
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    wrong = logits.argmax(1) != target.argmax(1)
    assert float(sums.shares["error"]) == (weights * wrong).sum()
    assert float(sums.tokens) == 6


def test_padded_images_change_no_bit():
    config = make_config()
    batch, params = make_batch(config), parameters(config)
    batch = {name: batch[name] for name in ("images", "labels", "weights")}
    step = jax.jit(make_eval_step(config))
    expected = step(params, batch)
    padded = batch["weights"] == 0
    batch["images"][padded], batch["labels"][padded] = 255, 3
    assert jax.tree.map(float, step(params, batch))[:3] == jax.tree.map(float, expected)[:3]
    assert step(params, batch).shares == expected.shares


def test_images_without_weight_change_no_bit_of_a_gradient():
    config = make_config()
    batch, params = make_batch(config), parameters(config)
    gradient = jax.jit(make_gradient(config))
    expected, sums = jax.device_get(gradient(params, batch))
    padded = batch["weights"] == 0
    for name in ("images", "partners"):
        batch[name][padded] = 255
    batch["labels"][padded], batch["partner_labels"][padded] = 3, 4
    batch["noise"][padded] += 1
    found, others = jax.device_get(gradient(params, batch))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (others.loss, others.shares) == (sums.loss, sums.shares)
    batch["images"][0] = 255
    assert gradient(params, batch)[1].loss != sums.loss


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="source=digits has 10; set it to that"):
        ImageRows(make_config(**{"model.num_classes": 9}))
    with pytest.raises(ValueError, match="no such folder; give one, digits"):
        ImageRows(make_config(**{"images.source": "/nowhere"}))
    for name, value in {"magnitude": 11.0, "mixup": -0.1, "label_smoothing": 1.5}.items():
        with pytest.raises(ValueError, match=f"images.{name}={value}"):
            make_config(**{f"images.{name}": value})


def test_images_of_another_set_are_scored_apart(tmp_path):
    """ImageNet-v2 beside the validation images: named, without a share of the loss; and what of it
    is broken is counted and has no weight."""
    random = np.random.default_rng(0)
    for name in [f"{split}/n0{i}" for split in ("train", "val") for i in range(2)] + [
        "v2/0",
        "v2/1",
    ]:
        (tmp_path / name).mkdir(parents=True)
        for i in range(6):
            picture = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    (tmp_path / "v2/0/0.png").write_bytes(b"")
    config = make_config(
        **{
            "images.source": str(tmp_path), "images.test": str(tmp_path / "v2"),
            "images.max_broken": 1, "training.eval_batches": 0,
        }
    )  # fmt: skip
    rows = ImageRows(config)
    parts = rows.validation_parts(config, None)
    assert [(part.name, part.share, part.at_end) for part in parts] == [
        ("", 1.0, False), ("test", 0.0, False), ("train", 0.0, True),
    ]  # fmt: skip
    weights = [sum(batch["weights"].sum() for batch in part.batches) for part in parts]
    assert weights == [12, 11, 12]
    assert rows.metrics(config, 1) == {"broken_images": 1}


def test_the_training_error_is_of_a_fixed_sample_without_augmentation():
    """About as many images as of the validation set, or training.eval_batches batches."""
    for limit, count in ((1, 1), (0, None)):
        config = make_config(**{"training.eval_batches": limit})
        rows, size = ImageRows(config), config.training.batch_size
        held_out, sample = (
            list(part.batches)
            for part in rows.validation_parts(config, None)
            if part.name in ("", "train")
        )
        assert len(sample) == len(held_out) == (count or len(held_out))
        (again,) = [p.batches for p in rows.validation_parts(config, None) if p.name == "train"]
        plain = ImageRows(make_config(**{"images.mixup": 0.0, "images.operations": 0}))
        (bare,) = [p.batches for p in plain.validation_parts(config, None) if p.name == "train"]
        for one, two, three in zip(sample, again, bare, strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], two[name])
                np.testing.assert_array_equal(one[name], three[name])
            assert one["weights"].sum() == size


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("vit") / "whole"
    finished = runs.train(ARGUMENTS, workdir)
    assert finished.returncode == 0, finished.stderr
    assert "eval loss" in finished.stdout
    assert "error" in finished.stdout
    return workdir


@pytest.mark.slow
def test_an_interrupted_run_is_bit_equal(whole, tmp_path):
    parts = tmp_path / "parts"
    terminated = runs.train(ARGUMENTS, parts, event=runs.SIGTERM_AFTER_7)
    assert terminated.returncode == 75, terminated.stderr
    how = ["--config.images.workers=1", "--config.images.max_broken=3"]  # not what is trained on
    resumed = runs.train([*ARGUMENTS, *how], parts)
    assert resumed.returncode == 0, resumed.stderr
    assert runs.losses(parts) == runs.losses(whole)
    runs.assert_same_parameters(parts, whole)


@pytest.mark.slow
def test_two_hosts_train_as_one(whole, tmp_path):
    arguments = [*ARGUMENTS, "--config.mesh.fsdp=4"]
    finished = runs.train_on_hosts(arguments, tmp_path / "run", hosts=2, devices=2)
    assert [process.returncode for process in finished] == [0, 0], finished[0].stderr
    found, expected = runs.losses(tmp_path / "run"), runs.losses(whole)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-3)
