"""Measures a trained run: `python -m study.measure --run=RUN --held_out=DIR domains`.

domains        bits per byte of each file of the folder of held-out text, under the file's name
continuations  how often the model tells how a held-out passage of the Bible goes on, see
               eval/tasks/offline.py
oneshot        accuracy on tasks as scripts/evaluate.py has it by default: GPT-3's protocol, one
               demonstration, five draws of it. Each task is kept in RUN/eval, as there: what is
               scored already is not scored again

A process of its own, because it imports jax. Writes measured.json into the run's folder.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.addresses import told_as_os_errors
from eval.tasks.catalogue import choose_tasks
from laser.training import exits
from laser.training.folders import folder_of, write_atomically
from laser.training.hardware import tune_cpu
from laser.training.lease import claim
from study.plan import MEASURES, held_out_files
from study.results import MEASURED


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("measures", nargs="+", choices=MEASURES)
    parser.add_argument("--held_out", type=Path)
    parser.add_argument("--tasks", default="", help="of oneshot, as of scripts/evaluate.py")
    parser.add_argument("--data_dir", default="", help="where the tasks' data are")
    arguments = parser.parse_args(argv)
    tune_cpu()  # before anything imports jax
    try:
        texts = held_out_files(arguments.held_out) if "domains" in arguments.measures else []
        tasks = []
        if "oneshot" in arguments.measures:
            tasks = load_tasks(arguments.tasks.split(","), arguments.data_dir)
        claim(arguments.run)
    except ValueError as error:
        print(f"measure.py: error: {error}", file=sys.stderr)
        return exits.MISTAKE
    except OSError as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return exits.FAILED
    return _measure(arguments, texts, tasks)


def _measure(arguments: argparse.Namespace, texts: Sequence[Path], tasks: Sequence[Any]) -> int:
    from eval.run import offline_score, open_model

    model = open_model(arguments.run)
    measured: dict = {}
    if "continuations" in arguments.measures:
        measured["continuations"], measured["passages"] = offline_score(model)
    if texts:
        measured["domains"] = {path.stem: bits_per_byte(model, path) for path in texts}
    if tasks:
        scores = one_shot(arguments.run, model, tasks)
        measured["oneshot"] = {"tasks": scores, "mean": statistics.fmean(scores.values())}
    write_atomically(arguments.run / MEASURED, json.dumps(measured) + "\n")
    return 0


def load_tasks(names: Sequence[str], data_dir: str) -> list[Any]:
    """The data of one-shot tasks. Raises ValueError, as for data that are missing, and how to get
    them; OSError where they cannot be read."""
    from eval.likelihood import oneshot
    from eval.likelihood.during_training import STAND_INS

    with told_as_os_errors(data_dir):
        folder = folder_of(data_dir) if data_dir else None
        if folder and not folder.is_dir():
            raise ValueError(f"data_dir={data_dir}: no such folder")
        tasks = choose_tasks(",".join(names))
        return [oneshot.load_task(task, one_shot_settings(), folder, STAND_INS) for task in tasks]


def one_shot_settings():
    from eval.likelihood import oneshot

    return oneshot.Settings("gpt3", shots=1, seeds=oneshot.SEEDS["gpt3"])


def one_shot(run: Path, model, tasks: Sequence[Any]) -> dict[str, float]:
    """Task → the mean over the draws of its first metric, between 0 and 1.

    Raises ValueError if a candidate is longer than the model's rows.
    """
    from eval.likelihood import oneshot
    from eval.likelihood.results import ResultsFolder
    from eval.run import fingerprint

    settings, checkpoint = one_shot_settings(), fingerprint(run, model.step)
    folder = ResultsFolder(run / "eval", model.step, settings)
    scores = {}
    for data in tasks:
        prints = {"rows": data.fingerprint, "checkpoint": checkpoint}
        result = folder.finished(data.task.name)
        if result is None or result.get("fingerprints") != prints:
            parts = (model.scorer, model.params, model.tokenizer)
            result = {**oneshot.evaluate_task(data, settings, *parts), "fingerprints": prints}
            folder.save(result, records=False)
        scores[data.task.name] = result["metrics"][result["metric"]]["mean"]
    folder.save_all(checkpoint, {}, {})
    return scores


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
