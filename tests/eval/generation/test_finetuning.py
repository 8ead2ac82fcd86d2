"""Fine-tuning through train.py: from a run's parameters to labels that anyone can count again."""

import dataclasses
import json
import shutil
import statistics

import jax
import numpy as np
import pytest

from data.reading.examples import Pair
from data.sealed import file_sha256, seal
from eval import opening
from eval.generation import finetuning
from eval.generation.generator import Generator
from eval.run import mesh_of, open_model, saved_steps
from eval.tasks.prompts import Example
from laser.training import flags
from laser.training.checkpoint import Checkpoints
from laser.training.rows import ExampleRows
from laser.training.run_folder import (
    load_record,
    load_run_config,
    write_run,
)
from tests.once import once
from tests.real_data import EVALDATA, needs_evaldata
from tests.training import runs

TASKS = ("copa", "cb")
STEPS_PER_EPOCH, EPOCHS = 6, 3  # 23 examples in batches of 4


def write(folder, name, count, split):
    """Rows in the original formats, whose label is not hard to guess."""
    words = ("rain", "wind", "snow", "fire")
    lines = []
    for i in range(count):
        word = words[i % 4]
        if name == "COPA":
            row = {"premise": f"The {word} came.", "question": "effect", "label": 0}
            row |= {"choice1": f"I saw {word}.", "choice2": "I slept."}
        else:
            row = {"premise": f"It was {word}.", "hypothesis": word, "label": "entailment"}
        lines.append(json.dumps({**row, "idx": i}) + "\n")
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / f"{split}.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    def make(folder):
        for name, train in (("COPA", 12), ("CB", 11)):
            write(folder, name, train, "train")
            write(folder, name, 5, "val")

    return once(tmp_path_factory, "superglue", make)


