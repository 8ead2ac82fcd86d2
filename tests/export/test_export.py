"""Exported parameters come back bit for bit, and what is damaged is refused with its reason.

tests/export/test_transformers.py compares the models in PyTorch.
"""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from eval.run import open_model
from export.folder import Origin, load_exported, write_export
from export.layouts import choose_layout
from laser.training.config import load_config
from models.config import AttentionConfig, ModelConfig
from models.decoder import init_parameters
from scripts import export
from tests.training import runs

SMALL = ModelConfig(
    vocab_size=400, num_layers=2, model_dim=32, mlp_dim=64, num_heads=2, head_dim=16
)
EVERYTHING = AttentionConfig(
    kind="laser", temperature=0.5, per_dim_temp=True, qk_norm=True, diff="official", soft_cap=5.0
)
MODELS = {
    "gpt2": dataclasses.replace(SMALL, attention=AttentionConfig(kind="standard")),
    "starcoder2": dataclasses.replace(
        SMALL, head_dim=8, positions="rotary", attention=AttentionConfig(kind="standard")
    ),
    "starcoder2_grouped": dataclasses.replace(
        SMALL, num_heads=4, num_kv_heads=1, positions="rotary",
        attention=AttentionConfig(kind="standard"),
    ),
    "llama": dataclasses.replace(
        SMALL, num_heads=4, num_kv_heads=2, mlp="swiglu", norm="rmsnorm", positions="rotary",
        attention=AttentionConfig(kind="standard"),
    ),
    "laser": dataclasses.replace(SMALL, norm="rmsnorm", attention=EVERYTHING),
    "laser_grouped": dataclasses.replace(
        SMALL, num_heads=4, num_kv_heads=2, mlp="geglu", norm="rmsnorm", positions="rotary",
        attention=dataclasses.replace(EVERYTHING, qk_norm=False),
    ),
    "laser_scalar": dataclasses.replace(SMALL, attention=AttentionConfig(diff="scalar")),
}  # fmt: skip


def origin_of(model):
    return Origin(dataclasses.replace(load_config(base.get_config()), model=model), 7, "abc")


def random_parameters(model, seed=0):
    """Away from the initial values, norms and temperatures too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.asarray(x + np.float32(0.2) * rng.normal(size=x.shape), np.float32),
        init_parameters(model, 0),
    )


def exported(folder, store, model, seed=0, **options):
    params = random_parameters(model, seed)
    write_export(
        folder, origin_of(model), params, store / "tokenizer.model", card="# A model", **options
    )
    return params


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert {x.dtype for x in jax.tree.leaves(actual)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_bit_equal(name, store, tmp_path):
    model = MODELS[name]
    assert choose_layout(model) == name.partition("_")[0]
    params = exported(tmp_path / "out", store, model)
    config, back = load_exported(tmp_path / "out")
    assert config == model
    assert_same(back, params)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "changes, layout",
    [
        ({"head_dim": 8}, "laser"),
        ({"logits_soft_cap": 30.0}, "laser"),
        ({"norm": "rmsnorm"}, "laser"),
        ({"num_kv_heads": 1}, "laser"),
        ({"positions": "rotary", "norm": "rmsnorm", "mlp": "geglu"}, "laser"),
        ({"attention": AttentionConfig(kind="standard", per_dim_temp=True)}, "laser"),
        ({"attention": AttentionConfig(kind="standard", implementation="reference")}, "gpt2"),
    ],
)
def test_only_what_computes_the_same_is_chosen(changes, layout):
    assert choose_layout(dataclasses.replace(MODELS["gpt2"], **changes)) == layout


def rewritten(folder, change):
    """The weights' file written anew after `change`, as another program would."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "SHA256SUMS").unlink()


