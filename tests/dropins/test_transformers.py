"""LASER in a Llama of transformers, where torch is installed (requirements-peers.txt)."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: requirements-peers.txt")
transformers = pytest.importorskip("transformers", reason="requirements-peers.txt")

from laser.dropins.transformers import laser_attention_forward

pytestmark = pytest.mark.slow


def formula(module, query, key, value, attention_mask, scaling=None, **_):
    """Written out; the mask is of numbers, as transformers makes it for `eager`."""
    group = module.num_key_value_groups
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    log_probs = (query @ key.mT * scaling + attention_mask).log_softmax(-1)
    terms = log_probs[..., None] + value[:, :, None]
    return terms.logsumexp(-2).transpose(1, 2), None


transformers.AttentionInterface.register("formula", formula)
transformers.AttentionMaskInterface.register("formula", transformers.masking_utils.eager_mask)


@pytest.fixture(scope="module")
def models():
    """The same parameters under `laser` and under the formula."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    build = transformers.AutoModelForCausalLM.from_config
    # A model sets the implementation in its config.
    laser = build(copy.deepcopy(config), attn_implementation="laser")
    oracle = build(copy.deepcopy(config), attn_implementation="formula")
    oracle.load_state_dict(laser.state_dict())
    return laser, oracle


def test_values_and_gradients(models):
    tokens = torch.arange(1, 25).reshape(2, 12)
    losses = [model(tokens, labels=tokens).loss for model in models]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, model.parameters())
                 for loss, model in zip(losses, models)]  # fmt: skip
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_trains_under_autocast(models):
    """Where rotated queries and keys are float32 and values bfloat16."""
    tokens = torch.arange(1, 25).reshape(2, 12)
    wanted = models[0](tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = models[0](tokens, labels=tokens).loss
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0)
    gradients = [torch.autograd.grad(x, models[0].parameters()) for x in (loss, wanted)]
    for found, exact in zip(*gradients):
        assert (found - exact).norm() < 0.1 * exact.norm()


def test_padding_on_the_left_changes_nothing(models):
    tokens = torch.arange(1, 9)[None]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], dim=1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = models[0](tokens).logits
    found = models[0](padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_is_that_without_and_that_of_the_formula(models):
    prompt = {"input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])}
    prompt["attention_mask"] = (prompt["input_ids"] > 0).long()
    options = {"max_new_tokens": 8, "do_sample": False}
    found = models[0].generate(**prompt, **options)
    assert found.shape == (2, 12)
    assert torch.equal(found, models[0].generate(**prompt, **options, use_cache=False))
    assert torch.equal(found, models[1].generate(**prompt, **options))


def test_what_laser_has_not_is_named(models):
    x = torch.ones(1, 2, 3, 4)
    for options in ({"dropout": 0.1}, {"softcap": 50.0}, {"s_aux": x}, {"output_attentions": True}):
        with pytest.raises(ValueError) as error:
            laser_attention_forward(models[0], x, x, x, None, **options)
        assert next(iter(options)) in str(error.value)
