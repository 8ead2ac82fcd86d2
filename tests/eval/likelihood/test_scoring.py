"""Scores against a plain forward pass, and their independence of how they were batched."""

import dataclasses
import random

import jax
import numpy as np
import pytest
from flax import nnx

from data.tokenizer import Tokenizer
from eval.likelihood.scoring import (
    BUCKET,
    Request,
    Scorer,
    _for_scoring,
    _programs,
    _Row,
    _share_rows,
    encode_pairs,
)
from laser.training import sharding
from models.config import AttentionConfig, ModelConfig
from models.decoder import output_logits
from models.families import init_parameters, structure

MAX_LENGTH = 100
SAMPLE = 5  # of the requests whose scores are compared with a forward pass of their own
CONFIG = ModelConfig(
    vocab_size=400, num_layers=2, model_dim=32, mlp_dim=64, num_heads=2, head_dim=16
)


@pytest.fixture(scope="module")
def tokenizer(store):
    return Tokenizer(store / "tokenizer.model")


@pytest.fixture(scope="module")
def params():
    # Larger than at the start of training, so that neighbours matter and ties do not hide errors.
    return jax.tree.map(lambda x: 2 * x, init_parameters(CONFIG, 1))


@pytest.fixture(scope="module")
def requests():
    """Of all lengths up to twice the model's, with shared contexts and shared beginnings."""
    draw = random.Random(0)

    def tokens(count):
        return tuple(draw.randrange(3, 400) for _ in range(count))

    made = []
    for length in (1, 31, 32, 33, 97, 99, 100, 200):
        context = tokens(length)
        first = tokens(4)
        made += [Request(context, first), Request(context, first[:1]), Request(context, first[:2])]
        made += [Request(context, tokens(count)) for count in (1, 1, 7)]
    draw.shuffle(made)
    return made


@pytest.fixture(scope="module")
def plain_scores(params, requests):
    """Of every SAMPLE-th request, one at a time: no padding, softmax in float64."""
    network = nnx.merge(structure(CONFIG), params)
    scores = []
    for request in requests[::SAMPLE]:
        fed = (request.context + request.continuation)[:-1][-MAX_LENGTH:]
        logits = np.asarray(network.logits(network(np.array([fed]))[0])[0], np.float64)
        logits = logits[-len(request.continuation) :]
        normaliser = np.log(np.exp(logits).sum(-1))
        picked = logits[np.arange(len(logits)), list(request.continuation)]
        greedy = bool((logits.argmax(-1) == request.continuation).all())
        scores.append((float((picked - normaliser).sum()), greedy))
    return scores


def close(scores, expected):
    gaps = [abs(score.logprob - value) for score, (value, _) in zip(scores, expected, strict=True)]
    return max(gaps) < 1e-4  # of sums up to 70 nats: float32 has 5 digits behind the point there


def test_scores_are_those_of_a_plain_forward_pass(requests, scores, plain_scores):
    assert close(scores[::SAMPLE], plain_scores)
    assert [score.greedy for score in scores[::SAMPLE]] == [greedy for _, greedy in plain_scores]
    assert [score.tokens for score in scores] == [len(r.continuation) for r in requests]
    assert [s.truncated for s in scores] == [r.length > MAX_LENGTH for r in requests]
    assert len({score.truncated for score in scores}) == 2


def test_greedy_is_true_for_the_likeliest_tokens(params):
    network = nnx.merge(structure(CONFIG), params)
    context, found = (5, 6, 7), []
    for _ in range(3):
        fed = np.array([[*context, *found]])
        found.append(int(network.logits(network(fed)[0])[0, -1].argmax()))
    other = [found[0], found[1], (found[2] + 1) % 400]
    likeliest, not_quite = Scorer(CONFIG, MAX_LENGTH).score(
        params, [Request(context, tuple(found)), Request(context, tuple(other))]
    )
    assert likeliest.greedy
    assert not not_quite.greedy


@pytest.fixture(scope="module")
def scores(params, requests):
    return Scorer(CONFIG, MAX_LENGTH).score(params, requests)


def relative_gap(scores, others):
    return max(
        abs(a.logprob - b.logprob) / max(1, abs(a.logprob))
        for a, b in zip(scores, others, strict=True)
    )


@pytest.mark.parametrize("row_tokens", [1, 20_000])
def test_scores_do_not_depend_on_the_batch_size(params, requests, scores, row_tokens):
    others = Scorer(CONFIG, MAX_LENGTH, row_tokens=row_tokens).score(params, requests)
    assert relative_gap(scores, others) < 1e-5


