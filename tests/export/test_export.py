"""Exported parameters come back bit for bit, and what is damaged is refused with its reason.

tests/export/test_transformers.py compares the models in PyTorch.
"""

import dataclasses
import json
import random
import resource
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base, bert, vit
from eval.run import chosen_step, fingerprint, open_model, open_parameters
from export.card import model_card
from export.folder import Origin, import_run, load_exported, write_export
from export.layouts import choose_layout
from laser.training.checkpoint import Checkpoints
from laser.training.config import load_config
from laser.training.run_folder import load_run_config
from models.config import AttentionConfig, BertConfig, ConformerConfig, ModelConfig, VitConfig
from models.families import init_parameters
from scripts import export
from tests.training import runs

SMALL = ModelConfig(
    vocab_size=400, num_layers=2, model_dim=32, mlp_dim=64, num_heads=2, head_dim=16
)
LAYOUTS = ("gpt2", "starcoder2", "llama", "megatron_bert", "timm", "laser")
EVERYTHING = AttentionConfig(
    kind="laser", temperature=0.5, per_dim_temp=True, qk_norm=True, diff="official", soft_cap=5.0
)
STANDARD = AttentionConfig(kind="standard")
BERT = BertConfig(
    vocab_size=400, num_layers=2, model_dim=32, mlp_dim=64, num_heads=2, head_dim=16, mlp="relu"
)
VIT = VitConfig(
    image_size=24, patch_size=4, num_classes=7, num_layers=2, model_dim=32, mlp_dim=48, num_heads=2,
    attention=STANDARD,
)  # fmt: skip
MODELS: dict[str, Any] = {
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
    "megatron_bert": dataclasses.replace(BERT, attention=STANDARD),
    "megatron_bert_gelu": dataclasses.replace(BERT, mlp="gelu", attention=STANDARD),
    "laser_bert": dataclasses.replace(
        BERT, logits_soft_cap=30.0, attention=AttentionConfig(soft_cap=50.0)
    ),
    "timm": VIT,
    "timm_qk_norm": dataclasses.replace(
        VIT, attention=dataclasses.replace(STANDARD, qk_norm=True)
    ),
}  # fmt: skip


def layout_of(name):
    """The layout that a model of MODELS gets."""
    return next(x for x in LAYOUTS if name.startswith(x))


def origin_of(model):
    config = load_config({"decoder": base, "bert": bert, "vit": vit}[model.kind].get_config())
    return Origin(dataclasses.replace(config, model=model), 7, "abc")


