"""What evaluation costs beside the model itself: seconds for ARC's candidates, as a ratio.

    python scripts/benchmark_evaluate.py --workdir=RUN --data_dir=DATA [--candidates=1000]

Compared are a whole task (prompts, tokens, scores, choices) and the model's own forward passes, to
the final hidden states, over the same padded tokens. Both are compiled before; of some rounds the
quickest counts.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from laser.training.folders import folder_of
from laser.training.hardware import tune_cpu

if __name__ == "__main__":
    tune_cpu()  # before anything imports jax

import jax
import numpy as np
from flax import nnx

from eval.likelihood import oneshot
from eval.run import open_model
from eval.tasks.catalogue import TASKS
from models.families import structure

ROUNDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=folder_of, required=True, help="folder of the run")
    parser.add_argument("--data_dir", type=folder_of, required=True, help="as for evaluate.py")
    parser.add_argument("--candidates", type=int, default=1000)
    arguments = parser.parse_args()
    model = open_model(arguments.workdir)
    settings = oneshot.Settings("lm_eval", shots=0, limit=arguments.candidates // 4)
    data = oneshot.load_task(TASKS["arc_easy"], settings, arguments.data_dir)
    shapes: list[tuple[int, ...]] = []
    hidden = model.scorer._hidden

    def recorded(params, tokens_BT, *segment_ids_BT):
        shapes.append(tokens_BT.shape)
        return hidden(params, tokens_BT, *segment_ids_BT)

    def evaluate() -> None:
        parts = (model.scorer, model.params, model.tokenizer)
        oneshot.evaluate_task(data, settings, *parts)

    with mock.patch.object(model.scorer, "_hidden", recorded):
        evaluate()
    graph = structure(model.config.model)
    forward = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens)[0])
    batches = [np.ones(shape, np.int32) for shape in shapes]

    def run_forward() -> None:
        jax.block_until_ready([forward(model.params, batch) for batch in batches])

    run_forward()
    ours, alone = zip(*((_seconds(evaluate), _seconds(run_forward)) for _ in range(ROUNDS)))
    count = sum(len(e.choices) for e in data.loaded.examples[: settings.limit])
    tokens = sum(rows * length for rows, length in shapes)
    print(f"{count} candidates, {len(shapes)} batches, {tokens} padded tokens")
    print(f"evaluation {min(ours):.2f} s, forward passes alone {min(alone):.2f} s")
    print(f"ratio {min(ours) / min(alone):.2f}")
    return 0


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