def test_scores_do_not_depend_on_order_and_company(params, requests, scores):
    scorer = Scorer(CONFIG, MAX_LENGTH, row_tokens=1)
    backwards = scorer.score(params, requests[::-1])[::-1]
    assert relative_gap(scores, backwards) < 1e-5
    alone = [scorer.score(params, [request])[0] for request in requests]  # no context is shared
    assert relative_gap(scores, alone) < 1e-5


def test_scores_do_not_depend_on_bucket_and_padding(params, requests, scores, monkeypatch):
    scores = Scorer(CONFIG, MAX_LENGTH).score(params, requests)
    monkeypatch.setattr("eval.likelihood.scoring.BUCKET", 7 * BUCKET + 1)
    others = Scorer(CONFIG, MAX_LENGTH).score(params, requests)
    assert relative_gap(scores, others) < 1e-5


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2)])
def test_scores_do_not_depend_on_the_mesh(params, requests, scores, shape):
    scores = Scorer(CONFIG, MAX_LENGTH).score(params, requests)
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(shape, sharding.AXES, axis_types=axes)
    placed = jax.device_put(params, sharding.state_shardings(mesh, params))
    others = Scorer(CONFIG, MAX_LENGTH, mesh).score(placed, requests)
    assert relative_gap(scores, others) < 1e-5


@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_padding_changes_nothing_for_either_attention(requests, kind):
    config = dataclasses.replace(CONFIG, attention=AttentionConfig(kind=kind))
    params = init_parameters(config, 3)
    alone = [Scorer(config, MAX_LENGTH).score(params, [r])[0] for r in requests[:6]]
    together = Scorer(config, MAX_LENGTH).score(params, requests)[:6]
    assert relative_gap(alone, together) < 1e-5


def test_requests_with_one_context_share_one_row(params, monkeypatch):
    rows = []
    batches = Scorer._batches
    monkeypatch.setattr(
        Scorer, "_batches", lambda self, given: (rows.append(len(given)), batches(self, given))[1]
    )
    context = tuple(range(3, 40))
    shared = [Request(context, (token,)) for token in (5, 6, 7)]
    shared.append(Request(context, (5, 9)))
    apart = [Request(context, (6, 9)), Request(context[1:], (5,))]
    Scorer(CONFIG, MAX_LENGTH).score(params, [*shared, *apart])
    assert rows == [2]


def test_what_cannot_be_scored_is_refused(params):
    scorer = Scorer(CONFIG, MAX_LENGTH)
    for request in (
        Request((), (3,)),
        Request((3,), ()),
        Request((3,), (4,) * (MAX_LENGTH + 1)),
    ):
        with pytest.raises(ValueError, match="need at least 1"):
            scorer.score(params, [request])
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(ValueError, match="not finite"):
        scorer.score(broken, [Request((3,), (4,))])


@pytest.mark.parametrize(
    "context, continuation",
    [
        ("And God said,", " Let there be light"),
        ("And God said, ", "Let there be light"),  # the space goes over
        ("And God said\n\n", "Let"),
        ("", "In the beginning"),
        ("And God sa", "id unto them"),  # a token may span the join
        ("the", "n"),
        ("the LOR", "D"),
    ],
)
def test_pairs_are_one_text_cut_after_the_context(tokenizer, context, continuation):
    request = encode_pairs(tokenizer, [context], [continuation])[0]
    assert request.context[0] == tokenizer.eos_id
    assert request.context[1:] + request.continuation == tuple(
        tokenizer.encode(context + continuation)
    )
    count, whole = (len(tokenizer.encode(t)) for t in (context.rstrip(), context + continuation))
    assert len(request.context) - 1 == min(count, whole - 1)


def test_a_continuation_is_never_without_tokens(tokenizer):
    """Where the whole has no more tokens than the context, the last one is scored."""
    pairs = [(text[:i], text[i:]) for text in ("LORD", "the", "unto", "And") for i in (1, 2)]
    requests = encode_pairs(tokenizer, *zip(*pairs))
    assert all(request.continuation for request in requests)
    merged = [
        len(tokenizer.encode(context)) >= len(tokenizer.encode(context + ending))
        for context, ending in pairs
    ]
    assert any(merged)  # or else this tests nothing