def random_parameters(model, seed=0):
    """Away from the initial values, norms and temperatures too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.asarray(x + np.float32(0.2) * rng.normal(size=x.shape), np.float32),
        init_parameters(model, 0),
    )


def exported(folder, store, model, seed=0, **options):
    params = random_parameters(model, seed)
    tokenizer = None if model.kind == "vit" else store / "tokenizer.model"
    write_export(folder, origin_of(model), params, tokenizer, card="# A model", **options)
    return params


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert {x.dtype for x in jax.tree.leaves(actual)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_has_a_card(name, tmp_path):
    losses = [{"step": 7, "eval/loss": 2.5}, {"step": 9, "eval/loss": 2.0}]
    lines = "".join(f"{json.dumps(line)}\n" for line in losses)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 10, "ev')  # torn by a kill
    text = model_card(tmp_path, origin_of(MODELS[name]), layout_of(name), 1234, {})
    assert "1,234 parameters in float32. t" in text
    assert "2.5000 nats per" in text
    assert ("Run it in float32" in text) == (layout_of(name) == "megatron_bert")


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_bit_equal(name, store, tmp_path):
    model = MODELS[name]
    assert choose_layout(model) == layout_of(name)
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


@pytest.mark.parametrize(
    "changes, layout",
    [
        ({}, "megatron_bert"),
        ({"head_dim": 8}, "laser"),
        ({"mlp": "geglu"}, "laser"),
        ({"norm": "rmsnorm"}, "laser"),
        ({"positions": "rotary"}, "laser"),
        ({"logits_soft_cap": 30.0}, "laser"),
        ({"attention": AttentionConfig(kind="standard", soft_cap=50.0)}, "laser"),
        ({"attention": AttentionConfig(kind="laser")}, "laser"),
    ],
)
def test_a_bert_that_megatron_computes_is_megatrons(changes, layout):
    assert choose_layout(dataclasses.replace(MODELS["megatron_bert"], **changes)) == layout


def test_a_bert_is_what_transformers_makes_of_its_config(store, tmp_path):
    """Names and shapes of MegatronBertForMaskedLM, and the fields that give the function."""
    model = MODELS["megatron_bert"]
    params = exported(tmp_path / "out", store, model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    expected = {
        "architectures": ["MegatronBertForMaskedLM"], "model_type": "megatron-bert",
        "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "hidden_act": "relu", "layer_norm_eps": 1e-6,
        "max_position_embeddings": origin_of(model).config.data.seq_len, "type_vocab_size": 1,
        "tie_word_embeddings": False, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    assert expected.items() <= config.items()
    assert (tokenizer["padding_side"], tokenizer["mask_token"]) == ("right", "<unk>")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layer = "bert.encoder.layer.1."
    shapes = {
        "bert.embeddings.word_embeddings.weight": (400, 32),
        "bert.embeddings.token_type_embeddings.weight": (1, 32),
        "bert.encoder.ln.weight": (32,),
        f"{layer}attention.self.query.weight": (32, 32),
        f"{layer}attention.output.dense.bias": (32,),
        f"{layer}intermediate.dense.weight": (64, 32),
        f"{layer}output.dense.weight": (32, 64),
        f"{layer}attention.ln.weight": (32,),
        f"{layer}ln.bias": (32,),
        "cls.predictions.transform.dense.weight": (32, 32),
        "cls.predictions.decoder.weight": (400, 32),
        "cls.predictions.bias": (400,),
    }
    assert shapes.items() <= {name: x.shape for name, x in tensors.items()}.items()
    assert len(tensors) == 3 + 2 + 2 * 16 + 4 + 3
    query = params["blocks"]["attention"]["query"][1]
    np.testing.assert_array_equal(
        tensors[f"{layer}attention.self.query.weight"], query.reshape(32, 32).T
    )


def test_the_head_of_a_bert_takes_off_what_it_adds(store, tmp_path):
    """Of any hidden states: what transformers' head does with them, by its formulas in float32."""
    params = exported(tmp_path / "out", store, MODELS["megatron_bert"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")

    def layer_norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(1e-6))
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    hidden = np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)
    hidden[0, 5] = 1e4  # one outlier: an entry as far from 0 as any can be
    head = "cls.predictions.transform"
    x = layer_norm(hidden, "bert.encoder.ln") @ tensors[f"{head}.dense.weight"].T
    x = np.maximum(x + tensors[f"{head}.dense.bias"], 0)
    theirs = layer_norm(x, f"{head}.LayerNorm") @ tensors["cls.predictions.decoder.weight"].T
    norm = params["final_norm"]
    tensors |= {"ours.weight": norm["scale"], "ours.bias": norm["bias"]}
    ours = layer_norm(hidden, "ours") @ params["embedding"].T
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5 * np.abs(ours).max())


def test_what_no_library_computes_is_refused():
    for change in ({"kind": "laser"}, {"per_dim_temp": True}, {"soft_cap": 50.0}):
        attention = AttentionConfig(**{"kind": "standard", **change})
        with pytest.raises(ValueError, match="timm has"):
            choose_layout(dataclasses.replace(VIT, attention=attention))
    conformer = ConformerConfig(vocab_size=8, num_layers=1, model_dim=8, mlp_dim=8, num_heads=1)
    with pytest.raises(ValueError, match=r"model\.kind=conformer: decoders, BERTs and ViTs"):
        choose_layout(conformer)


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
        (
            "megatron_bert",
            set_to("bert.encoder.layer.0.output.dense.bias", np.ones(32, np.float32)),
            "layer.0.output.dense.bias has other values",
        ),
        (
            "megatron_bert",
            set_to("cls.predictions.transform.dense.weight", np.ones((32, 32), np.float32)),
            "transform.dense.weight has other values",
        ),
        ("megatron_bert", set_to("cls.predictions.bias", np.ones(400, np.float32)), "has other va"),
        ("timm", set_to("pos_embed", np.ones((1, 36, 32), np.float32)), "pos_embed has other val"),
        ("timm", lambda t: t.pop("head.2.bias"), r"head.2.bias \(7,\) is missing"),
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


def test_an_earlier_export_comes_back(store, tmp_path):
    """Those of LASER's module had the frequencies of positions among their tensors."""
    params = exported(tmp_path / "out", store, MODELS["laser"])
    rewritten(tmp_path / "out", set_to("frequencies", np.ones(16, np.float32)))
    assert_same(load_exported(tmp_path / "out")[1], params)


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
    config.write_text(text.replace('"layout": "laser"', '"layout": "lazer"'))
    with pytest.raises(ValueError, match=r"config.json: layout='lazer': must be one of gpt2, "):
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
    trained_run = shutil.copytree(trained_run, tmp_path / "trained")
    out, again = tmp_path / "out", tmp_path / "again"
    results = trained_run / "eval" / "4" / "gpt3-1shot-5seeds"
    glance = results.with_name("gpt3-1shot-1seed-limit5")
    task = {
        "task": "copa", "split": "validation", "n": 100, "limit": None, "metric": "accuracy",
        "metrics": {"accuracy": {"mean": 0.625}},
        "fingerprints": {"rows": "", "checkpoint": fingerprint(trained_run, 4)},
    }  # fmt: skip
    earlier = {**task, "task": "cb", "fingerprints": {"rows": "", "checkpoint": "another"}}
    for folder, less in ((results, {}), (glance, {"n": 5, "limit": 5})):
        folder.mkdir(parents=True)
        tasks = {"copa": {**task, **less}, "cb": earlier, "rte": {"task": "rte"}}
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
    assert "cb (" not in card

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out", "trained"]


