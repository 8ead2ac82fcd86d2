"""Exported models in PyTorch, where requirements-peers.txt is installed: logits, text, tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from data.tokenizer import Tokenizer
from eval.generation.generator import Generator
from export.folder import load_exported
from models.config import AttentionConfig
from models.families import structure
from tests.export.test_export import (
    BERT,
    EVERYTHING,
    MODELS,
    SMALL,
    assert_same,
    exported,
    layout_of,
)

LENGTH = 128
VARIANTS = {
    **{name: model for name, model in MODELS.items() if model.kind == "decoder"},
    "laser_plain": dataclasses.replace(SMALL, attention=AttentionConfig(kind="laser")),
    "laser_rotary": dataclasses.replace(
        SMALL, positions="rotary", logits_soft_cap=5.0,
        attention=dataclasses.replace(EVERYTHING, diff="scalar"),
    ),
    "standard_wide": dataclasses.replace(MODELS["gpt2"], head_dim=8),
}  # fmt: skip


def ours(config, params, tokens, segments=None):
    model = nnx.merge(structure(config), params)
    return np.asarray(model.logits(model(jnp.asarray(tokens), segments)[0]))


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture
def tokenizer(store):
    return Tokenizer(store / "tokenizer.model")


BERTS = {
    **{name: model for name, model in MODELS.items() if model.kind == "bert"},
    "laser_bert_wide": dataclasses.replace(
        BERT, head_dim=8, positions="rotary", mlp="geglu", attention=EVERYTHING
    ),
}


@pytest.mark.parametrize("name", BERTS)
def test_a_bert_fills_in_the_same(name, store, tmp_path):
    """Logits of rows of two lengths, the shorter one padded behind."""
    config = BERTS[name]
    params = exported(tmp_path / "out", store, config)
    model = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    ).eval()
    theirs = layout_of(name) == "megatron_bert"
    assert type(model).__name__ == ("MegatronBertForMaskedLM" if theirs else "LaserForMaskedLM")
    tokens = np.random.default_rng(0).integers(0, 400, size=(2, LENGTH))
    real = np.arange(LENGTH) < np.array([[LENGTH], [90]])
    with torch.inference_mode():
        found = model(torch.tensor(tokens), attention_mask=torch.tensor(real).long()).logits.numpy()
    expected = ours(config, params, tokens, real.astype(np.int32))
    np.testing.assert_allclose(
        found[real], expected[real], rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("name", ["megatron_bert", "laser_bert"])
def test_a_bert_comes_with_a_mask_and_pads_behind(name, store, tokenizer, tmp_path):
    exported(tmp_path / "out", store, BERTS[name])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert theirs.mask_token_id == tokenizer.mask_id()
    text = "Let there </s> be light. <unk>"
    assert theirs(text).input_ids == [tokenizer.eos_id, *tokenizer.encode(text)]
    assert theirs(["a", "In the beginning"], padding=True).attention_mask[0][-1] == 0


def with_outlier(params):
    """Token 399 gets values that lie hundreds of nats from all others: exp(V - max V) is 0."""
    params = jax.tree.map(np.array, params)
    params["embedding"][:, 0] = 0.0
    params["embedding"][399, 0] = 3.0
    value = params["blocks"]["attention"]["value"]
    value[0, 0] = 100.0 * np.where(np.arange(value.shape[-1]) % 2, 1, -1)
    return params


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_text_are_the_same(name, store, tokenizer, tmp_path):
    config = VARIANTS[name]
    params = exported(tmp_path / "out", store, config)
    model = loaded(tmp_path / "out")
    architecture = {
        "gpt2": "GPT2LMHeadModel",
        "starcoder2": "Starcoder2ForCausalLM",
        "llama": "LlamaForCausalLM",
    }
    layout = name.partition("_")[0]
    assert type(model).__name__ == architecture.get(layout, "LaserForCausalLM")
    tokens = np.random.default_rng(0).integers(0, 400, size=(2, LENGTH))
    with torch.inference_mode():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    expected = ours(config, params, tokens)
    atol = 1e-5 * np.abs(expected).max() if name == "llama" else 1e-4
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=atol)

    prompts = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in ("And God said", "In")]
    generator = Generator(config, tokenizer, max_length=LENGTH)
    for prompt, new in zip(prompts, generator.generate_tokens(params, prompts, max_new_tokens=64)):
        made = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        made = made[0, len(prompt) :].tolist()
        ended = tokenizer.eos_id in made
        assert (made[: made.index(tokenizer.eos_id)] if ended else made) == new


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
def test_positions_are_exact_in_half_precision(positions, store, tmp_path):
    """Where bfloat16 would round the frequencies, position 1000 would be radians off."""
    config = dataclasses.replace(
        SMALL, positions=positions, attention=AttentionConfig(kind="laser", diff="scalar")
    )
    params = exported(tmp_path / "out", store, config)
    tokens = np.random.default_rng(0).integers(0, 400, size=(1, 1024))
    expected = ours(config, params, tokens)[:, 1000:]
    loose = 0.05 * np.abs(expected).max()
    auto = transformers.AutoModelForCausalLM
    for dtype in (torch.bfloat16, torch.float16):
        cast = auto.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=dtype)
        for model in (cast.eval(), loaded(tmp_path / "out").to(dtype)):
            assert {x.dtype for x in model.state_dict().values()} == {dtype}
            rotations = []
            model.blocks[0].register_forward_pre_hook(lambda _, x, to=rotations: to.append(x[1]))
            with torch.inference_mode():
                theirs = model(torch.tensor(tokens)).logits[:, 1000:].numpy()
            np.testing.assert_allclose(theirs, expected, rtol=0, atol=loose)
            if positions == "rotary":  # which this model's logits hardly depend on
                angles = 1000 * 10_000.0 ** (-np.arange(4) / 4)
                for found, exact in zip(rotations[0], (np.sin(angles), np.cos(angles))):
                    np.testing.assert_allclose(found[0, 0, 1000], exact, rtol=0, atol=1e-3)


def test_outliers_are_exact_in_pytorch_too(store, tmp_path):
    config = VARIANTS["laser_plain"]
    params = with_outlier(exported(tmp_path / "out", store, config))
    model = loaded(tmp_path / "out")
    with torch.no_grad():
        model.embedding.copy_(torch.tensor(params["embedding"]))
        model.blocks[0].attention.value.copy_(
            torch.tensor(params["blocks"]["attention"]["value"][0])
        )
    tokens = np.random.default_rng(0).integers(0, 399, size=(1, 40))
    tokens[0, 30] = 399
    with torch.inference_mode():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(theirs, ours(config, params, tokens), atol=1e-4)


@pytest.mark.parametrize("amount", [1e31, -1e31, 3.4e38, -3.4e38, np.inf, np.nan])
def test_a_key_that_is_not_seen_has_no_part_in_pytorch_either(amount):
    from export.remote.modeling_laser import laser

    generator = torch.Generator().manual_seed(0)
    logits, value = (torch.randn(1, 1, 12, size, generator=generator) for size in (12, 4))
    later = torch.ones(12, 12, dtype=torch.bool).triu(1)
    log_probs = torch.log_softmax(logits.masked_fill(later, -torch.inf), dim=-1)
    expected = laser(log_probs, value)[:, :, :7]
    value[:, :, 7:] = amount
    out = laser(log_probs, value)
    torch.testing.assert_close(out[:, :, :7], expected)
    assert np.isfinite(amount) == bool(out[:, :, 7:].isfinite().all())


@pytest.mark.parametrize("name", ["gpt2", "laser"])
def test_the_tokenizer_gives_the_same_ids(name, store, tokenizer, tmp_path):
    exported(tmp_path / "out", store, VARIANTS[name])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    text = "And  God said,\n\n Let\u2581there </s> be \U0001f9ec light. <unk>"
    ids = tokenizer.encode(text)
    assert theirs(text).input_ids == [tokenizer.eos_id, *ids]
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs.decode(ids) == text
    assert theirs.decode([tokenizer.eos_id, *ids], skip_special_tokens=True) == text
    assert theirs(["a", "In the beginning"], padding=True).attention_mask[0][0] == 0


@pytest.mark.parametrize("name", ["gpt2", "laser"])
def test_a_padded_batch_generates_what_its_rows_do(name, store, tmp_path):
    exported(tmp_path / "out", store, VARIANTS[name])
    model = loaded(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    prompts = ["And God said, Let there be light", "In"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=12, do_sample=False)
    for row, prompt in enumerate(prompts):
        alone = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**alone, max_new_tokens=12, do_sample=False)[0]
        np.testing.assert_array_equal(made[-12:], together[row, -12:])


@pytest.mark.parametrize("name", ["laser", "laser_bert"])
def test_arguments_that_would_change_results_are_refused(name, store, tmp_path):
    exported(tmp_path / "out", store, MODELS[name])
    kind = {"decoder": "CausalLM", "bert": "MaskedLM"}[MODELS[name].kind]
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model = auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokens = torch.arange(1, 9)[None]
    for options in (
        {"inputs_embeds": torch.zeros(1, 8, 32)}, {"position_ids": tokens},
        {"token_type_ids": tokens}, {"num_items_in_batch": 4}, {"output_hidden_states": True},
        {"output_attentions": True}, {"return_dict": False},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{next(iter(options))}"):
            model(tokens, **options)
    unset = {"inputs_embeds": None, "output_hidden_states": False, "return_dict": True}
    assert torch.equal(model(tokens, **unset).logits, model(tokens).logits)
    # By this, transformers' trainer divides the loss by its steps of accumulation.
    assert model.accepts_loss_kwargs is False


@pytest.mark.parametrize("name", ["gpt2", "starcoder2", "laser", "megatron_bert", "laser_bert"])
def test_what_transformers_saves_comes_back(name, store, tmp_path):
    params = exported(tmp_path / "out", store, MODELS[name])
    kind = {"decoder": "CausalLM", "bert": "MaskedLM"}[MODELS[name].kind]
    load = getattr(transformers, f"AutoModelFor{kind}").from_pretrained
    load(tmp_path / "out", trust_remote_code=True).save_pretrained(tmp_path / "saved")
    config, back = load_exported(tmp_path / "saved")
    assert config == MODELS[name]
    assert_same(back, params)