def test_an_empty_continuation_is_refused(tokenizer):
    with pytest.raises(ValueError, match="continuation is empty"):
        encode_pairs(tokenizer, ["a", "b"], [" c", ""])


@pytest.mark.parametrize("kind", ["standard", "laser"])
def test_a_shared_context_is_computed_once(kind):
    config = dataclasses.replace(CONFIG, attention=AttentionConfig(kind=kind), positions="rotary")
    params = jax.tree.map(lambda x: 2 * x, init_parameters(config, 1))
    draw = random.Random(0)
    context = tuple(draw.randrange(3, 400) for _ in range(40))
    endings = [tuple(draw.randrange(3, 400) for _ in range(12)) for _ in range(6)]
    requests = [Request(context, ending) for ending in (*endings, endings[0][:5])]
    scorer = Scorer(config, MAX_LENGTH)
    alone = [scorer.score(params, [request])[0] for request in requests]
    fed = []
    hidden = scorer._hidden
    scorer._hidden = lambda params, *arrays: fed.append(arrays) or hidden(params, *arrays)
    together = scorer.score(params, requests)
    assert relative_gap(together, alone) < 1e-5
    # 40 + 5 x 11 tokens fit into a row of 100 at most; the sixth continuation needs another one.
    assert sum((np.asarray(tokens_BT) != 0).any(axis=1).sum() for tokens_BT, *_ in fed) == 2


def waste(scorer, requests):
    """Tokens fed over tokens that are there."""
    rows = _share_rows([scorer._fed(request) for request in requests], scorer.max_length)
    fed = sum(scorer._batch_size(length) * length for _, length, _ in scorer._batches(rows))
    return fed / sum(row.length for row in rows)


def test_small_sets_are_padded_little_and_large_ones_less():
    """Documents as HellaSwag's: 30 of them were padded to 3.2 times their tokens."""
    draw = random.Random(0)

    def documents(count):
        for _ in range(count):
            context = tuple(draw.randrange(3, 400) for _ in range(draw.randrange(30, 120)))
            for _ in range(4):
                yield Request(context, tuple(draw.choices(range(3, 400), k=draw.randrange(15, 35))))

    scorer = Scorer(dataclasses.replace(CONFIG, mlp_dim=65), 1024)  # for which nothing is compiled
    assert waste(scorer, list(documents(30))) < 1.6
    assert waste(scorer, list(documents(3000))) < 1.2


def test_programs_are_compiled_once_for_all_tasks_and_checkpoints(monkeypatch):
    config = dataclasses.replace(CONFIG, vocab_size=401)
    params = init_parameters(config, 1)
    compiled = []
    monkeypatch.setattr("eval.likelihood.scoring.output_logits", counted_calls(compiled))
    scorer = Scorer(config, 512)
    requests = [Request((3,) * length, (4, 5, 6)) for length in (40, 200, 300, 400)]
    scorer.score(params, requests)
    assert len(scorer._compiled) == 1  # a few rows are not worth another program
    traced = len(compiled)
    assert traced == 1
    Scorer(config, 512).score(params, [Request((3,), (4, 5)), *requests[:3]])
    assert len(compiled) == traced
    many = [Request((3,) * 30 + (i % 400, i // 400), (4,)) for i in range(10_000)]
    assert len(scorer._lengths([len(r.context) for r in many] + [400], True)) == 2


def counted_calls(calls):
    """output_logits, whose calls while it is traced are counted."""

    def counted(*arguments):
        calls.append(arguments)
        return output_logits(*arguments)

    return counted


def test_layers_are_compiled_once_whatever_training_did():
    unrolled = dataclasses.replace(CONFIG, unroll=True)
    programs = _programs(_for_scoring(unrolled), sharding.single_device_mesh())
    tokens = np.zeros((1, BUCKET), np.int32)
    assert "stablehlo.while" in programs.hidden.lower(init_parameters(CONFIG, 1), tokens).as_text()


def test_a_batch_grows_with_the_chips_but_not_with_the_devices_of_a_cpu(monkeypatch):
    mesh = jax.make_mesh((8, 1, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rows = [_Row((3,) * BUCKET, ((),), ((i, 0),)) for i in range(300)]

    def largest(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        scorer = Scorer(CONFIG, MAX_LENGTH, mesh, row_tokens=8 * BUCKET)
        return max(len(batch) for batch, _, _ in scorer._batches(rows))

    assert largest("cpu") == 8
    assert largest("tpu") == 64
