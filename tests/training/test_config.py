"""The config boundary: what is wrong is refused, with a message that names it and the way out."""

import copy
import dataclasses

import pytest

from configs import base, bert, c4, conformer, vit
from laser.training.config import (
    diff_configs,
    load_config,
    to_dict,
)
from laser.training.devices import check_devices, resolve_mesh
from laser.training.fields import nearest


@pytest.fixture
def tree():
    return base.get_config().to_dict()


def _set(tree, **values):
    """A copy with `section__key=value` set."""
    changed = copy.deepcopy(tree)
    for path, value in values.items():
        section, _, key = path.partition("__")
        if key:
            changed[section][key] = value
        else:
            changed[section] = value
    return changed


def test_there_and_back(tree):
    run = load_config(tree)
    assert to_dict(run) == tree
    assert load_config(to_dict(run)) == run
    assert load_config(base.get_config()) == run
    assert run.model.attention.kind == "laser"


def test_it_is_frozen(tree):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(tree).training.steps = 3  # type: ignore[misc]


def test_an_int_is_taken_for_a_float(tree):
    rate = load_config(_set(tree, optimizer__learning_rate=1)).optimizer.learning_rate
    assert rate == 1.0
    assert type(rate) is float


@pytest.mark.parametrize(
    ("values", "words"),
    [
        # Names
        ({"model__num_layer": 3}, ["unknown key model.num_layer=3", "did you mean 'num_layers'"]),
        ({"data__zzz": 3}, ["unknown key data.zzz=3", "known: store"]),
        # Types
        ({"model__num_layers": True}, ["model.num_layers=True", "expected int, got bool"]),
        ({"model__num_layers": 2.0}, ["model.num_layers=2.0", "expected int, got float"]),
        ({"model__unroll": 1}, ["model.unroll=1", "expected bool, got int"]),
        ({"optimizer__b1": "0.9"}, ["optimizer.b1='0.9'", "expected float, got str"]),
        ({"optimizer__b1": True}, ["optimizer.b1=True", "expected float, got bool"]),
        ({"data__store": None}, ["data.store=None", "expected str"]),
        ({"optimizer__learning_rate": float("nan")}, ["learning_rate=nan", "finite"]),
        # Choices
        (
            {"attention__kind": "lasr"},
            ["attention.kind='lasr'", "standard, laser", "did you mean 'laser'"],
        ),
        ({"model__remat": 3}, ["model.remat=3", "none, dots, full"]),
        # Ranges
        ({"data__seq_len": 0}, ["data.seq_len=0", "at least 1"]),
        ({"data__prefetch": 0}, ["data.prefetch=0", "at least 1"]),
        ({"data__shuffle_seed": -1}, ["data.shuffle_seed=-1", "at least 0"]),
        ({"optimizer__learning_rate": 0.0}, ["optimizer.learning_rate=0.0", "above 0"]),
        ({"optimizer__eps": 0.0}, ["optimizer.eps=0.0", "above 0"]),
        ({"optimizer__b1": 1.0}, ["optimizer.b1=1.0", "below 1"]),
        ({"optimizer__b2": -0.1}, ["optimizer.b2=-0.1", "at least 0"]),
        ({"optimizer__weight_decay": -0.1}, ["optimizer.weight_decay=-0.1", "at least 0"]),
        ({"optimizer__clip_grad_norm": -1.0}, ["optimizer.clip_grad_norm=-1.0"]),
        ({"optimizer__clip_update_rms": 0.0}, ["optimizer.eps=1e-24", "clip_update_rms=1.0"]),
        ({"training__steps": 0}, ["training.steps=0", "training.epochs=0", "at least 1"]),
        ({"training__epochs": 2}, ["training.steps=160000", "training.epochs=2", "the other 0"]),
        ({"training__eval_every": -1}, ["training.eval_every=-1", "at least 0"]),
        ({"evaluation__every": -1}, ["evaluation.every=-1", "at least 0"]),
        ({"evaluation__protocol": "gpt"}, ["evaluation.protocol='gpt'", "did you mean 'gpt3'"]),
        # Fine-tuning
        ({"init_from": 3}, ["init_from=3", "expected str"]),
        ({"data__tasks": "rte"}, ["data.tasks=rte", "init_from is missing"]),
        ({"data__tasks": "rte", "data__store": "s"}, ["data.store=s and data.tasks=rte"]),
        ({"data__tasks": "rte", "data__segment_ids": True}, ["data.segment_ids=True", "use False"]),
        ({"checkpoint__best": "decoding_accuracy"}, ["checkpoint.best", "data.tasks", "use loss"]),
        ({"checkpoint__best": "lost"}, ["checkpoint.best='lost'", "did you mean 'loss'"]),
        ({"training__log_every": 0}, ["training.log_every=0", "at least 1"]),
        ({"training__max_skipped_steps": 0}, ["training.max_skipped_steps=0", "at least 1"]),
        ({"training__eval_batches": -1}, ["training.eval_batches=-1", "at least 0"]),
        ({"checkpoint__every": -1}, ["checkpoint.every=-1", "at least 0"]),
        ({"checkpoint__keep": 0}, ["checkpoint.keep=0", "at least 1"]),
        ({"checkpoint__keep_period": -1}, ["checkpoint.keep_period=-1", "at least 0"]),
        ({"mesh__data": 0}, ["mesh.data=0", "at least 1, or -1"]),
        # Fields that do not fit together
        (
            {"training__batch_size": 30, "training__accumulation": 4},
            ["training.batch_size=30", "training.accumulation=4", "use 28 or 32"],
        ),
        (
            {"training__batch_size": 2, "training__accumulation": 4},
            ["training.batch_size=2", "use 4"],
        ),
        (
            {"training__steps": 500},
            [
                "optimizer.warmup_steps=1000",
                "training.steps=500",
                "--config.optimizer.warmup_steps=N",
            ],
        ),
        ({"mesh__fsdp": -1}, ["mesh.data=-1 and mesh.fsdp=-1", "only one"]),
        ({"mesh__tensor": 3}, ["mesh.tensor=3", "model.num_heads=8"]),
        ({"mesh__tensor": 8, "model__mlp_dim": 100}, ["mesh.tensor=8", "model.mlp_dim=100"]),
    ],
)
def test_mistakes(tree, values, words):
    with pytest.raises(ValueError) as error:
        load_config(_set(tree, **values))
    for word in words:
        assert word in str(error.value)


