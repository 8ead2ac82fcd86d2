"""Text survives encoding to the character, and training gives the same model every time."""

import pickle
import random

import pytest
import sentencepiece

from data.tokenizer import SPACE_MARK, Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return Tokenizer(tokenizer_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "Question: who?\n\nAnswer:",
        "  two  spaces,\ttab,\r\nand at the end   ",
        "ﬁ ｆｕｌｌ Å Å é",  # what NFKC would change
        "日本語 😀 \u00a0\u3000\u2028 \ufeff\0",
        f"a real {SPACE_MARK} and {SPACE_MARK}{SPACE_MARK}",
        "<pad></s><unk><0x41>",  # names of pieces are just text
    ],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_random_characters(tokenizer):
    rng = random.Random(0)
    kinds = [(32, 127), (0, 0x800), (0x2580, 0x2583), (0x800, 0xD800), (0xE000, 0x110000)]
    for _ in range(500):
        text = "".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(50))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_never_come_from_text(tokenizer):
    ids = tokenizer.encode("</s><pad> \0 \u0416")
    assert not {tokenizer.eos_id, tokenizer.pad_id, 2} & set(ids)
    assert tokenizer.vocab_size == 512
    assert max(ids) < 512


def test_a_newline_is_one_token_even_after_words(tokenizer):
    assert tokenizer.encode("\n\n") == [3, 3]  # its own piece, after PAD, EOS and UNK
    assert tokenizer.encode("the\n")[-1] == 3


def test_padding_and_eos_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("And God said")
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id, 0, 0]) == "And God said"


def test_a_batch_is_encoded_as_its_members(tokenizer_path):
    tokenizer = Tokenizer(tokenizer_path)
    texts = ["one", "", f"two {SPACE_MARK}", "\n"]
    for threads in (1, 3):
        batch = tokenizer.encode_arrays(texts, threads)
        assert [ids.dtype.name for ids in batch] == ["int32"] * 4
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == [ids.tolist() for ids in batch]
    tokenizer._arrays = False  # as with older SentencePiece
    older = tokenizer.encode_arrays(texts)
    assert [ids.dtype.name for ids in older] == ["int32"] * 4
    assert [ids.tolist() for ids in older] == [ids.tolist() for ids in batch]


def _documents(count):
    rng = random.Random(0)
    return [" ".join(str(rng.randrange(10**4)) for _ in range(100)) for _ in range(count)]


def test_training_is_deterministic_and_quiet(tmp_path, capfd):
    for name in ("a", "b"):
        train_tokenizer(iter(_documents(50)), tmp_path / name, 400)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Tokenizer(tmp_path / "a").sha256 == Tokenizer(tmp_path / "b").sha256
    assert capfd.readouterr() == ("", "")


def test_training_uses_a_sample_from_all_over_the_text(tmp_path):
    # Letters of early, middle and late documents; a sample of a tenth must have seen all of them.
    documents = [c * 3 + " " + c for c in "abcdefghij" for _ in range(100)]
    train_tokenizer(documents, tmp_path / "model", 280, sample_bytes=600)
    tokenizer = Tokenizer(tmp_path / "model")
    assert all(len(tokenizer.encode(letter)) == 1 for letter in "abcdefghij")
    assert tokenizer.encode("z") != [2]


def test_long_lines_are_trained_on(tmp_path):
    line = " ".join(_documents(800))
    assert len(line) > 300_000
    train_tokenizer([line], tmp_path / "model", 300)
    assert len(Tokenizer(tmp_path / "model").encode("7")) == 1


@pytest.mark.parametrize("vocab_size, documents", [(30_000, 5), (100, 5), (300, 0)])
def test_a_vocabulary_that_does_not_fit_the_text_is_an_error(tmp_path, vocab_size, documents):
    with pytest.raises(ValueError) as error:
        train_tokenizer(_documents(documents), tmp_path / "model", vocab_size)
    assert f"vocab_size={vocab_size}" in str(error.value)
    assert f"{documents} documents" in str(error.value)
    assert not (tmp_path / "model").exists()


@pytest.fixture
def train_like(tmp_path):
    """Trains a model with the settings of another project."""

    def train(**settings):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_documents(50)),
            model_prefix=str(tmp_path / "other"),
            vocab_size=300,
            hard_vocab_limit=False,
            minloglevel=2,
            **settings,
        )
        return Tokenizer(tmp_path / "other.model")

    return train


def test_models_as_t5s_are_accepted_and_what_they_lose_is_known(train_like):
    tokenizer = train_like(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert "newlines" in tokenizer.lost()
    assert "runs of spaces" in tokenizer.lost()
    text = f"12 {SPACE_MARK} 34"
    assert tokenizer.encode_arrays([text])[0].tolist() == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == "12 34"  # not ⁇ for the mark


def test_models_as_llamas_are_accepted_and_lose_nothing(train_like):
    tokenizer = train_like(
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    assert (tokenizer.pad_id, tokenizer.eos_id) == (2, 2)
    assert tokenizer.lost() == []


def test_our_models_lose_nothing(tokenizer):
    assert tokenizer.lost() == []


def test_a_tokenizer_can_be_sent_to_other_processes(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.encode(f"And God\n{SPACE_MARK}") == tokenizer.encode(f"And God\n{SPACE_MARK}")
    assert other.sha256 == tokenizer.sha256


def test_what_is_no_model_is_an_error(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    for path in (tmp_path / "x.model", tmp_path / "missing.model"):
        with pytest.raises(ValueError) as error:
            Tokenizer(path)
        assert str(path) in str(error.value)


def test_without_bytes_the_rarest_character_has_a_piece(tmp_path):
    """Of LibriSpeech's letters Z is one of 1,500, and a vocabulary would leave it out."""
    texts = ["A MAN AND A HEN RAN ON A HILL AND ATE THE RED NUT OF A TREE " * 100, "ZEN"]
    train_tokenizer(texts, tmp_path / "letters.model", 22, byte_fallback=False)
    tokenizer = Tokenizer(tmp_path / "letters.model")
    assert tokenizer.decode(tokenizer.encode("A ZEN MAN")) == "A ZEN MAN"
