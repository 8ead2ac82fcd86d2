"""Turns text into a token store that train.py reads.

    python scripts/prepare_data.py --source=bible --output=stores/bible --vocab_size=4096
    python scripts/prepare_data.py --source=my_texts/ --output=stores/mine --vocab_size=32000
    python scripts/prepare_data.py --source=c4/en --output=stores/c4 --tokenizer=c4.model --estimate
    python scripts/prepare_data.py --flagfile=configs/c4_store.flags
    python scripts/prepare_data.py --source=c4/en --output=stores/c4 --tokenizer=c4.model \\
        --beam="--runner=DirectRunner --direct_num_workers=8 --direct_running_mode=multi_processing"

A source is `bible` (comes with the requirements), `tfds:NAME/CONFIG:VERSION`, `hf:NAME`, or a
folder of .txt, .jsonl, .parquet, .jsonl.gz, .json.gz, .jsonl.zst or .json.zst files; the details
are in data/sources/registry.py. A flag file holds one flag a line. Stopped at any moment, the same
command goes on where it was; with --beam, which needs an environment of its own
(requirements-beam.txt), it begins anew. What Dataflow needs besides is in docs/data.md.
Exit codes: 0 done, 2 mistake in the command line or the input, 130 stopped by Ctrl-C, 1 anything
else.
"""

import logging
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from laser.training.console import end_on_ctrl_c, run_program

GOES_ON = "what is finished is kept, and the same command goes on"
if __name__ == "__main__":
    end_on_ctrl_c(f"stopped; {GOES_ON}")

from absl import flags

from data.preparation.config import StoreConfig
from data.preparation.estimate import estimate
from data.preparation.prepare import prepare
from laser.training.hardware import has_accelerator

VALUES = flags.FlagValues()
flags.DEFINE_string("source", None, "see above", flag_values=VALUES, required=True)
flags.DEFINE_string("output", None, "folder to write", flag_values=VALUES, required=True)
flags.DEFINE_integer("vocab_size", None, "train a tokenizer of this size", flag_values=VALUES)
flags.DEFINE_string("tokenizer", None, "use this SentencePiece model", flag_values=VALUES)
flags.DEFINE_string(
    "text_field", None, "of JSON lines, Parquet or hf:; default: text", flag_values=VALUES
)
flags.DEFINE_float(
    "validation_fraction",
    None,
    "held-out part of a folder without files named validation (default: 0.05), or of a set of "
    "TensorFlow Datasets that has a train split alone",
    flag_values=VALUES,
)
flags.DEFINE_bool(
    "drop_duplicates", False, "keep the first of equal documents alone", flag_values=VALUES
)
flags.DEFINE_integer(
    "max_broken", 0, "records to skip that are not UTF-8, JSON or text", flag_values=VALUES
)
flags.DEFINE_integer("workers", None, "processes; default: one a core", flag_values=VALUES)
flags.DEFINE_bool(
    "estimate", False, "only say how long it takes and how large it gets", flag_values=VALUES
)
flags.DEFINE_string("beam", None, "options of Apache Beam: prepare by it", flag_values=VALUES)


def main(argv: list[str]) -> int:
    return run_program(VALUES, __doc__, argv, _run, advice=GOES_ON)


def _run() -> None:
    logging.getLogger("absl").setLevel(logging.WARNING)
    values: dict[str, Any] = {f.name: VALUES[f.name].value for f in fields(StoreConfig)}
    config = StoreConfig(**values)
    if VALUES.estimate:
        print(estimate(config, VALUES.output, workers=VALUES.workers))
    elif VALUES.beam is not None:
        if VALUES.workers is not None:
            raise ValueError(f"workers={VALUES.workers}: Beam has its own number, in --beam")
        _run_beam(config)
    else:
        manifest = prepare(config, VALUES.output, workers=VALUES.workers)
        _print_counts(manifest)
        print(f"a small model on it:\n  {_training_command(manifest['vocab_size'])}")


def _run_beam(config: StoreConfig) -> None:
    try:
        from data.preparation.beam_pipeline import prepare_with_beam
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--beam needs the package {error.name}: install requirements-beam.txt into an "
            "environment of its own"
        ) from error
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # for workers on this machine
    prepare_with_beam(config, VALUES.output, options=shlex.split(VALUES.beam))


def _training_command(vocab_size: int) -> str:
    # The recipe is one for CPUs: its float32 products take a TPU six passes each, and GPUs have no
    # fast attention for it.
    dtype = ["--config.model.dtype=bfloat16"] if has_accelerator() else []
    return shlex.join([
        "python", "train.py", "--config=configs/quickstart.py",
        f"--config.data.store={VALUES.output}", f"--config.model.vocab_size={vocab_size}", *dtype,
        f"--workdir=runs/{Path(VALUES.output).name}",
    ])  # fmt: skip


def _print_counts(manifest: dict) -> None:
    for name, split in manifest["splits"].items():
        print(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{split['bytes']:,} bytes, {split['bytes'] / split['tokens']:.2f} bytes per token"
        )
        if split["duplicates_dropped"]:
            print(f"{name}: {split['duplicates_dropped']:,} duplicates dropped")
    for kind, count in manifest["broken"].items():
        print(f"skipped: {count:,} records, {kind}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
