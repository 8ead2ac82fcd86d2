"""The same prompts and scores as lm-evaluation-harness, which requirements-dev.txt brings.

scripts/check_lm_eval.py shows it on real data; here the harness gets written rows and files of all
tasks that it has, and our checkpoints as a model.
"""

import csv
import dataclasses
import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from eval.harnesses.lm_eval_adapter import LaserLM
from eval.likelihood.scoring import Scorer, encode_pairs
from eval.run import mesh_of, open_model
from eval.tasks.catalogue import TASKS
from scripts import check_lm_eval
from tests.eval.tasks.test_prompts import EXPECTED, MULTIRC, RACE, RAW, RECORD
from tests.eval.tasks.test_sources import HEAD, SCHEMAS, schema
from tests.training.runs import ROOT

RACE_PROBLEMS = [
    {"question": question, "options": options, "answer": answer}
    for question, options, answer in zip(RACE["questions"], RACE["options"], RACE["answers"])
]
# Our names → the harness's, and the written rows in the fields of the hub.
ARC_ROW = {
    "question": "What is hot?",
    "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
    "answerKey": "2",
}
HUB = {
    "arc_easy": ("arc_easy", ARC_ROW),
    "arc_challenge": ("arc_challenge", ARC_ROW),
    "boolq": ("boolq", {**RAW["boolq"], "label": 1}),
    "cb": ("cb", {**RAW["cb"], "label": 2}),
    "copa": ("copa", RAW["copa"]),
    "hellaswag": ("hellaswag", {**RAW["hellaswag"], "label": "1"}),
    "multirc": (
        "multirc",
        {
            "paragraph": MULTIRC["passage"]["text"],
            "question": "Was it dry?",
            "answer": "No",
            "label": 1,
        },
    ),
    "openbookqa": (
        "openbookqa",
        {
            "question_stem": "Fire is",
            "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
            "answerKey": "A",
        },
    ),
    "piqa": ("piqa", RAW["piqa"]),
    "race_high": ("race", {"article": RACE["article"], "problems": str(RACE_PROBLEMS)}),
    "record": (
        "record",
        {
            "passage": RECORD["passage"]["text"],
            "query": RECORD["qas"][0]["query"],
            "entities": ["Bob", "Ann"],
            "answers": ["Bob", "Bob"],
        },
    ),
    "rte": ("sglue_rte", {**RAW["rte"], "label": 1}),
    "storycloze": (
        "storycloze_2016",
        {
            **{f"input_sentence_{i}": f"S{i}." for i in range(1, 5)},
            "sentence_quiz1": "The end.",
            "sentence_quiz2": "Again.",
            "answer_right_ending": 2,
        },
    ),
    "wic": ("wic", {**RAW["wic"], "label": 0}),
    "winograd": ("wsc273", RAW["winograd"]),
    "winogrande": ("winogrande", RAW["winogrande"]),
    "wsc": (
        "wsc",
        {"text": RAW["wsc"]["text"], **RAW["wsc"]["target"], "label": 1},
    ),
}


class FirstIsBest(TemplateLM):
    """Scores candidates by their order, without a model."""

    eot_token_id = 0

    def tok_encode(self, string, add_special_tokens=None, **unused):
        return list(string.encode())

    def _loglikelihood_tokens(self, requests, **unused):
        return [(-float(i), False) for i in range(len(requests))]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


def samples(name, model):
    task, row = HUB[name]
    rows = datasets.Dataset.from_list([row])
    splits = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
    with mock.patch("datasets.load_dataset", return_value=splits):
        report = lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            num_fewshot=0,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=check_lm_eval.harness_tasks(),
        )
    return report["samples"][task][0]


@pytest.mark.parametrize("name", HUB)
def test_the_harness_asks_the_same(name):
    if name == "record":
        pytest.importorskip("transformers", reason="the harness's ReCoRD needs transformers")
    sample = samples(name, FirstIsBest())
    contexts, continuations, gold = EXPECTED[name, "lm_eval"]
    if isinstance(contexts, str):
        contexts = [contexts] * len(continuations)
    assert [tuple(pair) for pair in sample["arguments"]] == list(zip(contexts, continuations))
    metric = "em" if name == "record" else "acc"
    right = (gold == 0) != (name == "multirc")  # whose gold is inverted there
    assert sample[metric] == right


