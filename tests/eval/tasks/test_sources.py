"""Data in their original layouts and through TFDS, and what is said of data that are wrong."""

import json
import os
import subprocess
import sys

import pytest

from eval.tasks import sources
from eval.tasks.catalogue import OFFLINE, TASKS
from tests import buckets
from tests.eval.tasks.test_prompts import RACE, RAW, examples
from tests.real_data import EVALDATA, needs_evaldata
from tests.training.runs import ROOT

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


def load(name, folder, split=None, protocol="gpt3"):
    asking = TASKS[name].protocols[protocol]
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
    labels.write_text("0\n1\n1\n")
    with pytest.raises(ValueError, match=r"has 3 labels for the 2 rows of .*dev\.jsonl"):
        load("piqa", tmp_path)
    labels.write_text("0\n")
    with pytest.raises(ValueError, match=r"has 1 labels, and none for .*dev\.jsonl:2"):
        load("piqa", tmp_path)
    labels.write_bytes(b"0\n\xff\n")
    with pytest.raises(ValueError, match=r"dev-labels\.lst: not UTF-8"):
        load("piqa", tmp_path)


def test_winograndes_files_of_labels_say_what_its_rows_say(tmp_path):
    """The archive has both; these labels count from 1, unlike PIQA's."""
    one = {**RAW["winogrande"], "answer": "1"}
    rows = write(tmp_path / "winogrande_1.1/dev.jsonl", RAW["winogrande"], one)
    rows.with_name("dev-labels.lst").write_text("2\n1\n")
    assert [e.golds for e in load("winogrande", tmp_path).examples] == [(1,), (0,)]


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


def schema(before, pronoun, after, answers, correct):
    """As in Davis's file: line breaks and blanks anywhere, optional parts, a quotation."""
    options = "".join(f"<answer>\n {answer} </answer>" for answer in answers)
    return (
        f"<schema>\n<text>\n<txt1>\n{before}</txt1>\n<pron> {pronoun}  </pron>\n<txt2>{after}\n"
        f"</txt2>\n</text>\n<quote>\n<pron>{pronoun}</pron>\n<quote2>x</quote2>\n</quote>\n"
        f"<answers>{options}</answers>\n<correctAnswer> {correct}  </correctAnswer>\n"
        "<source>(Winograd 1972)</source>\n</schema>\n\n"
    )


