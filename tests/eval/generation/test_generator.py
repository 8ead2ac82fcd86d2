"""Text from a model: what the whole forward pass finds likeliest, alone, in batches, on a mesh."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.tokenizer import Tokenizer
from eval.generation.generator import STEPS, Generator, _Text
from eval.generation.sampling import Sampling, choose
from laser.training import sharding
from models.config import AttentionConfig, ModelConfig
from models.families import init_parameters, structure

CONFIG = ModelConfig(
    vocab_size=400, num_layers=2, model_dim=32, mlp_dim=64, num_heads=2, head_dim=16,
    attention=AttentionConfig(kind="laser"),
)  # fmt: skip
LENGTH = 160
PROMPTS = ["And God said", "", "the sea, " * 20, "In the beginning was the Word"]
NEW = 2 * STEPS + 3


@pytest.fixture(scope="module")
def tokenizer(store):
    return Tokenizer(store / "tokenizer.model")


@pytest.fixture(scope="module")
def params():
    """Random ones that don't repeat the last token, as a tied embedding makes them do at first."""
    params = init_parameters(CONFIG, 0)
    scale = jax.random.normal(jax.random.key(1), (CONFIG.model_dim,))
    return {**params, "final_norm": {**params["final_norm"], "scale": scale}}


@pytest.fixture(scope="module")
def generator(tokenizer):
    return Generator(CONFIG, tokenizer, max_length=LENGTH)


@pytest.fixture(scope="module")
def greedy(generator, params):
    return generator.generate(params, PROMPTS, max_new_tokens=NEW)


def likeliest(params, tokenizer, prompt, count):
    """Greedy tokens by whole forward passes."""
    network = nnx.merge(structure(CONFIG), params)
    logits = jax.jit(lambda tokens: network.logits(network(tokens)[0]))
    tokens = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    start = len(tokens)
    for _ in range(count):
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(logits(row)[0, len(tokens) - 1])))
    assert tokenizer.eos_id not in tokens[start:]
    return tokens[start:]


def test_greedy_takes_the_likeliest_token_each_time(greedy, params, tokenizer):
    assert len(greedy) == len(PROMPTS)
    for prompt, text in zip(PROMPTS, greedy):
        assert text == tokenizer.decode(likeliest(params, tokenizer, prompt, NEW))


def test_prompts_of_tokens_are_taken_as_they_are(generator, params, tokenizer, greedy):
    ids = [tokenizer.eos_id, *tokenizer.encode(PROMPTS[0])]
    assert generator.generate(params, [ids], max_new_tokens=NEW) == greedy[:1]
    assert generator.generate(params, [ids[1:]], max_new_tokens=NEW) != greedy[:1]
    assert generator.generate(params, [], max_new_tokens=NEW) == []