TEXTS = (
    "premise", "passage", "goal", "sentence", "text", "article", "paragraph", "sentence2",
    "ctx_b", "stem", "InputSentence4",
)  # fmt: skip


def varied(raw, number):
    """A row with `number` in its text, and one of other length."""
    if isinstance(raw, dict):
        return {
            key: f"{value} {'so it is ' * number}\u00e9\u2028{number}."
            if key in TEXTS and isinstance(value, str)
            else varied(value, number)
            for key, value in raw.items()
        }
    return raw


def write_archives(folder):
    """Six rows of every task in each of its original files."""
    for name, task in TASKS.items():
        for split in task.source.files:
            rows = [varied(RAW[name], i) for i in range(6)]
            path = folder / task.source.files[split][0].replace("*", "1")
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".txt":
                for i, row in enumerate(rows):
                    path.with_name(f"{i}.txt").write_text(json.dumps(row))
            elif path.suffix == ".csv":
                with path.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0].keys())
                    writer.writeheader()
                    writer.writerows(rows)
            elif path.suffix == ".xml":
                schemas = "".join(schema(*fields) for fields in SCHEMAS.values())
                path.write_bytes(f"{HEAD}{schemas}</collection>".encode("latin-1"))
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_prompts_and_scores_are_the_harnesss_from_the_files_on(trained_run, tmp_path, capsys):
    """The script's comparison, on written files of every task; it takes the real ones where they
    are. Without demonstrations: the prompts above, and two tasks of those below."""
    write_archives(tmp_path)
    flags = [f"--workdir={trained_run}", f"--data_dir={tmp_path}", "--shots=1"]
    code = check_lm_eval.main(flags)
    shown = capsys.readouterr().out
    without = [line.split(":")[0] for line in shown.splitlines() if "no such task" in line]
    assert without == ["race_middle", "held_out"]
    compared = len(TASKS) - 1 - shown.count("record: not compared: no package transformers")
    assert f"{compared} of {compared} tasks agree" in shown, shown
    assert code == 0
    assert f"winograd      {len(SCHEMAS):>5} documents" in shown


def few_archives(folder):
    """Of COPA and CB alone, and COPA's test split, which has no labels."""
    write_archives(folder / "all")
    for name in ("COPA", "CB"):
        (folder / "all" / name).rename(folder / name)
    unlabelled = [json.dumps({k: v for k, v in RAW["copa"].items() if k != "label"}) + "\n"]
    (folder / "copa").mkdir()
    (folder / "copa/test.jsonl").write_text("".join(unlabelled))
    return [f"--data_dir={folder}", "--tasks=copa,cb"]


def test_a_model_in_bfloat16_is_compared_in_float32(trained_run, tmp_path, capsys, monkeypatch):
    """And no split is read that the comparison does not need, as with --shots=0 that of shots."""
    data = few_archives(tmp_path)
    (tmp_path / "CB/train.jsonl").unlink()
    model = open_model(trained_run)
    half = dataclasses.replace(model.config.model, dtype="bfloat16", matmul_precision="default")
    config = dataclasses.replace(model.config, model=half)
    scorer = Scorer(half, config.data.seq_len, mesh_of(config))
    model = dataclasses.replace(model, config=config, scorer=scorer)
    monkeypatch.setattr(check_lm_eval, "open_model", lambda workdir: model)
    code = check_lm_eval.main([f"--workdir={trained_run}", *data])
    shown = capsys.readouterr().out
    assert "2 of 2 tasks agree" in shown, shown
    assert code == 0


def test_other_documents_are_one_task_that_differs(trained_run, tmp_path, capsys, monkeypatch):
    data = few_archives(tmp_path)
    original = check_lm_eval.harness

    def lacking(name, *rest):
        samples, metrics = original(name, *rest)
        return samples[: 5 if name == "copa" else None], metrics

    monkeypatch.setattr(check_lm_eval, "harness", lacking)
    code = check_lm_eval.main([f"--workdir={trained_run}", *data])
    shown = capsys.readouterr().out
    assert "copa: 6 documents, 5 in the harness: DIFFERS" in shown
    assert "1 of 2 tasks agree" in shown, shown
    assert code == 1


@pytest.fixture(scope="module")
def adapter(trained_run):
    return LaserLM(str(trained_run))


def test_an_argument_without_a_meaning_is_refused(trained_run):
    own = {"batch_size": "auto", "max_batch_size": 8, "device": "cpu"}
    with pytest.raises(ValueError, match="steps=2: unknown"):
        LaserLM.create_from_arg_string(f"workdir={trained_run},steps=2", own)
    assert LaserLM.create_from_arg_string(f"workdir={trained_run},step=2", own).model.step == 2


def instances(*arguments):
    return [Instance("loglikelihood", {}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_loglikelihood_is_the_scorers(adapter):
    pairs = [("And God said", " Let there be light"), ("", "In the"), ("the ", "sea")]
    model = adapter.model
    scores = model.scorer.score(model.params, encode_pairs(model.tokenizer, *zip(*pairs)))
    assert adapter.loglikelihood(instances(*pairs)) == [(s.logprob, s.greedy) for s in scores]


def test_rolling_scores_every_token_once(adapter):
    short = "And God said, Let there be light"
    longest = adapter.model.scorer.max_length
    assert len(adapter.model.tokenizer.encode(short)) < longest
    whole = adapter.loglikelihood(instances(("", short)))[0][0]
    text = " ".join([short] * 20)
    rolling = adapter.loglikelihood_rolling(instances((short,), (text,)))
    assert np.isclose(rolling[0], whole, rtol=1e-5)
    windows = list(adapter._windows(text))
    scored = [token for window in windows for token in window.continuation]
    assert scored == adapter.model.tokenizer.encode(text)
    assert all(1 < window.length <= longest for window in windows)
    model = adapter.model
    scores = model.scorer.score(model.params, windows)
    assert np.isclose(rolling[1], sum(score.logprob for score in scores), rtol=1e-6)


def test_generation_is_greedy_and_stops(adapter):
    prompt = "And God said"
    free = {"max_gen_toks": 12, "until": []}
    text = adapter.generate_until(instances((prompt, free)))[0]
    model = adapter.model
    (expected,) = model.generator.generate(model.params, [prompt], max_new_tokens=12)
    assert text == expected  # greedy, as without a temperature
    greedy = adapter.loglikelihood(instances((prompt, text[:6])))
    assert text
    assert greedy[0][0] < 0
    word = text[3:5]
    cut = adapter.generate_until(instances((prompt, {**free, "until": [word]}), ("x", free)))
    assert cut[0] == text[: text.index(word)]
    cold = {**free, "do_sample": False, "temperature": 0.7}  # greedy for the harness, too
    alias = {"max_new_tokens": 12, "until": None, "temperature": 0}
    assert adapter.generate_until(instances((prompt, cold), (prompt, alias))) == [text, text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"do_sample": True, "temperature": 1.0}, "only greedy"),
        ({"do_sample": True}, "only greedy"),
        ({"temperature": 0.7}, "only greedy"),
        ({"max_gen_toks": 128}, "max_gen_toks=128: the model's length is 128.* no room .*=64"),
    ],
)
def test_generation_that_would_be_another_is_refused(adapter, arguments, message):
    with pytest.raises(ValueError, match=message):
        adapter.generate_until(instances(("And God said", arguments)))


def test_the_harness_knows_the_model_by_name():
    code = (
        "from eval.harnesses import lm_eval_adapter\nfrom lm_eval.api.registry import get_model\n"
    )
    code += "print(get_model('laser').__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "LaserLM", done.stderr
