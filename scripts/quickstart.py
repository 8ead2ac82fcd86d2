"""Prepares the embedded corpus, trains configs/quickstart.py on it, and shows what came of it.

    python scripts/quickstart.py [--attention=laser] [--workdir=RUN] [-- OVERRIDES]

OVERRIDES go on to train.py, such as --config.training.steps=100.
Each part is one of the ordinary commands, printed before it runs. Started again it goes on where it
was. Held-out chapters are compared with `xz -9e` of the same text, a compressor that anyone can
run.
"""

import argparse
import contextlib
import lzma
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import quickstart
from data.sources import corpus
from laser.training.console import end_on_ctrl_c, start_logging
from laser.training.hardware import tune_cpu
from laser.training.metrics import METRICS_FILE, read_metrics

PROMPT = "In the beginning"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--attention",
        default="laser",
        help="as in configs/c4.py: standard or laser, and modifiers such as +qk_norm",
    )
    parser.add_argument(
        "--workdir", help="folder of the run; runs/quickstart-ATTENTION if there is none"
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDES", help="see above")
    arguments = parser.parse_args()
    start_logging()
    attention = arguments.attention
    workdir = arguments.workdir or f"runs/quickstart-{attention}"
    try:
        config = quickstart.get_config(f"attention={attention}")
    except ValueError as error:
        parser.error(str(error))
    _run(
        "scripts/prepare_data.py",
        "--source=bible",
        f"--output={config.data.store}",
        f"--vocab_size={config.model.vocab_size}",
    )
    _run(
        "train.py",
        f"--config=configs/quickstart.py:attention={attention}",
        f"--workdir={workdir}",
        *arguments.overrides,
    )
    _summarise(Path(workdir), attention)


def _run(*command: str) -> None:
    """Runs one of our commands in the repository's root; leaves with its exit code if it fails."""
    print(f"\n$ {_shown(*command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    code = None
    while code is None:
        with contextlib.suppress(KeyboardInterrupt):  # it reaches the command, which saves and ends
            code = process.wait()
    if code:
        sys.exit(code)


def _shown(*command: str) -> str:
    return shlex.join([".venv/bin/python", *command])


def _summarise(workdir: Path, attention: str) -> None:
    end_on_ctrl_c("stopped; the run is done, and the same command shows what came of it")
    records = read_metrics(ROOT / workdir / METRICS_FILE)
    last_eval = [record for record in records if "eval/loss" in record][-1]
    speeds = sorted(r["tokens_per_second"] for r in records if "tokens_per_second" in r)
    text = corpus.held_out_text().encode()
    xz_bits = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    print(f"\nQuickstart, step {last_eval['step']}: {workdir}")
    print(f"  validation loss    {last_eval['eval/loss']:.4f} nats per token")
    if "eval/bits_per_byte" in last_eval:  # the whole split was read
        bits = last_eval["eval/bits_per_byte"]
        print(f"  bits per byte      {bits:.3f}   (xz -9e: {xz_bits:.3f})")
    if speeds:  # more than one step, which compiles
        print(f"  speed              {speeds[len(speeds) // 2]:,.0f} tokens/s, median")
    print("  files")
    for path in sorted((ROOT / workdir).glob("[!.]*")):
        print(f"    {workdir / path.name}{'/' if path.is_dir() else ''}")
    accuracy, passages, sample = _scored_and_sampled(ROOT / workdir)
    held_out = f"{passages} held-out passages (0 shots), by chance 25 %"
    print(f"  continuations      {accuracy:.1%} of {held_out}")
    print(f"  sample             {PROMPT}{sample.rstrip()}")
    other = "laser" if attention == "standard" else "standard"
    print(f"\nCompare it with {other} attention, from the same seed and on the same rows:")
    print(f"  {_shown('scripts/quickstart.py', f'--attention={other}')}")
    print(f"  {_shown('scripts/compare_runs.py', str(workdir), f'runs/quickstart-{other}')}")


def _scored_and_sampled(workdir: Path) -> tuple[float, int, str]:
    tune_cpu()
    from eval.run import offline_score, open_model  # imports jax: after training has ended

    model = open_model(workdir)
    texts = model.generator.generate(
        model.params, [PROMPT], max_new_tokens=60, temperature=0.7, seed=0
    )
    return *offline_score(model), texts[0]


if __name__ == "__main__":
    main()
