"""The registered tasks under SeqIO's own Evaluator, with scores whose metric is known."""

import json

import numpy as np
import pytest
import seqio

from data.tokenizer import Tokenizer
from eval.seqio_tasks import register
from tests.eval.test_prompts import RAW


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    for archive, name in (("COPA", "copa"), ("RTE", "rte")):
        (tmp_path / archive).mkdir()
        for split in ("train", "val"):
            rows = [{**RAW[name], "premise": f"It rained {i} times."} for i in range(4)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / archive / f"{split}.jsonl").write_text(text)
    return tmp_path


@pytest.fixture
def registry():
    """Takes out again what a test registers."""
    before = set(seqio.TaskRegistry.names())
    yield seqio.TaskRegistry
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)


def test_the_evaluator_computes_the_tasks_metric(store, data_dir, registry):
    tokenizer = Tokenizer(store / "tokenizer.model")
    names, missing = register("gpt3", 1, data_dir, tokenizer_path=store / "tokenizer.model")
    assert set(names) == {"copa_gpt3_1shot", "rte_gpt3_1shot", "held_out_gpt3_1shot"}
    assert "piqa" in missing
    lengths = {"inputs": 256, "targets": 64}
    seen = []

    def score(dataset, model_feature_lengths=None):
        """The second candidate of a document is the better one, but for the first document."""
        scores = []
        for index, features in seqio.evaluation.tfds.as_numpy(dataset):
            seen.append(tokenizer.decode(features["encoder_input_tokens"]))
            document, candidate = divmod(index, 2)
            scores.append((index, -1.0 if candidate == (document > 0) else -2.0))
        return scores

    evaluator = seqio.Evaluator(
        "copa_gpt3_1shot",
        seqio.EncDecFeatureConverter(pack=False),
        eval_split="validation",
        sequence_length=lengths,
    )
    metrics, _ = evaluator.evaluate(compute_metrics=True, score_fn=score)
    found = metrics.result()["copa_gpt3_1shot"]
    assert {name: float(np.asarray(value)) for name, value in found.items()} == {"accuracy": 0.75}
    assert len(seen) == 8
    assert "\n\n" in seen[0]
    assert seen[0].endswith("It rained 0 times therefore")


def test_a_metric_that_seqio_cannot_compute_is_named_for_what_it_is(store, data_dir, registry):
    register("gpt3", 0, data_dir, tokenizer_path=store / "tokenizer.model")
    (metric,) = seqio.TaskRegistry.get("rte_gpt3_0shot").metric_fns
    places = [(document, candidate) for document in range(4) for candidate in range(2)]
    assert metric(places, [-2.0, -1.0] * 4) == {"accuracy_by_sum": 1.0}