HEAD = '<?xml version="1.0" encoding="ISO-8859-1"?>\n<collection>\n\n'
SCHEMAS = {
    "plain": ("The men told Sue that", "they", " lost her\n keys. ", ["The men", " Sue"], "A."),
    "one character is left": ("The boys hit Al,\nso I hit ", "them", ".", ["The boys", "Al"], "A"),
    "it begins": ("", "He", " saw Ren\xe9 &amp; left.", ["The man", "Ren\xe9"], " B "),
    "a clause follows": ("Ann saw Eve. When", "her", ", too, ran", ["Ann", "Eve"], "B."),
}  # fmt: skip
# (context, continuation) of both candidates, in `lm_eval` and in `gpt3`. The harness's come from
# the hub's fields: text, all parts joined by blanks; pronoun_loc; options.
WINOGRAD = {
    "plain": (
        ["The men told Sue that the men", "The men told Sue that Sue"],
        ["  lost her keys.", " lost her keys."],
    ),
    "one character is left": (
        ["The boys hit Al, so I hit the boys", "The boys hit Al, so I hit Al"],
        ["  .", "."],
    ),
    "it begins": (
        ["the man", "Ren\xe9"],
        ["  saw Ren\xe9 & left.", " saw Ren\xe9 & left."],
    ),
    "a clause follows": (
        ["Ann saw Eve. When Ann's", "Ann saw Eve. When Eve's"],
        ["  , too, ran", ", too, ran"],
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_winograd_is_read_from_the_collection(name, tmp_path):
    text = f"{HEAD}{schema(*SCHEMAS[name])}</collection>"
    (tmp_path / "WSCollection.xml").write_bytes(text.encode("latin-1"))
    contexts, endings = WINOGRAD[name]
    for protocol, ending in zip(("lm_eval", "gpt3"), endings):
        (example,) = load("winograd", tmp_path, protocol=protocol).examples
        expected = contexts
        if (name, protocol) == ("it begins", "gpt3"):  # the harness alone looks at no capital there
            expected = ["The man", "Ren\xe9"]
        assert list(example.contexts) == expected
        assert example.continuations == (ending, ending)
        assert example.golds == ("AB".index(SCHEMAS[name][4].strip()[0]),)


def test_winograd_is_the_first_273_schemas_of_the_collection(tmp_path):
    path = tmp_path / "WSCollection.xml"
    one = schema(*SCHEMAS["plain"])
    path.write_text(f"<collection>{one * 275}</collection>")
    loaded = load("winograd", tmp_path)
    assert loaded.examples == 273 * examples("winograd", "gpt3")
    assert loaded.place(1) == f"{path}, schema 2"
    path.write_text(f"<collection>{one}{one.replace('A.', 'C.')}</collection>")
    with pytest.raises(ValueError, match="schema 2: no label"):
        load("winograd", tmp_path)
    path.write_text("<collection>")
    with pytest.raises(ValueError, match="not valid XML"):
        load("winograd", tmp_path)


def parquet(path, rows):
    from pyarrow import Table
    from pyarrow import parquet as writer

    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(Table.from_pylist(rows), path)


PROBLEMS = [
    {"question": question, "options": options, "answer": answer}
    for question, options, answer in zip(RACE["questions"], RACE["options"], RACE["answers"])
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", ["a row per article", "a row per question"])
def test_race_is_read_as_the_hub_has_it(kind, layout, tmp_path):
    """EleutherAI/race, which the harness reads, and ehovy/race."""
    articles = [{**RACE, "article": name} for name in ("First.", "Second.")]
    if layout == "a row per article":
        rows = [{"article": a["article"], "problems": str(PROBLEMS)} for a in articles]
    else:
        rows = [
            {"example_id": f"{i}.txt", "article": article["article"], **problem}
            for i, article in enumerate(articles)
            for problem in PROBLEMS
        ]
    if kind == "jsonl":
        write(tmp_path / "race_high/test.jsonl", *rows)
    else:
        for i, part in enumerate((rows[:1], rows[1:])):  # an article may go over into the next part
            parquet(tmp_path / f"race/high/test-0000{i}-of-00002.parquet", part)
    for protocol in ("gpt3", "lm_eval"):
        expected = [e for article in articles for e in examples("race_high", protocol, article)]
        assert load("race_high", tmp_path, protocol=protocol).examples == expected
    if kind == "parquet":
        (tmp_path / "race/high/test-00000-of-00002.parquet").unlink()
        with pytest.raises(ValueError, match="1 of 2 parts are there"):
            load("race_high", tmp_path)
        (tmp_path / "race/high/test-00001-of-00002.parquet").rename(
            tmp_path / "race/high/test.parquet"
        )
        (tmp_path / "race/high/test.parquet").write_bytes(b"PAR1 and nothing else")
        with pytest.raises(ValueError, match=r"test.parquet: not valid Parquet"):
            load("race_high", tmp_path)


def test_a_question_of_race_without_its_answer_is_named(tmp_path):
    rows = [{"example_id": "1.txt", "article": RACE["article"], **row} for row in PROBLEMS]
    del rows[1]["answer"]
    path = write(tmp_path / "race_high/test.jsonl", *rows)
    with pytest.raises(ValueError) as error:
        load("race_high", tmp_path)
    assert str(error.value) == f"{path}:2: the field 'answer' is missing"


def test_marks_and_line_ends_of_other_systems_are_read(tmp_path):
    """A byte order mark and CRLF, in JSON lines, CSV and RACE's files; characters of any plane."""
    raw = {**RAW["copa"], "premise": "Caf\u00e9 \u2028 \U0001f600 closed."}
    lines = f"{json.dumps(raw, ensure_ascii=False)}\r\n\r\n{json.dumps(raw)}\r\n"
    (tmp_path / "COPA").mkdir()
    (tmp_path / "COPA/val.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    loaded = load("copa", tmp_path)
    assert loaded.examples == 2 * examples("copa", "gpt3", raw)
    assert loaded.place(1) == f"{tmp_path}/COPA/val.jsonl:3"
    story = RAW["storycloze"]
    table = "\r\n".join([",".join(story), ",".join(story.values()), ""])
    path = tmp_path / "cloze_test_test__spring2016 - cloze_test_ALL_test.csv"
    path.write_bytes(b"\xef\xbb\xbf" + table.encode())
    assert load("storycloze", tmp_path).examples == examples("storycloze", "gpt3")
    article = tmp_path / "RACE/test/high/1.txt"
    article.parent.mkdir(parents=True)
    article.write_bytes(b"\xef\xbb\xbf" + json.dumps(RACE).encode())
    assert len(load("race_high", tmp_path).examples) == 3


READ_THERE = """
import sys
from eval.harnesses import hub
from eval.tasks import sources
from eval.tasks.catalogue import TASKS
from laser.training.folders import folder_of

folder = folder_of(sys.argv[1])
for name in sys.argv[2:]:
    source, asking = TASKS[name].source, TASKS[name].protocols["gpt3"]
    files = sources.find_files(source, asking.split, folder)
    loaded = sources.load(source, asking.split, asking.prompt, folder)
    print(name, len(loaded.examples), len(hub.read(name, files)), loaded.place(0))
"""


@pytest.mark.slow
def test_every_kind_of_file_is_read_from_a_bucket(tmp_path):
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    story = RAW["storycloze"]
    table = "\r\n".join([",".join(story), ",".join(story.values()), ""])
    (tmp_path / "cloze_test_test__spring2016.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    collection = f"{HEAD}{schema(*SCHEMAS['it begins'])}</collection>"
    (tmp_path / "WSCollection.xml").write_bytes(collection.encode("latin-1"))
    parquet(tmp_path / "rte/validation.parquet", [{**RAW["rte"], "label": 0}])
    write(tmp_path / "CB/val.jsonl", RAW["cb"])
    with buckets.running() as bucket:
        for path in tmp_path.rglob("*.*"):
            name = f"bucket/data/{path.relative_to(tmp_path)}"
            bucket.files().pipe_file(name, path.read_bytes())
        done = subprocess.run(
            [sys.executable, "-c", READ_THERE, "gs://bucket/data", "storycloze", "winograd", "rte",
             "cb"],
            cwd=ROOT, env={**os.environ, **bucket.environment}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "storycloze 1 1 gs://bucket/data/cloze_test_test__spring2016.csv:2",
        "winograd 1 1 gs://bucket/data/WSCollection.xml, schema 1",
        "rte 1 1 gs://bucket/data/rte/validation.parquet, row 1",
        "cb 1 1 gs://bucket/data/CB/val.jsonl:1",
    ]


def test_what_is_no_text_is_named(tmp_path):
    path = tmp_path / "cloze_test_test__spring2016.csv"
    story = RAW["storycloze"]
    header = ",".join(story)
    path.write_bytes(f"{header}\r\ncaf\xe9\r\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"spring2016.csv: not UTF-8"):
        load("storycloze", tmp_path)
    path.write_text(f"{header}\na,b\n")
    with pytest.raises(ValueError, match=rf"csv:2: a row must have the header's {len(story)} col"):
        load("storycloze", tmp_path)
    for text, message in (
        ('{"premise": null', "the field 'premise' is null"),
        ('{"premise": "\\ud83d"', "half of a character"),
    ):
        rest = {k: v for k, v in RAW["copa"].items() if k != "premise"}
        path = write(tmp_path / "COPA/val.jsonl", RAW["copa"])
        path.write_text(f"{path.read_text()}{text}, {json.dumps(rest)[1:]}\n")
        with pytest.raises(ValueError) as error:
            load("copa", tmp_path)
        assert str(error.value).startswith(f"{path}:2: {message}")
    (tmp_path / "CB/val.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"CB/val.jsonl: Is a directory"):
        load("cb", tmp_path)


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
        for name in task.source.files.get("validation", ()):
            assert name in str(error.value)


def test_the_nearest_split_stands_in(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = TASKS["arc_easy"].source
    write(tmp_path / "arc_easy/train.jsonl", RAW["arc_easy"])
    assert sources.available_split(source, "test", tmp_path) == "train"
    with pytest.raises(
        sources.MissingData, match=r"no data .*ARC-Easy-Test\.jsonl or arc_easy/\*te"
    ):
        sources.available_split(source, "test", tmp_path, ("validation",))
    write(tmp_path / "arc_easy/validation.jsonl", RAW["arc_easy"])
    assert sources.available_split(source, "test", tmp_path) == "validation"
    write(tmp_path / "arc_easy/test.jsonl", RAW["arc_easy"])
    assert sources.available_split(source, "test", tmp_path) == "test"


def test_the_split_that_is_asked_for_comes_before_a_nearer_place(tmp_path, monkeypatch):
    """Prepared in TFDS, while files have another split alone."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    source = TASKS["arc_easy"].source
    info = tmp_path / "tfds" / source.tfds / "1.0.0/dataset_info.json"
    write(info, {"splits": [{"name": "train"}, {"name": "test"}]})
    assert sources.available_split(source, "test", tmp_path) == "test"
    write(tmp_path / "arc_easy/train.jsonl", RAW["arc_easy"])
    assert sources.available_split(source, "test", tmp_path) == "test"
    assert sources.available_split(source, "validation", tmp_path) == "train"
    write(info, {"splits": [{"name": "validation"}]})
    assert sources.available_split(source, "test", tmp_path) == "validation"
    info.write_text("{")
    with pytest.raises(ValueError, match=r"dataset_info\.json: damaged"):
        sources.available_split(source, "test", tmp_path)


def test_a_split_has_another_name_in_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = sources.Source(tfds="capitals", tfds_splits={"test": "held_out"})
    write(tmp_path / "capitals/1.0.0/dataset_info.json", {"splits": [{"name": "held_out"}]})
    assert sources.available_split(source, "test", None) == "test"


def test_a_row_of_tfds_is_left_out_only_where_its_label_is_hidden():
    """Anything else that goes wrong with some rows would make the test set smaller unseen."""
    source, prompt = TASKS["copa"].source, TASKS["copa"].protocols["gpt3"].prompt
    rows = [RAW["copa"], {**RAW["copa"], "label": -1}, {**RAW["copa"], "premise": 3}]
    loaded = sources.from_records(source, prompt, rows[:2], "copa")
    assert (len(loaded.examples), loaded.hidden) == (1, 1)
    with pytest.raises(ValueError, match="copa: no label: it is hidden"):
        sources.from_records(source, prompt, rows[1:2], "copa")
    with pytest.raises(ValueError, match="copa, row 3: AttributeError: 'int' object has no attr"):
        sources.from_records(source, prompt, rows, "copa")
    with pytest.raises(ValueError, match="copa: there is no example in it"):
        sources.from_records(source, prompt, [], "copa")


@pytest.mark.parametrize("name", ["arc_easy", "openbookqa"])
def test_an_empty_key_of_the_answer_is_a_hidden_label(name):
    asking = TASKS[name].protocols["gpt3"]
    rows = [RAW[name], {**RAW[name], "answerKey": ""}]
    assert sources.from_records(TASKS[name].source, asking.prompt, rows, name).hidden == 1


@pytest.mark.slow
def test_the_offline_task_is_made_of_held_out_text():
    from data.sources import corpus

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


@needs_evaldata
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
