"""Every task through the features of its real TFDS builder: rows that the tests write, and noise.

The builders prepare real dataset folders from the written rows, so that names, splits, types and
the encoding of labels are those of TFDS. Nothing is downloaded.
"""

import subprocess
import sys

import pytest

from eval.generation import finetuning
from eval.likelihood.oneshot import Settings, load_task
from eval.tasks import sources
from eval.tasks.catalogue import TASKS
from eval.tasks.text_to_text import PROMPTS
from tests.eval.tasks.test_prompts import MULTIRC, PASSAGE, RACE, RAW, RECORD, examples
from tests.lazily import Lazily
from tests.training.runs import ROOT

pytestmark = pytest.mark.slow  # they import TensorFlow
tfds = Lazily("tensorflow_datasets")


def flat(name, **rest):
    return {**RAW[name], "idx": 0, **rest}


ARC = {
    "id": "a",
    "question": "What is hot?",
    "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
    "answerKey": "B",
}
ANSWER = {"paragraph": "It rained.", "question": "Was it dry?", "answer": "No", "label": "True"}
STORY = {"context": "S1. S2. S3. S4.", "endings": ["The end.", "Again."], "label": 2}
ARTICLE = {**RACE, "example_id": "high1.txt"}
WINOGRAD = {
    "text": RAW["winograd"]["text"],
    "option1": "The men",
    "option1_normalized": "the men",
    "option2": "Sue",
    "option2_normalized": "Sue",
    "pronoun_start": 22,
    "pronoun_end": 26,
    "pronoun_text": "they",
    "label": 0,
    "idx": 0,
}
CHOICES = dict(zip("ABCD", ("hot", "cold", "x", "y")))  # TFDS has four
OPENBOOKQA = {
    "question_stem": "Fire is",
    "choices": {"text": list(CHOICES.values()), "label": list(CHOICES)},
    "answerKey": "A",
}
BUILT = {
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "boolq": flat("boolq", label="True"),
    "cb": flat("cb"),
    "copa": flat("copa", label="choice2"),
    "hellaswag": {
        "context": RAW["hellaswag"]["ctx"],
        "endings": RAW["hellaswag"]["endings"],
        "activity_label": "Baking",
        "label": 1,
        "split_type": "indomain",
        "source_id": "activitynet~v_1",
    },
    "multirc": {**ANSWER, "idx": {"paragraph": MULTIRC["idx"], "question": 7, "answer": 0}},
    "openbookqa": {
        "question": {
            "stem": "Fire is",
            **{f"choice_{letter}": text for letter, text in CHOICES.items()},
        },
        "fact1": "",
        "humanScore": 1.0,
        "clarity": 1.0,
        "turkIdAnonymized": "",
        "answerKey": "A",
    },
    "piqa": {"id": "", **RAW["piqa"]},
    "race_middle": ARTICLE,
    "race_high": ARTICLE,
    "record": {
        "passage": RECORD["passage"]["text"],
        "query": RECORD["qas"][0]["query"],
        "entities": ["Ann", "Bob"],
        "answers": ["Bob"],
        "idx": {"passage": 0, "query": 0},
    },
    "rte": flat("rte"),
    "storycloze": STORY,
    "wic": flat("wic", label="False", start2=2, end2=5),
    "winograd": WINOGRAD,
    "winogrande": {
        **{key: RAW["winogrande"][key] for key in ("sentence", "option1", "option2")},
        "label": "2",
    },
    "wsc": {"text": PASSAGE, **RAW["wsc"]["target"], "label": "True", "idx": 0},
}
# Noise has no _ to fill, as many answers as questions by accident alone, and labels up to 255.
NOTHING_TO_ASK = ("race_middle", "race_high", "winograd", "winogrande")
# A row of each of these without its label, as in a hidden test split.
HIDDEN = {"cb": {"label": -1}, "storycloze": {"label": -1}, "winogrande": {"label": -1}}


