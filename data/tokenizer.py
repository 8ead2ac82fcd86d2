"""SentencePiece, set so that decode(encode(text)) == text for any text.

T5's settings fold whitespace and normalise Unicode, which turns a blank line into a space: prompts
lose their structure and bits per byte lose their meaning. Here nothing is normalised, newlines have
a piece of their own, and characters outside of the vocabulary fall back to their bytes.
"""

import hashlib
import heapq
import io
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data.reading.files import path_of

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
SAMPLE_BYTES = 2**26  # of text that a vocabulary is trained on; needs about 20 times as much memory
MAX_LINE = 2**16  # characters; longer lines are cut for training
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this and can't tell it from a real one


# Text that some models don't give back: T5's lose all of these, LLaMA's none.
PROBES = {
    "newlines": "a\nb\n\nc",
    "runs of spaces": "a  b",
    "forms of characters": "ﬁ ½",
    "rare characters": "\U0001f9ec",
}


class Tokenizer:
    """A SentencePiece model.

    Models made by `train_tokenizer` give back exactly the text that was encoded. Others work if
    they have an EOS, but may normalise.

    Attributes:
      vocab_size: ids are below it.
      eos_id: separates documents.
      pad_id: fills rows; never a target. The EOS in models that have none.
      sha256: of the model file, as hex digits.
    """

    def __init__(self, path: str | Path):
        """Reads a model file. Raises ValueError where it isn't one or has no EOS."""
        file = path_of(path)
        if not file.is_file():
            raise ValueError(f"tokenizer={path}: no such file; give a SentencePiece .model file")
        model = file.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer={path}: not a SentencePiece model ({error})") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"tokenizer={path}: the model has no EOS, which separates documents")
        pad_id: int = self._processor.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.sha256 = hashlib.sha256(model).hexdigest()
        bytes_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
        # Without pieces for bytes it becomes a space, as that model's author accepted.
        self._space_mark = [] if self._processor.unk_id() in bytes_ids else bytes_ids
        self._arrays = _returns_arrays(self._processor)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without EOS."""
        if self._space_mark and SPACE_MARK in text:
            return self._encode_space_marks(text)
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores, without EOS."""
        return [ids.tolist() for ids in self.encode_arrays(texts, os.cpu_count() or 1)]

    def encode_arrays(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        """Token ids of each text, (length,) int32, without EOS."""
        if self._arrays:  # without a Python object for each token: 15 % faster
            ids = self._processor.encode(list(texts), num_threads=num_threads, return_type="numpy")
        else:
            lists = self._processor.encode(list(texts), num_threads=num_threads)
            ids = [np.array(i, np.int32) for i in lists]
        if self._space_mark:
            for index, text in enumerate(texts):
                if SPACE_MARK in text:
                    ids[index] = np.array(self._encode_space_marks(text), np.int32)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; padding and EOS decode to nothing."""
        return self._processor.decode([int(i) for i in ids])

    def mask_id(self) -> int:
        """The id that stands for a masked token: the one of unknown pieces, which no text has where
        every byte has a piece. Raises ValueError for a model without those."""
        unknown: int = self._processor.unk_id()
        if unknown in (self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)):
            raise ValueError(
                "the tokenizer has no pieces for bytes, so its unknown token is in texts and can't "
                "stand for a mask; use one of scripts/train_tokenizer.py"
            )
        return unknown

    def piece(self, token: int) -> str:
        """A token as it stands in the vocabulary."""
        return self._processor.id_to_piece(token)

    def lost(self) -> list[str]:
        """What does not come back from decode(encode(text)), in words; empty for our own models."""
        return [name for name, text in PROBES.items() if self.decode(self.encode(text)) != text]

    def _encode_space_marks(self, text: str) -> list[int]:
        """Spells SPACE_MARK as bytes, so that it doesn't come back as a space."""
        first, *others = self._processor.encode(text.split(SPACE_MARK))
        return first + [token for part in others for token in self._space_mark + part]


def train_tokenizer(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    sample_bytes: int = SAMPLE_BYTES,
    byte_fallback: bool = True,
) -> None:
    """Trains a unigram model on a random sample of documents; the same texts give the same file.

    Args:
      texts: documents, all of which are read.
      path: the model file to write.
      vocab_size: of which 4 are PAD, EOS, UNK and newline, and 256 are bytes.
      sample_bytes: UTF-8 bytes of the sample.
      byte_fallback: without it there are no pieces of bytes, every character of the sample has a
        piece, however rare it is, and others become UNK: for transcripts.

    Raises:
      ValueError: the text is too little, or has too many characters, for this vocabulary.
    """
    sample = _sample(texts, sample_bytes)
    model = io.BytesIO()
    try:
        _interruptibly(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=_lines(sample),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=byte_fallback,
            **({} if byte_fallback else {"character_coverage": 1.0}),
            user_defined_symbols=["\n"],
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            max_sentence_length=4 * MAX_LINE,  # bytes; longer ones would be left out silently
            num_threads=8,  # the sums of each thread are part of the result: not the machine's
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"vocab_size={vocab_size}: no vocabulary of this size from {len(sample)} documents "
            f"with {sum(len(text) for text in sample)} characters ({error}); choose another size, "
            "or give more text"
        ) from error
    Path(path).write_bytes(model.getvalue())


def _interruptibly(function: Callable[..., None], **arguments: Any) -> None:
    """Calls a long function of C++ in a thread. In the first one, which waits for it, Python takes
    signals; there it would not hear of Ctrl-C before the function ends."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function, **arguments).result()


def _returns_arrays(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether this release of SentencePiece can; 0.2.1, which Apache Beam needs, can't."""
    try:
        processor.encode(["a"], return_type="numpy")
    except TypeError:
        return False
    return True


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """A uniform sample, as many documents as fit: those with the smallest random keys."""
    keys = random.Random(0)
    heap: list[tuple[float, str]] = []  # the largest key first
    size = 0
    for text in texts:
        heapq.heappush(heap, (-keys.random(), text))
        size += len(text.encode())
        while size > max_bytes and len(heap) > 1:
            size -= len(heapq.heappop(heap)[1].encode())
    return [text for _, text in sorted(heap, reverse=True)]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_LINE):
                yield line[start : start + MAX_LINE]
