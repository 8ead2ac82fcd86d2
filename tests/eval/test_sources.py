"""Data in their original layouts and through TFDS, and what is said of data that are wrong."""

import json
from pathlib import Path

import pytest

from eval import sources
from eval.tasks import OFFLINE, TASKS
from tests.eval.test_prompts import RACE, RAW, examples

# Where the archives put the evaluated split, unpacked in the data folder.
ARCHIVES = {
    "arc_easy": "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl",
    "arc_challenge": "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Test.jsonl",
    "boolq": "BoolQ/val.jsonl",
    "cb": "CB/val.jsonl",
    "copa": "COPA/val.jsonl",
    "hellaswag": "hellaswag_val.jsonl",
    "multirc": "MultiRC/val.jsonl",
    "openbookqa": "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl",
    "record": "ReCoRD/val.jsonl",
    "rte": "RTE/val.jsonl",
    "wic": "WiC/val.jsonl",
    "winogrande": "winogrande_1.1/dev.jsonl",
    "wsc": "WSC/val.jsonl",
}


def load(name, folder, split=None):
    asking = TASKS[name].protocols["gpt3"]
    split = split or sources.available_split(TASKS[name].source, asking.split, folder)
    return sources.load(TASKS[name].source, split, asking.prompt, folder)


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_read_as_they_are_unpacked(name, tmp_path):
    raw = {"idx": 0, **RAW[name]}
    write(tmp_path / ARCHIVES[name], raw, raw)
    loaded = load(name, tmp_path)
    assert loaded.examples == 2 * examples(name, "gpt3")
    assert loaded.origin == str(tmp_path / ARCHIVES[name])


def test_piqas_labels_lie_beside_its_rows(tmp_path):
    raw = {key: value for key, value in RAW["piqa"].items() if key != "label"}
    rows = write(tmp_path / "physicaliqa-train-dev/dev.jsonl", raw, raw)
    labels = rows.with_name("dev-labels.lst")
    labels.write_text("0\n1\n")
    assert [e.golds for e in load("piqa", tmp_path).examples] == [(0,), (1,)]
    labels.write_text("0\n")
    with pytest.raises(ValueError, match=r"has 1 labels, and none for .*dev\.jsonl:2"):
        load("piqa", tmp_path)


def test_race_has_a_file_for_each_article(tmp_path):
    for name in ("10.txt", "9.txt"):
        write(tmp_path / "RACE/test/high" / name, {**RACE, "article": name})
    loaded = load("race_high", tmp_path)
    assert len(loaded.examples) == 6
    assert loaded.examples[0].contexts[0].startswith("Article: 9.txt")


def test_storycloze_is_a_csv(tmp_path):
    raw = RAW["storycloze"]
    lines = [",".join(raw), ",".join(raw.values())]
    path = tmp_path / "cloze_test_test__spring2016.csv"
    path.write_text("\n".join(lines) + "\n")
    assert load("storycloze", tmp_path).examples == examples("storycloze", "gpt3")
    path.write_text("\n".join([*lines, lines[1][:-1] + "3"]) + "\n")
    with pytest.raises(ValueError, match=r"spring2016.csv:3: label 2 is out of range"):
        load("storycloze", tmp_path)


SCHEMA = """<schema><text><txt1>The men told Sue that</txt1><pron>they</pron>
<txt2>lost her
 keys.</txt2></text><answers><answer>The men</answer><answer> Sue </answer></answers>
<correctAnswer>A.</correctAnswer></schema>"""


def test_winograd_is_the_first_273_schemas_of_the_collection(tmp_path):
    path = tmp_path / "WSCollection.xml"
    path.write_text(f"<collection>{SCHEMA * 275}</collection>")
    loaded = load("winograd", tmp_path)
    assert loaded.examples == 273 * examples("winograd", "gpt3")
    path.write_text(f"<collection>{SCHEMA}{SCHEMA.replace('A.', 'C.')}</collection>")
    with pytest.raises(ValueError, match="schema 2: no label"):
        load("winograd", tmp_path)
    path.write_text("<collection>")
    with pytest.raises(ValueError, match="not valid XML"):
        load("winograd", tmp_path)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("copa", {"label": 2}, "label 2 is out of range: there are 2 candidates"),
        ("copa", {"choice1": " "}, "candidate 0 is empty"),
        ("copa", {"label": None}, "no label"),
        ("cb", {"label": "maybe"}, "label='maybe': must be one of entailment"),
        ("cb", {"label": 3}, "label 3 is out of range"),
        ("boolq", {"label": "si"}, "label -1 is out of range"),
        ("winogrande", {"answer": "3"}, "label 2 is out of range"),
        ("winogrande", {"sentence": "Nothing."}, "there is no _ in it"),
        ("hellaswag", {"endings": ["one"], "label": 0}, "1 candidates: at least 2"),
        ("rte", {"premise": None}, "premise"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(name, change, message, tmp_path):
    path = write(tmp_path / ARCHIVES[name], RAW[name], {**RAW[name], **change})
    if change == {"premise": None}:
        path.write_text(json.dumps({"hypothesis": "x", "label": "entailment"}) + "\n")
        message, line = "the field 'premise' is missing", 1
    else:
        line = 2
    with pytest.raises(ValueError) as error:
        load(name, tmp_path)
    assert f"{path}:{line}: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [('{"premise": "a", ', "not valid JSON"), ("[1]", "expected dict, got list")],
)
def test_a_corrupt_line_is_named(text, message, tmp_path):
    path = write(tmp_path / "CB/val.jsonl", RAW["cb"])
    path.write_text(f"{path.read_text()}\n{text}\n")
    with pytest.raises(ValueError) as error:
        load("cb", tmp_path)
    assert str(error.value).startswith(f"{path}:3: {message}")


def test_an_empty_file_is_named(tmp_path):
    path = write(tmp_path / "CB/val.jsonl")
    with pytest.raises(ValueError, match="no example in it"):
        load("cb", tmp_path)
    assert path.exists()


def test_two_files_for_one_split_are_refused(tmp_path):
    for name in ("a_val.jsonl", "b_val.jsonl"):
        write(tmp_path / "cb" / name, RAW["cb"])
    with pytest.raises(ValueError, match="which one is the validation split"):
        load("cb", tmp_path)


def test_missing_data_are_reported_with_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for task in TASKS.values():
        with pytest.raises(sources.MissingData) as error:
            sources.available_split(task.source, "validation", tmp_path)
        assert str(tmp_path) in str(error.value)
        assert "http" in str(error.value)


def test_the_nearest_split_stands_in(tmp_path):
    source = TASKS["arc_easy"].source
    write(tmp_path / "arc_easy/train.jsonl", RAW["arc_easy"])
    assert sources.available_split(source, "test", tmp_path) == "train"
    write(tmp_path / "arc_easy/validation.jsonl", RAW["arc_easy"])
    assert sources.available_split(source, "test", tmp_path) == "validation"
    write(tmp_path / "arc_easy/test.jsonl", RAW["arc_easy"])
    assert sources.available_split(source, "test", tmp_path) == "test"


def test_the_offline_task_is_made_of_held_out_text():
    from data import corpus

    asking = OFFLINE.protocols["gpt3"]
    loaded = sources.load(OFFLINE.source, "validation", asking.prompt, None)
    assert len(loaded.examples) == 300
    assert sources.load(OFFLINE.source, "validation", asking.prompt, None) == loaded
    train = "".join(corpus.documents("train"))
    chapters = [chapter.text for chapter in corpus.chapters() if chapter.held_out]
    for example in loaded.examples:
        context, gold = example.contexts[0], example.golds[0]
        assert context not in train
        (chapter,) = (text for text in chapters if context in text)
        words = " ".join(chapter.split())
        assert " ".join((context + example.continuations[gold]).split()) in words
        wrong = [text for i, text in enumerate(example.continuations) if i != gold]
        assert len(wrong) == 3
        assert not any(" ".join(text.split()) in words for text in wrong)
    assert {example.golds for example in loaded.examples} == {(0,), (1,), (2,), (3,)}


EVALDATA = Path(__file__).resolve().parents[3] / "shared" / "evaldata"


@pytest.mark.skipif(not EVALDATA.is_dir(), reason="the real data are not here")
@pytest.mark.parametrize(
    "name, split, count",
    [
        ("arc_easy", "validation", 570),
        ("arc_easy", "train", 500),
        ("cb", "validation", 56),
        ("copa", "train", 400),
        ("multirc", "validation", 4848),
        ("record", "train", 32),
        ("rte", "validation", 277),
        ("winogrande", "validation", 1267),
        ("winogrande", "train", 500),
    ],
)
def test_real_data_are_read_whole(name, split, count):
    for protocol in ("gpt3", "lm_eval"):
        prompt = TASKS[name].protocols[protocol].prompt
        assert len(sources.load(TASKS[name].source, split, prompt, EVALDATA).examples) == count
