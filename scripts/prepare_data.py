"""Turns text into a token store that train.py reads.

    python scripts/prepare_data.py --source=bible --output=stores/bible --vocab_size=4096
    python scripts/prepare_data.py --source=my_texts/ --output=stores/mine --vocab_size=32000
    python scripts/prepare_data.py --source=c4/en/ --output=stores/c4 --tokenizer=c4.model

A source is `bible` (comes with the requirements), `c4` (TensorFlow Datasets), or a folder of .txt,
.jsonl, .jsonl.gz or .json.gz files. Stopped at any moment, the same command goes on where it was.
Exit codes: 0 done, 2 mistake in the command line or the input, 1 anything else.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from data.prepare import prepare

VALUES = flags.FlagValues()
flags.DEFINE_string("source", None, "bible, c4, or a folder", flag_values=VALUES, required=True)
flags.DEFINE_string("output", None, "folder to write", flag_values=VALUES, required=True)
flags.DEFINE_integer("vocab_size", None, "train a tokenizer of this size", flag_values=VALUES)
flags.DEFINE_string("tokenizer", None, "use this SentencePiece model", flag_values=VALUES)
flags.DEFINE_string("text_field", None, "of JSON lines; default: text", flag_values=VALUES)
flags.DEFINE_float(
    "validation_fraction",
    None,
    "held-out part of a folder that has no files named validation; default: 0.05",
    flag_values=VALUES,
)


def main(argv: list[str]) -> int:
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(__doc__.strip(), VALUES.main_module_help(), sep="\n\n")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        positional = VALUES(argv)[1:]
        if positional:
            raise ValueError(f"unexpected argument {positional[0]!r}: write --flag=value")
        manifest = prepare(
            VALUES.source,
            VALUES.output,
            vocab_size=VALUES.vocab_size,
            tokenizer=VALUES.tokenizer,
            text_field=VALUES.text_field,
            validation_fraction=VALUES.validation_fraction,
        )
    except (ValueError, flags.Error) as error:
        print(f"{Path(argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    for name, split in manifest["splits"].items():
        print(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{split['bytes']:,} bytes, {split['bytes'] / split['tokens']:.2f} bytes per token"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