def test_a_mesh_gives_the_same_text(params, tokenizer, greedy):
    mesh = jax.make_mesh((2, 2, 2), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    placed = jax.device_put(params, sharding.state_shardings(mesh, params))
    generator = Generator(CONFIG, tokenizer, mesh, max_length=LENGTH, rows=2)  # of 4 at least
    assert generator.generate(placed, PROMPTS, max_new_tokens=NEW) == greedy


def test_only_tokens_of_the_tokenizer_are_taken(params, tokenizer, greedy):
    """A model may have more entries than they: ids above them have no text."""
    width = CONFIG.vocab_size + 112
    config = dataclasses.replace(CONFIG, vocab_size=width)
    more = jnp.full((112, CONFIG.model_dim), 9.0) * params["embedding"].max()
    wider = {
        **params,
        "embedding": jnp.concatenate(
            [
                params["embedding"],
                more,
            ]
        ),
    }
    network = nnx.merge(structure(config), wider)
    tokens = np.array([[tokenizer.eos_id, *tokenizer.encode(PROMPTS[0])]])
    assert np.argmax(network.logits(network(tokens)[0])[0, -1]) >= tokenizer.vocab_size
    generator = Generator(config, tokenizer, max_length=LENGTH)
    assert generator.generate(wider, PROMPTS, max_new_tokens=NEW) == greedy
    drawn = generator.generate_tokens(
        wider, tokens.tolist(), max_new_tokens=NEW, sampling=Sampling(temperature=5.0, top_k=450)
    )
    assert max(drawn[0]) < tokenizer.vocab_size


@pytest.mark.slow
def test_draws_follow_from_the_seed_and_the_place_alone(generator, params, tokenizer):
    def texts(prompts, seed, of=generator):
        return of.generate(params, prompts, max_new_tokens=NEW, temperature=1.0, seed=seed)

    first = texts(PROMPTS, 0)
    assert texts(PROMPTS, 0) == first
    assert texts(PROMPTS, 1)[0] != first[0]
    assert texts(PROMPTS[:1] * len(PROMPTS), 0)[1] != first[0]
    alone = Generator(CONFIG, tokenizer, max_length=LENGTH, rows=1)
    assert texts(PROMPTS, 0, alone) == first
    # Neighbours of other lengths change nothing.
    assert texts([PROMPTS[0], *PROMPTS[:0:-1]], 0)[0] == first[0]


def test_the_end_of_the_document_ends_the_text(generator, params, tokenizer):
    prompts = [[tokenizer.eos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    made = generator.generate_tokens(params, prompts, max_new_tokens=NEW)
    ending = copy.copy(tokenizer)
    ending.eos_id = made[0][STEPS + 1]
    other = Generator(CONFIG, ending, max_length=LENGTH)
    ended = other.generate_tokens(params, prompts, max_new_tokens=NEW)
    assert 0 < len(ended[0]) < NEW
    for short, long in zip(ended, made):
        assert short == long[: [*long, ending.eos_id].index(ending.eos_id)]


def test_stop_strings_end_the_text_wherever_tokens_begin(generator, params, tokenizer, greedy):
    ids = likeliest(params, tokenizer, PROMPTS[0], NEW)
    pieces = [tokenizer.decode([token]) for token in ids]
    for i in range(len(pieces) - 1):
        stop = pieces[i][-1:] + pieces[i + 1]
        pieces_out = []
        text = generator.generate(
            params, PROMPTS, max_new_tokens=NEW, stop=["never there", stop],
            on_text=lambda index, piece, out=pieces_out: out.append((index, piece)),
        )  # fmt: skip
        assert stop in greedy[0]
        assert text[0] == greedy[0][: greedy[0].index(stop)]
        for index in range(len(PROMPTS)):
            assert "".join(piece for at, piece in pieces_out if at == index) == text[index]
        if i > 1:
            break


def test_text_is_handed_out_as_it_is_made(generator, params, greedy):
    pieces = []
    generator.generate(
        params, PROMPTS[:1], max_new_tokens=NEW, on_text=lambda _, piece: pieces.append(piece)
    )
    assert len(pieces) == 3
    assert "".join(pieces) == greedy[0]


def test_half_a_character_is_held_back(tokenizer):
    ids = tokenizer.encode("a\U0001f9ecb")
    text, pieces = _Text(tokenizer, ["bc"]), []
    for end in range(1, len(ids) + 1):
        pieces.append(text.update(ids[:end], ended=end == len(ids)))
    assert "".join(pieces) == "a\U0001f9ecb"
    assert all("\ufffd" not in piece for piece in pieces)
    held = _Text(tokenizer, ["\U0001f9ecbc"])
    assert held.update(ids, ended=False) == "a"
    # The stop's last character is not whole yet.
    ids = tokenizer.encode("foo#\U0001f9ec")
    held = _Text(tokenizer, ["#\U0001f9ec"])
    assert [held.update(ids[:-1], ended=False), held.update(ids, ended=False)] == ["foo", ""]
    assert (held.sent, held.ended) == ("foo", True)


LOGITS = jnp.log(jnp.array([[0.05, 0.4, 0.2, 0.3, 0.05], [0.7, 0.1, 0.1, 0.05, 0.05]]))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"temperature": 1.0}, [[0.05, 0.4, 0.2, 0.3, 0.05], [0.7, 0.1, 0.1, 0.05, 0.05]]),
        ({"temperature": 1.0, "top_k": 2}, [[0, 4 / 7, 0, 3 / 7, 0], [7 / 9, 1 / 9, 1 / 9, 0, 0]]),
        ({"temperature": 1.0, "top_p": 0.65}, [[0, 4 / 7, 0, 3 / 7, 0], [1, 0, 0, 0, 0]]),
        # 0.4 / 0.9 and 0.3 / 0.9 are enough of the three that top_k leaves.
        (
            {"temperature": 1.0, "top_k": 3, "top_p": 0.7},
            [[0, 4 / 7, 0, 3 / 7, 0], [1, 0, 0, 0, 0]],
        ),
        (
            {"temperature": 0.5, "top_k": 2},
            [[0, 0.64, 0, 0.36, 0], [49 / 51, 1 / 51, 1 / 51, 0, 0]],
        ),
        ({"temperature": 2.0, "top_k": 99}, None),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_that_are_left(settings, expected):
    draws = 20_000
    sampling = Sampling(**settings)
    one = functools.partial(
        choose, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
        mode=sampling.mode,
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), (draws, 2))
    tokens = jax.jit(jax.vmap(lambda keys: one(LOGITS, keys)))(keys)
    counts = np.stack([np.bincount(tokens[:, row], minlength=5) for row in range(2)]) / draws
    if expected is None:
        expected = jax.nn.softmax(LOGITS / 2, axis=-1)
    np.testing.assert_allclose(counts, expected, atol=0.015)
    assert (counts[np.array(expected) == 0] == 0).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": [""]}, "an empty string"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": LENGTH}, f"the model's length is {LENGTH}, so at most 15[0-9] fit"),
        ({"prompts": ["a", "a. " * LENGTH]}, "prompt 1 has .* tokens .*shorten it"),
        ({"prompts": [[]]}, "prompt 0 has no tokens"),
    ],
)
def test_what_cannot_be_done_is_said_before(generator, params, changes, message):
    arguments = {"prompts": PROMPTS[:1], "max_new_tokens": NEW, **changes}
    with pytest.raises(ValueError, match=message):
        generator.generate(params, **arguments)


def test_broken_parameters_are_refused(generator, params):
    broken = {**params, "embedding": params["embedding"].at[7].set(jnp.nan)}
    with pytest.raises(ValueError, match="not finite"):
        generator.generate(broken, PROMPTS[:1], max_new_tokens=NEW)
