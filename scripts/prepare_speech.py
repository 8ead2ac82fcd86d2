"""Turns recordings and their transcripts into a store of speech that train.py reads.

    python scripts/prepare_speech.py --train=tones:1000 --validation=tones:100@1 \\
        --vocab_size=12 --output=stores/tones
    python scripts/prepare_speech.py --train=LibriSpeech/train --validation=LibriSpeech/dev \\
        --test=LibriSpeech/test-clean --vocab_size=1024 --max_broken=10 \\
        --output=stores/librispeech

A source is `tones:COUNT[@SEED]` (made up, no data is needed), a folder of FLAC with *.trans.txt as
LibriSpeech comes, with all folders in it (needs requirements-speech.txt), or
`tfds:librispeech:VERSION@SPLIT`, prepared before; several are separated by commas. Recordings above
20 seconds and transcripts above 256 characters are left out, as in AlgoPerf. The vocabulary is
trained on the transcripts, or --tokenizer names a SentencePiece model, as of
scripts/train_tokenizer.py. --test adds recordings that a run scores beside the validation split.
The same command goes on where it was stopped.
Exit codes: 0 done, 2 mistake in the command line or the input, 130 stopped by Ctrl-C, 1 anything
else.
"""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from laser.training.console import end_on_ctrl_c, run_program

if __name__ == "__main__":
    end_on_ctrl_c("stopped; the same command goes on with the part that it was at")

from absl import flags

from data.speech.prepare import SpeechConfig, prepare

VALUES = flags.FlagValues()
flags.DEFINE_string("train", None, "sources, as a,b", flag_values=VALUES, required=True)
flags.DEFINE_string("validation", None, "sources, as a,b", flag_values=VALUES, required=True)
flags.DEFINE_string("test", "", "further ones to evaluate on, as a,b", flag_values=VALUES)
flags.DEFINE_string("output", None, "folder to write", flag_values=VALUES, required=True)
flags.DEFINE_integer("vocab_size", None, "train a tokenizer of this size", flag_values=VALUES)
flags.DEFINE_string("tokenizer", None, "use this SentencePiece model", flag_values=VALUES)
flags.DEFINE_float("max_seconds", 20.0, "longer ones are left out", flag_values=VALUES)
flags.DEFINE_integer("max_characters", 256, "longer ones are left out", flag_values=VALUES)
flags.DEFINE_integer(
    "max_broken", 0, "recordings of a split to skip that can't be used", flag_values=VALUES
)


def main(argv: list[str]) -> int:
    return run_program(VALUES, __doc__, argv, _run)


def _run() -> None:
    values: dict[str, Any] = {f.name: VALUES[f.name].value for f in fields(SpeechConfig)}
    try:
        manifest = prepare(SpeechConfig(**values), VALUES.output)
    except ModuleNotFoundError as error:
        raise ValueError(f"needs {error.name}, of requirements-speech.txt") from error
    _print_counts(manifest)


def _print_counts(manifest: dict) -> None:
    for name, split in manifest["splits"].items():
        print(
            f"{name}: {split['recordings']:,} recordings of {split['seconds'] / 3600:,.2f} hours, "
            f"{split['labels']:,} labels"
        )
        for what in ("left_out", "broken"):
            for why, count in split[what].items():
                print(f"{name}: {count:,} {why}, {what.replace('_', ' ')}")
    print(f"vocabulary: {manifest['vocab_size']:,} pieces")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