def build(folder, name, rows):
    """Prepares the builder's dataset with the rows in every split that the task reads."""
    source = TASKS[name].source
    splits = {source.tfds_splits.get(split, split) for split in ("train", "validation", "test")}
    builder = tfds.builder(source.tfds, data_dir=folder)
    builder._split_generators = lambda *unused, **also_unused: {
        split: [(str(i), {**row}) for i, row in enumerate(rows)] for split in splits
    }
    builder.download_and_prepare()
    return builder


@pytest.mark.parametrize("name", TASKS)
def test_rows_that_a_builder_wrote_are_asked_as_any_others(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    build(tmp_path, name, [BUILT[name]] * 2)
    for protocol in ("gpt3", "lm_eval"):
        data = load_task(TASKS[name], Settings(protocol, shots=0), None)
        raw = {"openbookqa": OPENBOOKQA}.get(name, RAW[name])
        assert data.loaded.examples == 2 * examples(name, protocol, raw)
        assert data.loaded.hidden == 0
        assert data.split == TASKS[name].protocols[protocol].split
        assert TASKS[name].source.tfds in data.loaded.origin
    if name in PROMPTS:
        (task,) = finetuning.load_tasks(name, "")
        expected = [e for row in TASKS[name].source.rows(RAW[name]) for e in PROMPTS[name](row)]
        assert task.splits == {"train": 2 * expected, "validation": 2 * expected}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_labels_are_left_out_and_counted(name, tmp_path):
    build(tmp_path, name, [BUILT[name], {**BUILT[name], **HIDDEN[name]}])
    data = load_task(TASKS[name], Settings(shots=0), tmp_path)
    assert data.loaded.hidden == 1
    assert data.loaded.examples == examples(name, "gpt3")


def test_a_split_without_labels_is_reported(tmp_path):
    build(tmp_path, "cb", [{**BUILT["cb"], **HIDDEN["cb"]}])
    with pytest.raises(ValueError, match=r"super_glue/cb validation: no label: it is hidden"):
        load_task(TASKS["cb"], Settings(shots=0), tmp_path)


def test_files_come_before_tfds(tmp_path):
    build(tmp_path, "rte", [BUILT["rte"]])
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE/val.jsonl").write_text(
        '{"premise": "a", "hypothesis": "b", "label": "entailment"}\n'
    )
    assert load_task(TASKS["rte"], Settings(shots=0), tmp_path).loaded.examples[0].golds == (0,)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("protocol", ["gpt3", "lm_eval"])
def test_noise_does_not_crash(name, protocol):
    """Random strings, spans and labels: a row becomes examples, or an error that names it."""
    source, asking = TASKS[name].source, TASKS[name].protocols[protocol]
    with tfds.testing.mock_data(num_examples=40):
        dataset = tfds.builder(source.tfds).as_dataset(split=source.tfds_splits.get("test", "test"))
        records = [sources.plain(record) for record in tfds.as_numpy(dataset)]
    assert len(records) == 40
    asked, said = 0, []
    for record in records:
        try:
            asked += len(sources.from_records(source, asking.prompt, [record], name).examples)
        except ValueError as error:
            said.append(str(error))
    assert all(line.startswith((f"{name}, row 1: ", f"{name}: no label")) for line in said)
    assert (asked > 0) == (name not in NOTHING_TO_ASK)


def test_local_files_are_read_without_tensorflow(tmp_path):
    (tmp_path / "RTE").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"RTE/{split}.jsonl").write_text(
            '{"premise": "a", "hypothesis": "b", "label": "entailment"}\n'
        )
    program = (
        "import sys\nfrom pathlib import Path\nimport eval.run\n"
        "from eval.generation import finetuning\n"
        f"finetuning.load_tasks('rte', {str(tmp_path)!r})\n"
        "from eval.likelihood.oneshot import Settings, load_task\n"
        "from eval.tasks.catalogue import TASKS\n"
        f"load_task(TASKS['rte'], Settings(shots=0), Path({str(tmp_path)!r}))\n"
        "print('tensorflow' in sys.modules or 'seqio' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr
