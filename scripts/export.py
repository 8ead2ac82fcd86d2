"""Writes a run's model as a folder that transformers or timm loads, and makes a run of such a
folder.

    python scripts/export.py --workdir=runs/quickstart-laser --output=exported
    python scripts/export.py --from_export=exported --workdir=runs/imported

The folder has safetensors, config.json, the tokenizer and a model card (see export/folder.py).
Standard attention becomes an existing architecture of transformers where one computes the same;
every other decoder or BERT comes with a module in PyTorch, for trust_remote_code=True. A vision
transformer of standard attention becomes timm's. The way back gives the same bits, as a run's
folder without optimizer state: to generate, evaluate, or start from.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from laser.training.folders import folder_of
from laser.training.hardware import tune_cpu

if __name__ == "__main__":
    tune_cpu()  # before anything imports jax

import jax

from data.reading.files import folder_to_write
from eval.likelihood import results
from eval.run import chosen_step, fingerprint, open_parameters
from export.card import model_card
from export.folder import Origin, import_run, write_export
from export.layouts import choose_layout
from laser.training.checkpoint import CheckpointError
from laser.training.run_folder import load_fingerprint, load_run_config


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, or a disk that cannot be read or written."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.from_export:
            if arguments.step is not None:
                raise ValueError(f"step={arguments.step}: an exported folder has one step alone")
            origin = import_run(arguments.from_export, arguments.workdir)
            print(f"written: {arguments.workdir}, step {origin.step}, as a run's folder")
        else:
            _export(arguments.workdir, arguments.step, folder_to_write(arguments.output))
    except (OSError, ValueError, CheckpointError) as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=folder_of, required=True, help="folder of the run")
    parser.add_argument("--step", type=int, help="checkpoint; the newest if not given")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--output", help="folder to write; must not be there yet")
    direction.add_argument(
        "--from_export", type=Path, metavar="DIR", help="exported folder to make a run of"
    )
    return parser


def _export(workdir: Path, step: int | None, output: Path) -> None:
    if output.exists():
        raise ValueError(f"output={output}: exists; choose another or remove it")
    step = chosen_step(workdir, step)
    config = load_run_config(str(workdir), step)
    layout = choose_layout(config.model)
    params, _ = open_parameters(workdir, config, step)
    origin = Origin(config, step, load_fingerprint(str(workdir), step))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    scores = results.of_checkpoint(workdir / "eval" / str(step), fingerprint(workdir, step))
    card = model_card(workdir, origin, layout, count, scores)
    tokenizer = None if layout == "timm" else workdir / "tokenizer.model"
    write_export(output, origin, params, tokenizer, card=card)
    print(f"written: {output}, step {step}, layout {layout}, {count:,} parameters")


if __name__ == "__main__":
    sys.exit(main())
