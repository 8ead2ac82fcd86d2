"""The SentencePiece model of a run as a tokenizer of transformers, with the same ids.

    AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)

EOS separates documents, so it also comes first, unless add_special_tokens=False. Special tokens
are not recognised in text: what looks like one is text, as in training.
"""

import shutil
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this and can't tell it from a real one


class LaserTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012, transformers' own form
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file, **kwargs):
        self.vocab_file = vocab_file
        self.processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        known = self.processor.unk_id() not in ids
        self.space_mark = [self.processor.id_to_piece(i) for i in ids] if known else []
        eos = self.processor.id_to_piece(self.processor.eos_id())
        pad = self.processor.pad_id()
        kwargs.update(
            bos_token=eos,
            eos_token=eos,
            unk_token=self.processor.id_to_piece(self.processor.unk_id()),
            pad_token=self.processor.id_to_piece(pad) if pad >= 0 else eos,
        )
        kwargs.setdefault("padding_side", "left")
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return self.processor.vocab_size()

    def get_vocab(self):
        return {self.processor.id_to_piece(i): i for i in range(self.vocab_size)}

    def tokenize(self, text, **unused):
        """Pieces of the whole text, never split at special tokens first."""
        parts = text.split(SPACE_MARK) if self.space_mark else [text]
        first, *others = [self.processor.encode(part, out_type=str) for part in parts]
        return first + [piece for part in others for piece in self.space_mark + part]

    def _tokenize(self, text, **unused):
        return self.tokenize(text)

    def _convert_token_to_id(self, token):
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.processor.decode_pieces(list(tokens))

    def _decode(self, token_ids, skip_special_tokens=False, **unused):
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        if skip_special_tokens:
            ids = [i for i in ids if i not in (self.eos_token_id, self.pad_token_id)]
            return self.processor.decode(ids)
        pieces, text = [], ""
        for i in ids:
            if i in (self.eos_token_id, self.pad_token_id):
                text += self.processor.decode(pieces) + self.processor.id_to_piece(i)
                pieces = []
            else:
                pieces.append(i)
        return text + self.processor.decode(pieces)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.eos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        name = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{name}tokenizer.model"
        if Path(self.vocab_file).resolve() != target.resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
