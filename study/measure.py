"""Measures a trained run: `python -m study.measure --run=RUN --held_out=DIR domains`.

domains        bits per byte of each file of the folder of held-out text, under the file's name
continuations  how often the model tells how a held-out passage of the Bible goes on, see
               eval/tasks/offline.py

A process of its own, because it imports jax. Writes measured.json into the run's folder.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from laser.training.folders import write_atomically
from laser.training.hardware import tune_cpu
from laser.training.run_folder import claim
from study.plan import MEASURES, held_out_files
from study.results import MEASURED


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("measures", nargs="+", choices=MEASURES)
    parser.add_argument("--held_out", type=Path)
    arguments = parser.parse_args(argv)
    try:
        texts = held_out_files(arguments.held_out) if "domains" in arguments.measures else []
        claim(arguments.run)
    except ValueError as error:
        print(f"measure.py: error: {error}", file=sys.stderr)
        return 2
    tune_cpu()
    from eval.run import offline_score, open_model

    model = open_model(arguments.run)
    measured: dict = {}
    if "continuations" in arguments.measures:
        measured["continuations"], measured["passages"] = offline_score(model)
    if texts:
        measured["domains"] = {path.stem: bits_per_byte(model, path) for path in texts}
    write_atomically(arguments.run / MEASURED, json.dumps(measured) + "\n")
    return 0


def bits_per_byte(model, path: Path) -> float:
    """Of the documents in a file, read as one stream with EOS between them, in the rows that the
    model was trained with."""
    import jax

    from eval.run import mesh_of
    from laser.training import sharding
    from laser.training.step import make_eval_step

    config = model.config
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    tokens = [model.tokenizer.eos_id]
    for ids in model.tokenizer.encode_batch(texts):
        tokens += [*ids, model.tokenizer.eos_id]
    step = jax.jit(sharding.on_mesh(mesh_of(config), make_eval_step(config)))
    eos_id = model.tokenizer.eos_id if config.data.segment_ids else None
    nll = sum(
        float(step(model.params, batch).nll)
        for batch in batches(tokens, config.training.batch_size, config.data.seq_len, eos_id)
    )
    return nll / math.log(2) / sum(len(text.encode()) for text in texts)


def batches(
    tokens: Sequence[int], batch: int, length: int, eos_id: int | None = None
) -> Iterator[dict]:
    """Rows of a stream of tokens, for a model's step; the last ones are filled up at weight 0. With
    `eos_id` its documents do not see each other."""
    import numpy as np

    from data.reading.loader import arrays_of

    targets = len(tokens) - 1
    rows = -(-targets // length)
    rows += -rows % batch
    stream = np.zeros(rows * length + 1, np.int32)
    stream[: len(tokens)] = tokens
    windows = np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length]
    valid = np.clip(targets - length * np.arange(rows), 0, length)
    for start in range(0, rows, batch):
        yield arrays_of(windows[start : start + batch], valid[start : start + batch], eos_id)


if __name__ == "__main__":
    sys.exit(main())
