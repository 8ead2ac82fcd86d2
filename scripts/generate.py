"""Continues prompts with a run's model, from the run's folder alone.

    python scripts/generate.py --workdir=runs/quickstart-laser --prompt="In the beginning"
    python scripts/generate.py --workdir=RUN --prompts=prompts.txt --output=continuations.jsonl

A single prompt is printed with its continuation, as that is made. A file of prompts has one on each
line, or is .jsonl with {"prompt": text} on each; the output has {"prompt": ..., "continuation":
...} in the same order, and appears when it is complete.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from laser.training.console import end_on_ctrl_c
from laser.training.hardware import tune_cpu

if __name__ == "__main__":
    end_on_ctrl_c("stopped")
    tune_cpu()  # before anything imports jax

from tqdm import tqdm

from eval.run import open_model
from laser.training.checkpoint import CheckpointError
from laser.training.folders import folder_of, write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input."""
    arguments = _parser().parse_args(argv)
    try:
        _generate(arguments)
    except (OSError, ValueError, CheckpointError) as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=folder_of, required=True, help="folder of the run")
    parser.add_argument("--step", type=int, help="checkpoint; the newest if not given")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text that begins a document; may be empty")
    what.add_argument("--prompts", type=Path, help="file of prompts, .txt or .jsonl")
    parser.add_argument("--output", type=Path, help=".jsonl to write, with --prompts")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="default: 100")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0 = the likeliest token; default: 0.7"
    )
    parser.add_argument("--top_k", type=int, default=0, help="draw from the K likeliest; 0 = all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the likeliest of probability P; 1 = all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends a continuation; may be repeated"
    )
    return parser


def _generate(arguments: argparse.Namespace) -> None:
    if (arguments.prompts is None) != (arguments.output is None):
        raise ValueError("--prompts and --output go together")
    settings = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    }
    if arguments.prompts is None:
        _stream(arguments, settings)
    else:
        _write(arguments, read_prompts(arguments.prompts), settings)


def _stream(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    model = open_model(arguments.workdir, arguments.step)
    before = [arguments.prompt]  # until the first piece is there: by then nothing was refused

    def show(_: int, piece: str) -> None:
        print(before.pop() if before else "", piece, sep="", end="", flush=True)

    model.generator.generate(model.params, [arguments.prompt], on_text=show, **settings)
    print(*before)


def _write(arguments: argparse.Namespace, prompts: Sequence[str], settings: dict[str, Any]) -> None:
    _check_output(arguments.output)
    model = open_model(arguments.workdir, arguments.step)
    with tqdm(unit=" characters", disable=None, leave=False) as bar:
        texts = model.generator.generate(
            model.params, prompts, on_text=lambda _, piece: bar.update(len(piece)), **settings
        )
    lines = [
        json.dumps({"prompt": prompt, "continuation": text}, ensure_ascii=False) + "\n"
        for prompt, text in zip(prompts, texts)
    ]
    try:
        write_atomically(arguments.output, "".join(lines))
    except OSError as error:
        raise ValueError(f"output={arguments.output}: {error.strerror}") from error
    print(f"written: {arguments.output}, {len(prompts)} continuations at step {model.step}")


def _check_output(path: Path) -> None:
    """Raises ValueError where no such file can be written: before the work, not after it."""
    if not path.parent.is_dir():
        raise ValueError(f"output={path}: no folder {path.parent}")
    try:
        if path.is_dir():
            raise ValueError(f"output={path}: a folder; name a file")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name):
            pass
    except OSError as error:
        raise ValueError(f"output={path}: {error.strerror}") from error


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, see the module's docstring. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"prompts={path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={path}: not UTF-8 ({error.reason} at {error.start})") from error
    lines = lines[:-1] if lines[-1] == "" else lines
    if not lines:
        raise ValueError(f"prompts={path}: the file has no prompts")
    if path.suffix != ".jsonl":
        return lines
    return [_prompt_of(line, f"prompts={path}, line {i}") for i, line in enumerate(lines, 1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where}: expected {{"prompt": text}}, got {line[:80]!r}')
    return row["prompt"]


if __name__ == "__main__":
    sys.exit(main())