def test_what_the_disk_says_is_one_line(trained_run, tmp_path, capsys, monkeypatch):
    def on_a_full_disk(*tensors, **options):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            save_file(*tensors, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr("export.folder.save_file", on_a_full_disk)
    assert export.main([f"--workdir={trained_run}", f"--output={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export.py: error: ")
    assert "model.safetensors: " in line
    assert "File too large" in line
    assert not list(tmp_path.iterdir())


def test_a_damaged_score_is_named(trained_run, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run")
    path = run / "eval/4/gpt3-1shot-5seeds/results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[]")
    assert export.main([f"--workdir={run}", f"--output={tmp_path / 'out'}"]) == 2
    assert f"export.py: error: {path}: damaged" in capsys.readouterr().err


def test_a_model_comes_back_through_the_hosts_memory(store, tmp_path, monkeypatch):
    """And not through the first accelerator, which may be too small for it."""
    exported(tmp_path / "out", store, MODELS["laser"])
    save, placed = Checkpoints.save, []

    def watched(checkpoints, step, state, **rest):
        placed.extend(x.devices() for x in jax.tree.leaves(state))
        save(checkpoints, step, state, **rest)

    monkeypatch.setattr(Checkpoints, "save", watched)
    host = jax.local_devices(backend="cpu")[0]
    with jax.default_device(jax.devices()[3]):  # in the place of an accelerator
        import_run(tmp_path / "out", tmp_path / "run")
    assert placed == [{host}] * len(placed) != []


def test_a_model_comes_back_only_where_jax_has_the_processor(store, tmp_path, monkeypatch):
    exported(tmp_path / "out", store, MODELS["laser"])

    def without(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", without)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(ValueError) as error:
        import_run(tmp_path / "out", tmp_path / "run")
    assert "use tpu,cpu" in str(error.value)
    assert not (tmp_path / "run").exists()


TINY = {
    "model.num_layers": 1, "model.model_dim": 16, "model.mlp_dim": 32, "model.num_heads": 2,
    "training.steps": 1, "training.eval_every": 1, "training.eval_batches": 1,
    "training.batch_size": 8, "checkpoint.every": 1, "optimizer.warmup_steps": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, layout, files",
    [
        (
            ["--config=configs/bert.py:size=tiny,attention=laser", "--config.model.head_dim=8"],
            "laser",
            {"modeling_laser.py", "configuration_laser.py", "tokenization_laser.py",
             "tokenizer.model", "tokenizer_config.json"},
        ),
        (["--config=configs/vit.py:size=digits,attention=standard"], "timm", {"load_timm.py"}),
    ],
    ids=["bert", "vit"],
)  # fmt: skip
def test_other_runs_go_out_and_come_back(command, layout, files, store, tmp_path, capsys):
    run, out, again = tmp_path / "run", tmp_path / "out", tmp_path / "again"
    command = [*command]
    if layout == "laser":
        command += [f"--config.data.store={store}", "--config.model.vocab_size=400"]
        command += ["--config.data.seq_len=32", "--config.data.block_rows=4"]
    command += [f"--config.{name}={value}" for name, value in TINY.items()]
    done = runs.train(command, run)
    assert done.returncode == 0, done.stderr
    assert export.main([f"--workdir={run}", f"--output={out}"]) == 0
    assert f"step 1, layout {layout}" in capsys.readouterr().out
    common = {"config.json", "model.safetensors", "SHA256SUMS", "README.md"}
    assert {path.name for path in out.iterdir()} == files | common
    card = (out / "README.md").read_text()
    assert "error 0." in card or "error 1.0" in card
    assert export.main([f"--from_export={out}", f"--workdir={again}"]) == 0
    config = load_run_config(str(run))
    step = chosen_step(again, None)
    assert step == 1
    (first, _), (second, _) = (
        open_parameters(path, config, chosen_step(path, None)) for path in (run, again)
    )
    assert load_run_config(str(again)) == config
    assert_same(*(jax.tree.map(np.asarray, x) for x in (second, first)))
    # And it is a beginning for another run.
    more = runs.train([*command, f"--config.init_from={again}"], tmp_path / "more")
    assert more.returncode == 0, more.stderr
