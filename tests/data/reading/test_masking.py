"""Masked tokens: how many of which kind, and what the draws depend on."""

import numpy as np
import pytest
import sentencepiece

from data.reading.masking import Masking
from data.tokenizer import Tokenizer

EOS, MASK, VOCAB = 1, 2, 500
MASKING = Masking(seed=3, vocab_size=VOCAB, mask_id=MASK, eos_id=EOS)


def batch(rows=64, length=512, valid=None):
    tokens = np.random.default_rng(0).integers(3, VOCAB, (rows, length)).astype(np.int32)
    tokens[:, ::100] = EOS
    there = np.arange(length) < np.full(rows, length if valid is None else valid)[:, None]
    return {
        "inputs": tokens,
        "targets": tokens + 1000,  # of a decoder; not those of BERT
        "weights": there.astype(np.float32),
        "segment_ids": 1 + np.cumsum(tokens == EOS, axis=1, dtype=np.int32),
    }


def test_share_and_kinds_of_masked_tokens():
    arrays = batch()
    masked = MASKING(arrays, 5, np.arange(64))
    tokens, chosen = arrays["inputs"], masked["weights"] == 1
    np.testing.assert_array_equal(masked["targets"], tokens)
    candidates = (tokens != EOS).sum()
    # Shares of 32,000 and of 4,900 tokens: within five standard deviations.
    assert abs(chosen.sum() / candidates - 0.15) < 0.01
    inputs = masked["inputs"][chosen]
    is_mask, kept = inputs == MASK, inputs == tokens[chosen]
    assert abs(is_mask.mean() - 0.8) < 0.03
    assert abs(kept.mean() - 0.1) < 0.022
    others = inputs[~is_mask & ~kept]
    assert len(np.unique(others)) > 200
    assert others.min() < 50
    assert VOCAB - 50 <= others.max() < VOCAB
    assert set(np.unique(masked["weights"])) == {0, 1}
    assert not chosen[tokens == EOS].any()
    np.testing.assert_array_equal(masked["inputs"][~chosen], tokens[~chosen])


def test_draws_follow_from_seed_step_and_place_alone():
    arrays = batch(rows=8, length=64)
    whole = MASKING(arrays, 5, np.arange(8))
    half = MASKING({name: x[4:] for name, x in arrays.items()}, 5, np.arange(4, 8))
    for name, x in whole.items():
        np.testing.assert_array_equal(half[name], x[4:])
    others = [
        MASKING(arrays, 6, np.arange(8)),
        MASKING(arrays, 5, np.arange(1, 9)),
        MASKING(arrays, None, np.arange(8)),
        Masking(4, VOCAB, MASK, EOS)(arrays, 5, np.arange(8)),
    ]
    for other in others:
        assert (other["weights"] != whole["weights"]).mean() > 0.1
    assert len({row.tobytes() for row in whole["weights"]}) == 8
    assert (MASKING(arrays, 0, np.arange(8))["weights"] != others[2]["weights"]).any()


def test_validation_has_the_same_masks_with_any_seed():
    arrays = batch(rows=8, length=64)
    one, other = (Masking(seed, VOCAB, MASK, EOS)(arrays, None, np.arange(8)) for seed in (3, 4))
    for name, x in one.items():
        np.testing.assert_array_equal(other[name], x)


def test_padding_is_never_chosen_and_a_segment_of_its_own():
    masked = MASKING(batch(rows=8, length=64, valid=40), None, np.arange(8))
    assert not masked["weights"][:, 40:].any()
    assert not masked["segment_ids"][:, 40:].any()
    assert masked["segment_ids"][:, :40].min() >= 1


def test_the_mask_is_a_token_that_no_text_has(tokenizer_path, tmp_path):
    tokenizer = Tokenizer(tokenizer_path)
    assert tokenizer.mask_id() == 2
    assert 2 not in tokenizer.encode("some words, ↑ and \U0001f9ec")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words of text"] * 10), model_prefix=str(tmp_path / "m"),
        vocab_size=20, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no pieces for bytes"):
        Tokenizer(tmp_path / "m.model").mask_id()
