"""The registered tasks under SeqIO's own Evaluator, with scores whose metric is known."""

import json

import numpy as np
import pytest

from data.tokenizer import Tokenizer
from tests.eval.tasks.test_prompts import RAW
from tests.lazily import Lazily

pytestmark = pytest.mark.slow  # they import TensorFlow
seqio, seqio_tasks = Lazily("seqio"), Lazily("eval.harnesses.seqio_tasks")


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
    registries = (seqio.TaskRegistry, seqio.MixtureRegistry)
    before = [set(registry.names()) for registry in registries]
    yield seqio.TaskRegistry
    for registry, names in zip(registries, before):
        for name in set(registry.names()) - names:
            registry.remove(name)


def test_the_evaluator_computes_the_tasks_metric(store, data_dir, registry):
    tokenizer = Tokenizer(store / "tokenizer.model")
    names, missing = seqio_tasks.register(
        "gpt3", 1, data_dir, tokenizer_path=store / "tokenizer.model"
    )
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
    seqio_tasks.register("gpt3", 0, data_dir, tokenizer_path=store / "tokenizer.model")
    (metric,) = seqio.TaskRegistry.get("rte_gpt3_0shot").metric_fns
    places = [(document, candidate) for document in range(4) for candidate in range(2)]
    assert metric(places, [-2.0, -1.0] * 4) == {"accuracy_by_sum": 1.0}


def test_superglue_is_a_mixture_for_training_and_a_metric_for_its_answers(
    store, data_dir, registry
):
    path = store / "tokenizer.model"
    tokenizer = Tokenizer(path)
    (data_dir / "RTE" / "train.jsonl").write_text(
        (data_dir / "RTE" / "train.jsonl").read_text() * 3
    )
    names, missing = seqio_tasks.register_text_to_text(data_dir, path)
    assert names == ["copa_text_to_text", "rte_text_to_text"]
    assert "boolq" in missing
    mixture = seqio.get_mixture_or_task(seqio_tasks.MIXTURE)
    assert [mixture.get_rate(task) for task in mixture.tasks] == [4, 12]
    dataset = mixture.get_dataset({"inputs": 256, "targets": 16}, "train", seed=0, num_epochs=1)
    rows = list(dataset.as_numpy_iterator())
    texts = [tokenizer.decode(row["inputs"]) + tokenizer.decode(row["targets"]) for row in rows]
    assert {text.rpartition("\n")[2] for text in texts} == {"copa: choice2", "rte: not_entailment"}
    assert len(texts) == 16
    assert all(row["targets"][-1] == tokenizer.eos_id for row in rows)

    def predict(dataset, model_feature_lengths=None):
        """Right for the first three of four."""
        wanted = [tokenizer.encode(text) for text in (" not_entailment", " entailment")]
        longest = max(map(len, wanted))  # SeqIO makes an array of them
        wanted = [[*ids, *[tokenizer.eos_id] * (longest - len(ids))] for ids in wanted]
        indices = [int(index) for index, _ in seqio.evaluation.tfds.as_numpy(dataset)]
        return [(index, wanted[index == 3]) for index in indices]

    evaluator = seqio.Evaluator(
        "rte_text_to_text",
        seqio.EncDecFeatureConverter(pack=False),
        eval_split="validation",
        sequence_length={"inputs": 256, "targets": 16},
    )
    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    (value,) = metrics.result()["rte_text_to_text"].values()
    assert float(np.asarray(value)) == 0.75
