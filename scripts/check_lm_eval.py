"""Shows that our scores are lm-evaluation-harness's, document by document.

    python scripts/check_lm_eval.py --workdir=RUN --data_dir=DATA [--shots=1] [--tasks=cb,copa]

The harness (0.4.13, requirements-eval.txt) makes its own prompts from the same files, cuts them
into tokens by its own code, and has them scored by the oracle attention and a float64 softmax. The
model is computed in float32 on both sides, whatever its config says: two ways to sum in bfloat16
differ by more than what is looked for.
Compared are prompts and candidates to the byte, log-likelihoods, and metrics, for all tasks of
evaluate.py that the harness has and that have files in --data_dir. Exit code 0 if all agree, 1 if
one differs, 2 for bad input, or if there was nothing to compare.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")

from laser.training.folders import folder_of
from laser.training.hardware import tune_cpu


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=folder_of, required=True, help="folder of the run")
    parser.add_argument("--data_dir", type=folder_of, required=True, help="as for evaluate.py")
    parser.add_argument("--tasks", default="all", help="as for evaluate.py")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--limit", type=int, help="documents of each task")
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # --help needs nothing of what follows
    tune_cpu()  # before anything imports jax

try:
    import datasets
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    print(
        f"check_lm_eval.py: error: no package {error.name}: pip install -r requirements-eval.txt",
        file=sys.stderr,
    )
    sys.exit(2)

import jax
import numpy as np
from flax import nnx

from eval.harnesses import hub
from eval.likelihood import oneshot
from eval.likelihood.scoring import Scorer
from eval.run import TrainedModel, mesh_of, open_model
from eval.tasks import sources
from eval.tasks.catalogue import TASKS, choose_tasks
from laser.training.checkpoint import CheckpointError
from models.families import structure

HARNESS_NAMES = {
    "race_high": "race",
    "rte": "sglue_rte",
    "storycloze": "storycloze_2016",
    "winograd": "wsc273",
}
# Those of the harness's folders that have our tasks.
FOLDERS = (
    "arc", "hellaswag", "openbookqa", "piqa", "race", "storycloze", "super_glue", "winogrande",
    "wsc273",
)  # fmt: skip
# Ours → theirs, where CB's and ReCoRD's F1 have one name.
METRICS = {"accuracy": "acc", "acc_norm": "acc_norm", "macro_f1": "f1", "em": "em", "f1": "f1"}
TOLERANCE = 1e-4  # nats, of a document's log-likelihood
ROWS, ROW_STEP = 8, 64  # rows of the oracle's batches, whose lengths are multiples of the step


def harness_tasks() -> TaskManager:
    """Its tasks of ours; to list all 10,000 that it has takes seconds."""
    folder = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_path=[folder / name for name in FOLDERS], include_defaults=False)


def in_float32(model: TrainedModel) -> TrainedModel:
    """The same, with a scorer whose activations and products are float32."""
    exact = dataclasses.replace(model.config.model, dtype="float32", matmul_precision="highest")
    config = dataclasses.replace(model.config, model=exact)
    scorer = Scorer(exact, config.data.seq_len, mesh_of(config))
    return dataclasses.replace(model, config=config, scorer=scorer)


class OracleLM(TemplateLM):
    """The harness's own way from text to tokens, and the plainest way from those to a score."""

    def __init__(self, model: TrainedModel):
        super().__init__()
        self._model = model
        attention = dataclasses.replace(model.config.model.attention, implementation="reference")
        graph = structure(dataclasses.replace(model.config.model, attention=attention))

        @jax.jit
        def logits(params, tokens_BT):
            network = nnx.merge(graph, params)
            return network.logits(network(tokens_BT)[0])

        self._logits = logits

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        start = [] if add_special_tokens is False else [self.eot_token_id]
        return start + self._model.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        longest = self._model.scorer.max_length
        kept = [(context + text)[-(longest + 1) :][:-1] for _, context, text in requests]
        order = sorted(range(len(requests)), key=lambda i: len(kept[i]))
        results: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), ROWS):
            part = order[start : start + ROWS]
            tokens_BT = np.zeros((ROWS, -(-len(kept[part[-1]]) // ROW_STEP) * ROW_STEP), np.int32)
            for row, i in zip(tokens_BT, part):
                row[: len(kept[i])] = kept[i]
            logits_BTV = np.asarray(self._logits(self._model.params, tokens_BT))
            for logits_TV, i in zip(logits_BTV, part):
                results[i] = _score(logits_TV[: len(kept[i])], requests[i][2])
        return [results[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm: bool = False):
        raise NotImplementedError


def _score(logits_TV: np.ndarray, continuation: Sequence[int]) -> tuple[float, bool]:
    logits_CV = logits_TV[-len(continuation) :].astype(np.float64)
    largest_C1 = logits_CV.max(axis=-1, keepdims=True)
    normaliser_C = np.log(np.exp(logits_CV - largest_C1).sum(axis=-1)) + largest_C1[:, 0]
    targets_C = logits_CV[np.arange(len(continuation)), list(continuation)]
    greedy = bool((logits_CV.argmax(axis=-1) == np.array(continuation)).all())
    return float((targets_C - normaliser_C).sum()), greedy


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return _main(arguments)
    except (OSError, ValueError, CheckpointError) as error:
        print(f"check_lm_eval.py: error: {error}", file=sys.stderr)
        return 2


def _main(arguments: argparse.Namespace) -> int:
    tasks = choose_tasks(arguments.tasks)
    settings = oneshot.Settings("lm_eval", arguments.shots, limit=arguments.limit)
    if not arguments.data_dir.is_dir():
        raise ValueError(f"data_dir={arguments.data_dir}: no such folder")
    model = in_float32(open_model(arguments.workdir))
    oracle, manager = OracleLM(model), harness_tasks()
    agree = []
    for name in (task.name for task in tasks):
        if name not in hub.ROWS:
            print(f"{name}: the harness has no such task")
            continue
        try:
            data = oneshot.load_task(TASKS[name], settings, arguments.data_dir)
            with offline_datasets(name, arguments.data_dir, settings.shots):
                theirs = harness(name, settings, oracle, manager)
        except sources.MissingData as error:
            print(f"{name}: not compared: {error}")
            continue
        except ModuleNotFoundError as error:
            words = "pip install -r requirements-eval.txt"
            print(f"{name}: not compared: no package {error.name}: {words}")
            continue
        except ValueError as error:
            print(f"{name}: {error}: DIFFERS")
            agree.append(False)
            continue
        agree.append(compare(data, settings, model, *theirs))
    print(f"{sum(agree)} of {len(agree)} tasks agree")
    return 2 if not agree else 0 if all(agree) else 1


def compare(
    data: oneshot.TaskData,
    settings: oneshot.Settings,
    model: TrainedModel,
    theirs: list[dict[str, Any]],
    their_metrics: dict[str, float],
) -> bool:
    """Prints one line on a task, and returns whether everything agrees with the harness's."""
    ours: list[dict[str, Any]] = []
    name = data.task.name
    result = oneshot.evaluate_task(
        data, settings, model.scorer, model.params, model.tokenizer, on_record=ours.append
    )
    if len(ours) != len(theirs):
        print(f"{name}: {len(ours)} documents, {len(theirs)} in the harness: DIFFERS", flush=True)
        return False
    bytes_differ = sum(rendered(a) != b["pairs"] for a, b in zip(ours, theirs))
    gaps = [
        abs(candidate["logprob"] - logprob)
        for a, b in zip(ours, theirs)
        for candidate, logprob in zip(a["candidates"], b["logprobs"])
    ]
    shown, equal = compare_metrics(name, result["metrics"], their_metrics)
    agree = not bytes_differ and max(gaps) <= TOLERANCE and equal
    counts = f"{len(ours):>5} documents, {len(gaps):>5} candidates"
    found = f"{bytes_differ} prompts differ, largest gap {max(gaps):.1e} nats, {shown}"
    print(f"{name:<13} {counts}: {found}: {'ok' if agree else 'DIFFERS'}", flush=True)
    return agree


def rendered(record: dict[str, Any]) -> list[tuple[str, str]]:
    """(context, continuation) of each candidate of a record."""
    endings, contexts = record["continuations"], record["context"]
    return list(zip([contexts] * len(endings) if isinstance(contexts, str) else contexts, endings))


def compare_metrics(name: str, ours: dict[str, Any], theirs: dict[str, float]) -> tuple[str, bool]:
    """Each metric that the harness reports, as words, and whether all are equal."""
    shown, equal = [], True
    for ours_name, their_name in METRICS.items():
        if ours_name in ours and their_name in theirs:
            value, other = ours[ours_name]["mean"], theirs[their_name]
            other = 1 - other if name == "multirc" else other  # its gold is inverted
            equal &= abs(value - other) < 1e-12
            shown.append(f"{their_name} {100 * value:.2f}/{100 * other:.2f}")
    return " ".join(shown), equal and bool(shown)


def harness(
    name: str, settings: oneshot.Settings, lm: TemplateLM, manager: TaskManager
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The harness's documents in order, with pairs and log-probabilities, and its metrics."""
    task = HARNESS_NAMES.get(name, name)
    report = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task],
        num_fewshot=settings.shots,
        limit=settings.limit,
        fewshot_random_seed=oneshot.FIRST_SEED,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=manager,
    )
    samples = [
        {
            "pairs": [tuple(pair) for pair in _arguments(sample["arguments"])],
            "logprobs": [response[0] for response in sample["filtered_resps"]],
        }
        for sample in sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
    ]
    metrics = report["results"][task]
    return samples, {
        key.removesuffix(",none"): value for key, value in metrics.items() if ",none" in key
    }


def _arguments(arguments: Any) -> list[Any]:
    """Of the two forms in which the harness logs them."""
    if isinstance(arguments, dict):
        return [tuple(pair.values()) for pair in arguments.values()]
    return list(arguments)


@contextlib.contextmanager
def offline_datasets(name: str, data_dir: Path, shots: int) -> Iterator[None]:
    """Gives the harness our files, in the fields of the data sets on the hub: those of the splits
    that it asks for alone, as others may have no labels."""
    source, asking = TASKS[name].source, TASKS[name].protocols["lm_eval"]

    def rows(split: str) -> datasets.Dataset:
        files = sources.find_files(source, split, data_dir)
        if not files:
            raise sources.MissingData(f"its files are not in {data_dir}")
        return datasets.Dataset.from_list(hub.read(name, files))

    # Where the split that is asked for is not there, the nearest one stands in, as for ours.
    splits = {asking.split: rows(sources.available_split(source, asking.split, data_dir))}
    if asking.shots not in splits:
        # The harness opens the split of demonstrations even where it draws none.
        splits[asking.shots] = rows(asking.shots) if shots else splits[asking.split]
    with mock.patch("datasets.load_dataset", return_value=datasets.DatasetDict(splits)):
        yield


if __name__ == "__main__":
    sys.exit(main())