def set_to(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    "layout, change, message",
    [
        ("laser", lambda t: t.pop("blocks.1.mlp.up"), r"tensor blocks.1.mlp.up \(32, 64\) is miss"),
        ("laser", set_to("extra", np.ones(3, np.float32)), "knows nothing of: extra"),
        (
            "laser",
            set_to("final_norm.scale", np.ones(31, np.float32)),
            r"final_norm.scale has shape \(31,\), the config says \(32,\)",
        ),
        ("laser", set_to("final_norm.scale", np.ones(32, np.float16)), "has dtype float16"),
        (
            "gpt2",
            set_to("transformer.h.1.mlp.c_fc.bias", np.ones(64, np.float32)),
            "transformer.h.1.mlp.c_fc.bias has other values",
        ),
        (
            "gpt2",
            set_to("lm_head.weight", np.ones((400, 32), np.float32)),
            "transformer.wte.weight has other values",
        ),
        ("starcoder2", lambda t: t.pop("model.norm.bias"), "model.norm.bias .* is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(layout, change, message, store, tmp_path):
    exported(tmp_path / "out", store, MODELS[layout])
    rewritten(tmp_path / "out", change)
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"):
        load_exported(tmp_path / "out")


def test_weights_that_were_trained_on_elsewhere_come_back(store, tmp_path):
    params = exported(tmp_path / "out", store, MODELS["laser"])
    new = np.full(32, 0.5, np.float32)
    rewritten(tmp_path / "out", set_to("final_norm.scale", new))
    _, back = load_exported(tmp_path / "out")
    params["final_norm"]["scale"] = new
    assert_same(back, params)


def test_damaged_files_are_refused_whatever_the_damage(store, tmp_path):
    folder = tmp_path / "out"
    params = exported(folder, store, MODELS["gpt2"])
    exported(tmp_path / "other", store, MODELS["gpt2"], seed=1)
    rng = random.Random(0)
    for path in sorted(folder.iterdir()):
        whole, others = path.read_bytes(), (tmp_path / "other" / path.name).read_bytes()
        places = sorted({rng.randrange(len(whole)) for _ in range(40)})
        flips = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in places]
        zeroed = whole[: len(whole) // 2] + bytes(60) + whole[len(whole) // 2 + 60 :]
        for damaged in [*flips, zeroed, b"", whole[: len(whole) // 3], others, None]:
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            harmless = path.name == "README.md" or damaged == whole
            if harmless or (path.name == "SHA256SUMS" and damaged is None):
                assert_same(load_exported(folder)[1], params)
            else:
                with pytest.raises(ValueError, match=f"^{tmp_path}"):
                    load_exported(folder)
            path.write_bytes(whole)
    assert_same(load_exported(folder)[1], params)


def test_damage_is_found_without_the_list_of_checksums_too(store, tmp_path):
    folder = tmp_path / "out"
    exported(folder, store, MODELS["laser"])
    (folder / "SHA256SUMS").unlink()
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    for damaged, message in [
        (whole[: len(whole) // 2], "cannot be read"),
        (whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], "damaged: the tensors' SHA-256"),
        (b"", "cannot be read"),
    ]:
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"model.safetensors: {message}"):
            load_exported(folder)
    weights.write_bytes(whole)
    text = config.read_text()
    config.write_text(text.replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(ValueError, match=r"tensor blocks\.2\..* is missing"):
        load_exported(folder)
    for damaged in (text[:-100], "\0" * 99, "[]", '{"laser": []}'):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=r"config.json: not written by scripts/export.py"):
            load_exported(folder)
    config.write_bytes(b"\xff" + text.encode())
    with pytest.raises(ValueError, match=r"config.json: "):
        load_exported(folder)
    config.unlink()
    with pytest.raises(ValueError, match="no exported model here"):
        load_exported(folder)


def test_nothing_is_overwritten_or_left_half_written(store, tmp_path, monkeypatch):
    exported(tmp_path / "out", store, SMALL)
    with pytest.raises(ValueError, match="exists"):
        exported(tmp_path / "out", store, SMALL)
    with pytest.raises(ValueError, match="no folder"):
        exported(tmp_path / "nowhere" / "out", store, SMALL)
    monkeypatch.setattr("export.folder.shutil.copyfile", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exported(tmp_path / "other", store, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_goes_out_and_comes_back(trained_run, arguments, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    results = trained_run / "eval" / "4" / "gpt3-1shot-5seeds"
    glance = results.with_name("gpt3-1shot-1seed-limit5")
    task = {
        "task": "copa", "split": "validation", "n": 100, "limit": None, "metric": "accuracy",
        "metrics": {"accuracy": {"mean": 0.625}},
    }  # fmt: skip
    for folder, less in ((results, {}), (glance, {"n": 5, "limit": 5})):
        folder.mkdir(parents=True)
        tasks = {"copa": {**task, **less}}
        (folder / "results.json").write_text(json.dumps({"tasks": tasks, "missing": {}}))
    assert export.main([f"--workdir={trained_run}", f"--output={out}"]) == 0
    card = (out / "README.md").read_text()
    run = json.loads((trained_run / "config.json").read_text())
    loss = [json.loads(line) for line in (trained_run / "metrics.jsonl").open()][-1]["eval/loss"]
    for expected in (
        "LASER attention", "| tokens seen | 4,096 |", "| num_layers | 2 |", "62.50 % accuracy",
        run["data"]["fingerprint"], f"{loss:.4f} nats per token", "| attention.kind | laser |",
    ):  # fmt: skip
        assert expected in card
    assert "limit5" not in card

    assert export.main([f"--from_export={out}", f"--workdir={again}"]) == 0
    first, second = open_model(trained_run), open_model(again)
    assert second.step == 4
    assert second.config == first.config
    assert_same(second.params, jax.tree.map(np.asarray, first.params))
    text = {"max_new_tokens": 9, "temperature": 0.0}
    assert first.generator.generate(first.params, ["And"], **text) == second.generator.generate(
        second.params, ["And"], **text
    )
    # Training does not go on from parameters alone.
    refused = runs.train(["--config=configs/quickstart.py", *arguments[1:]], again)
    assert refused.returncode == 2
    assert "imported without optimizer state" in refused.stderr + refused.stdout

    capsys.readouterr()
    for wrong in (
        [f"--workdir={trained_run}", f"--output={out}"],
        [f"--workdir={trained_run}", f"--output={tmp_path / 'x'}", "--step=3"],
        [f"--workdir={tmp_path / 'none'}", f"--output={tmp_path / 'x'}"],
        [f"--workdir={again}", f"--from_export={out}"],
        [f"--workdir={tmp_path / 'y'}", f"--from_export={out}", "--step=4"],
        [f"--workdir={tmp_path / 'y'}", f"--from_export={again}"],
    ):
        assert export.main(wrong) == 2
        assert capsys.readouterr().err.startswith("export.py: error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]