def test_sections_are_checked(tree):
    with pytest.raises(ValueError, match="unknown section modl; did you mean 'model'"):
        load_config({**tree, "modl": {}})
    with pytest.raises(ValueError, match="missing section mesh"):
        load_config({key: value for key, value in tree.items() if key != "mesh"})
    with pytest.raises(ValueError, match="mesh=3: expected a section"):
        load_config({**tree, "mesh": 3})


def test_a_missing_key_is_named(tree):
    del tree["training"]["steps"]
    with pytest.raises(ValueError, match=r"missing key training\.steps"):
        load_config(tree)


def test_a_small_eps_is_fine_with_the_clip_and_a_large_one_without(tree):
    load_config(_set(tree, optimizer__eps=1e-24, optimizer__clip_update_rms=1.0))
    load_config(_set(tree, optimizer__eps=1e-8, optimizer__clip_update_rms=0.0))


def test_differences_are_listed(tree):
    assert diff_configs(tree, tree) == []
    changed = _set(tree, optimizer__learning_rate=0.01, attention__kind="standard")
    assert diff_configs(tree, changed) == [
        "attention.kind: laser -> standard",
        "optimizer.learning_rate: 0.001 -> 0.01",
    ]
    assert diff_configs({"a": {}}, {"a": {"b": 1}}) == ["a.b: (absent) -> 1"]
    assert diff_configs({"a": {"b": 1}}, {}) == ["a.b: 1 -> (absent)"]


def _mesh(tree, **axes):
    return load_config(_set(tree, **{f"mesh__{axis}": size for axis, size in axes.items()})).mesh


def test_the_mesh_takes_what_is_left(tree):
    mesh = resolve_mesh(_mesh(tree, data=-1, fsdp=4, tensor=2), 32)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (4, 4, 2)
    mesh = resolve_mesh(_mesh(tree, data=2, fsdp=4, tensor=1), 8)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (2, 4, 1)


def test_a_mesh_that_does_not_fit_the_devices(tree):
    with pytest.raises(ValueError, match="8 devices do not divide by 3"):
        resolve_mesh(_mesh(tree, data=-1, fsdp=3), 8)
    with pytest.raises(ValueError, match="a mesh of 4 devices, but there are 8"):
        resolve_mesh(_mesh(tree, data=4), 8)


def test_the_batch_must_divide_over_the_mesh(tree):
    config = load_config(_set(tree, training__batch_size=48, training__accumulation=2))
    with pytest.raises(ValueError, match=r"= 24 rows: .* = 16; use a batch_size of 32 or 64"):
        check_devices(config, 16)
    assert check_devices(config, 8).data == 8


def test_a_tensor_axis_that_takes_the_rest_must_divide_the_heads(tree):
    config = load_config(_set(tree, mesh__data=1, mesh__tensor=-1))
    assert check_devices(config, 8).tensor == 8
    with pytest.raises(ValueError, match=r"mesh\.tensor=16: must divide model\.num_heads=8"):
        check_devices(config, 16)


def test_nearest():
    assert nearest("lern_rate", ["learning_rate", "b1"]) == "; did you mean 'learning_rate'?"
    assert nearest("zzz", ["learning_rate", "b1"]) == ""
    assert nearest("flash", ["standard", "laser"]) == ""  # a letter more in common: no help


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("vit", "segment_ids", True),
        ("vit", "store", "stores/c4"),
        ("vit", "read_ahead", 32),
        ("conformer", "segment_ids", True),
        ("conformer", "block_rows", 16),
        ("conformer", "read_ahead", 32),
        ("conformer", "cache_dir", "/tmp/cache"),
    ],
)
def test_a_field_without_a_use_is_named(kind, field, value):
    config = {"vit": vit, "conformer": conformer}[kind].get_config()
    unused = config.data[field]
    config.data[field] = value
    with pytest.raises(ValueError) as error:
        load_config(config)
    message = (
        f"data.{field}={value}: a model of model.kind={kind} has no use for it; use {unused!r}"
    )
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("best", "kinds"),
    [("loss", {bert, vit, conformer, c4}), ("error", {bert, vit}), ("wer", {conformer})],
)
def test_the_best_is_by_a_score_that_the_model_has(best, kinds):
    for module in (bert, vit, conformer, c4):
        config = module.get_config()
        config.checkpoint.best = best
        if module in kinds:
            assert load_config(config).checkpoint.best == best
            continue
        with pytest.raises(ValueError, match=f"checkpoint.best={best}: .* has no eval/{best}"):
            load_config(config)
