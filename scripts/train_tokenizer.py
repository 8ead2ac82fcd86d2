"""Trains the tokenizer of a corpus, on a random sample of its documents.

    python scripts/train_tokenizer.py --source=c4/en --output=c4.model

SentencePiece unigram, 32,000 pieces: nothing is normalised, whitespace is kept, a newline has a
piece of its own, and characters outside of the vocabulary fall back to bytes, so that decoding
gives back the text. PAD is 0, EOS is 1. Up to a million documents are read, from parts all over the
train split; the sample of them is bounded, and the same source gives the same model. Sources are
those of scripts/prepare_data.py, which also takes existing models, such as T5's or LLaMA's.
Exit codes: 0 done, 2 mistake in the command line or the input, 130 stopped by Ctrl-C, 1 anything
else.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from laser.training.console import end_on_ctrl_c, run_program

if __name__ == "__main__":
    end_on_ctrl_c("stopped; no tokenizer was written")

from absl import flags

from data.preparation.prepare import write_tokenizer
from data.sources.registry import open_source
from data.tokenizer import SAMPLE_BYTES, Tokenizer

VALUES = flags.FlagValues()
flags.DEFINE_string("source", None, "as in prepare_data.py", flag_values=VALUES, required=True)
flags.DEFINE_string("output", None, "model file to write", flag_values=VALUES, required=True)
flags.DEFINE_integer("vocab_size", 32_000, "pieces", flag_values=VALUES)
flags.DEFINE_integer(
    "sample_bytes",
    SAMPLE_BYTES,
    "of text to train on; needs about 20 times as much memory",
    lower_bound=1,
    flag_values=VALUES,
)
flags.DEFINE_string(
    "text_field", None, "of JSON lines, Parquet or hf:; default: text", flag_values=VALUES
)
flags.DEFINE_float(
    "validation_fraction", None, "as in prepare_data.py: never trained on", flag_values=VALUES
)


def main(argv: list[str]) -> int:
    return run_program(VALUES, __doc__, argv, _run)


def _run() -> None:
    path = Path(VALUES.output)
    if path.exists():
        raise ValueError(f"output={path}: is there already; choose another name, or delete it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"output={path}: no folder {path.absolute().parent}; make it first")
    source = open_source(VALUES.source, VALUES.text_field, VALUES.validation_fraction)
    write_tokenizer(path, source, VALUES.vocab_size, None, VALUES.sample_bytes)
    tokenizer = Tokenizer(path)
    print(f"{path}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.sha256}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