@pytest.fixture(scope="module")
def arguments(trained_run, data_dir):
    """Command line without --workdir."""
    fields = {
        "init_from": trained_run, "data.tasks_dir": data_dir, "training.epochs": EPOCHS,
        "training.batch_size": 4, "training.log_every": 1, "optimizer.warmup_steps": 2,
        "optimizer.learning_rate": 0.02,
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return [f"--config=configs/finetune.py:task={'+'.join(TASKS)}", *overrides]


@pytest.fixture(scope="module")
def finetuned(arguments, tmp_path_factory):
    def make(folder):
        done = runs.train(arguments, folder / "finetuned")
        assert done.returncode == 0, done.stderr
        assert "with the parameters of" in done.stdout
        assert "train: 23 examples" in done.stdout
        assert "best checkpoint: step" in done.stdout

    return once(tmp_path_factory, "finetuned-run", make) / "finetuned"


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def generations(workdir, step):
    path = workdir / "generations" / f"step_{step}.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def accuracies(workdir):
    """Step → decoding accuracy, as the run reported it."""
    name = "eval/decoding_accuracy"
    return {r["step"]: r[name] for r in records(workdir) if name in r}


def test_the_loss_falls_and_every_epoch_is_evaluated(finetuned):
    losses = runs.losses(finetuned)
    assert sorted(losses) == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    first, last = ([losses[i + 1] for i in part] for part in (range(3), range(15, 18)))
    assert statistics.fmean(last) < 0.3 * statistics.fmean(first)
    assert sorted(accuracies(finetuned)) == [6, 12, 18]
    assert all("eval/loss" in r for r in records(finetuned) if r["step"] == 6 and "loss" not in r)


def test_accuracies_are_those_of_the_written_generations(finetuned, data_dir):
    """Counted from the written text and the data's own labels alone."""
    labels = {
        "copa": ["choice1", "choice2"],
        "cb": None,  # the label is the text
    }
    for step, reported in accuracies(finetuned).items():
        written = generations(finetuned, step)
        per_task = []
        for task, names in labels.items():
            rows = [json.loads(x) for x in (data_dir / task.upper() / "val.jsonl").open()]
            texts = [g["generated"].strip() for g in written if g["task"] == task]
            wanted = [names[row["label"]] if names else row["label"] for row in rows]
            assert len(texts) == len(wanted) == 5
            per_task.append(statistics.fmean(a == b for a, b in zip(texts, wanted)))
        assert statistics.fmean(per_task) == reported
        assert [g["correct"] for g in written] == [
            g["generated"].strip() in g["answers"] for g in written
        ]
    assert max(accuracies(finetuned).values()) > 0.5


def test_best_and_last_are_kept_and_the_folder_is_enough(finetuned):
    scores = accuracies(finetuned)
    best = max(scores, key=lambda step: (scores[step], step))
    assert saved_steps(finetuned) == sorted({best, 18})
    config = load_run_config(str(finetuned))
    assert config.model == load_run_config(config.init_from).model
    model = open_model(finetuned, best)
    for record in generations(finetuned, best):
        (text,) = model.generator.generate(model.params, [record["prompt"]], max_new_tokens=12)
        assert text == record["generated"]


def test_a_finished_run_stays_as_it_is(finetuned, arguments, tmp_path):
    workdir = shutil.copytree(finetuned, tmp_path / "run")
    again = runs.train(arguments, workdir)
    assert again.returncode == 0
    assert "nothing left to do" in again.stdout
    assert (workdir / "metrics.jsonl").read_text() == (finetuned / "metrics.jsonl").read_text()


def test_an_interrupted_run_is_bit_equal(finetuned, arguments, tmp_path):
    """Stopped within an epoch, killed while it saves, and its origin has gone on meanwhile."""
    parts = tmp_path / "parts"
    terminated = runs.train(arguments, parts, event=runs.SIGTERM_AFTER_7)
    assert terminated.returncode == 75, terminated.stderr
    killed = runs.train(arguments, parts, event=runs.KILL_IN_SAVE)
    assert killed.returncode == -9, killed.stderr
    resumed = runs.train(arguments, parts)
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 7" in resumed.stdout
    assert runs.losses(parts) == runs.losses(finetuned)
    assert accuracies(parts) == accuracies(finetuned)
    for step in (6, 12, 18):
        assert generations(parts, step) == generations(finetuned, step)
    assert saved_steps(parts)[-1] == 18
    ours, theirs = (open_model(folder, 18).params for folder in (parts, finetuned))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_any_answer_fits_behind_the_longest_prompt(trained_run):
    """Rows are no longer than they need be, and a model may answer what another example has."""
    config = load_run_config(str(trained_run))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=512))
    model = open_model(trained_run)
    count = len(model.tokenizer.encode("the sea, " * 9)) // 9
    long = Pair("the sea, " * (124 // count), (" no",))
    pairs = [long, Pair("It was:", (" an entailment of all that",))]
    rows = ExampleRows(config, trained_run / "tokenizer.model", pairs, pairs)
    assert len(model.tokenizer.encode(long.prompt)) + 2 <= 128  # with this example's own answer
    assert rows.row_length(config) == 128
    length = rows.validation.longest_decoded
    assert length > 128
    generator = Generator(config.model, model.tokenizer, mesh_of(config), max_length=length)
    decoded = {"max_new_tokens": rows.validation.max_target}
    assert len(generator.generate(model.params, rows.validation.prompts, **decoded)) == 2


def refused(arguments, workdir, message):
    done = runs.train(arguments, workdir)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_another_origin_is_refused(finetuned, arguments, trained_run, tmp_path):
    other = shutil.copytree(trained_run, tmp_path / "other")
    workdir = shutil.copytree(finetuned, tmp_path / "run")
    refused([*arguments, f"--config.init_from={other}"], workdir, f"-> {other}")


@pytest.mark.slow
def test_what_does_not_fit_is_refused(arguments, trained_run, store, tmp_path):
    empty = shutil.copytree(trained_run, tmp_path / "empty")
    shutil.rmtree(empty / "checkpoints")
    refused([*arguments, f"--config.init_from={empty}"], tmp_path / "run", "no checkpoint yet")
    other = shutil.copytree(trained_run, tmp_path / "other")
    (tmp_path / "model").write_bytes(b"another one")
    record = load_record(str(other)) | {"tokenizer": file_sha256(tmp_path / "model")}
    write_run(other, seal(record), tmp_path / "model")
    fields = ("training.steps=4", "optimizer.warmup_steps=1")
    stored = [
        "--config=configs/finetune.py",
        f"--config.data.store={store}",
        "--config.data.tasks=",
        "--config.checkpoint.best=loss",
        *(f"--config.{field}" for field in fields),
        "--config.training.epochs=0",
    ]
    refused([*stored, f"--config.init_from={other}"], tmp_path / "run", "its tokenizer is not")
    wide = [*arguments, "--config.model.mlp_dim=128"]
    other = "blocks/mlp/down is float32[2,64,32] there and float32[2,128,32] here"
    refused(wide, tmp_path / "run", other)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_pretraining_goes_on_from_a_run_on_other_rows(trained_run, store, tmp_path):
    """The same init_from with a store: for continued pretraining."""
    arguments = [
        "--config=configs/finetune.py",
        f"--config.init_from={trained_run}",
        f"--config.data.store={store}",
        "--config.data.tasks=",
        "--config.checkpoint.best=loss",
        "--config.training.epochs=1",
        "--config.training.batch_size=64",
        "--config.optimizer.warmup_steps=0",
    ]
    done = runs.train(arguments, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    config, _ = flags.parse(["train.py", *arguments], lambda values: None)
    begun, _ = opening.open_run(config, str(tmp_path / "begun"), False)
    with Checkpoints(begun.workdir, config.checkpoint) as checkpoints:
        state = begun.first_state(checkpoints)
    jax.tree.map(np.testing.assert_array_equal, state.params, open_model(trained_run).params)
    assert int(state.step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize(
    ("names", "folder", "message"),
    [
        ("copaa", None, "data.tasks=copaa: unknown task 'copaa'; did you mean 'copa'"),
        ("copa,rte", None, "no train split of super_glue/rte (RTE/train.jsonl or"),
        ("copa", "/nowhere", "data.tasks=copa: data.tasks_dir=/nowhere: no such folder"),
    ],
)
def test_mistakes_are_explained(names, folder, message, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError) as error:
        finetuning.load_tasks(names, folder or str(data_dir))
    assert message in str(error.value)


def example(answer, others, **rest):
    choices = (answer, *others)
    return Example(
        contexts=("q:",) * len(choices),
        continuations=tuple(f" {choice}" for choice in choices),
        choices=choices,
        golds=(0,),
        shot="",
        **rest,
    )


def test_judging_takes_any_answer_and_the_mean_over_tasks():
    tasks = [
        finetuning.TextTask("rte", {"validation": [example("yes", ["no"])] * 4}),
        finetuning.TextTask(
            "record", {"validation": [example("Bob", ["Ann"], answers=("Bob", "Bobby"))] * 2}
        ),
    ]
    generated = [" yes", "yes", " no", " yes indeed", " Bobby", " Ann"]
    found, metrics = finetuning.judge(tasks, ["q:"] * 6, generated)
    assert [record["correct"] for record in found] == [True, True, False, False, True, False]
    assert found[4]["answers"] == ["Bob", "Bobby"]
    assert metrics == {
        "eval/rte/decoding_accuracy": 0.5,
        "eval/record/decoding_accuracy": 0.5,
        "eval/decoding_accuracy": 0.5,
    }
    (pair,) = finetuning.pairs([tasks[1]], "validation")[:1]
    assert pair.answers == (" Bob", " Bobby")


@needs_evaldata
def test_the_real_data_have_their_numbers_of_examples():
    tasks = finetuning.load_tasks("copa,cb,rte,multirc", str(EVALDATA))
    counts = {t.name: tuple(len(t.splits[s]) for s in finetuning.SPLITS) for t in tasks}
    assert counts == {
        "copa": (400, 100), "cb": (250, 56), "rte": (2490, 277), "multirc": (27243, 4848),
    }  # fmt: skip
