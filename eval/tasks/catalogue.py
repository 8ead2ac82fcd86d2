"""The paper's one-shot tasks, and one that needs no download, as data.

The paper names its tasks and gives no prompts; its list is GLaM's without ANLI. A task says where
its rows come from, and for each of the two protocols how a row is asked, how candidates are
compared, and what is reported. The first metric is the one of the table.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from eval.tasks import offline, prompts, rows
from eval.tasks.prompts import Prompt
from eval.tasks.sources import Source
from laser.training.fields import nearest

Protocol = Literal["gpt3", "lm_eval"]
PROTOCOLS: tuple[Protocol, ...] = ("gpt3", "lm_eval")


@dataclasses.dataclass(frozen=True)
class Asking:
    """How one protocol asks a task.

    Attributes:
      prompt: a row to its examples.
      split: what is evaluated.
      shots: the split that demonstrations are drawn from.
      normalisation: of candidates' scores, a key of eval.likelihood.metrics.NORMALISATIONS.
      metrics: keys of eval.likelihood.metrics.METRICS, the one for the table first.
      also: other normalisations whose accuracy is reported beside.
      unconditional: the context of the unconditional normalisation.
    """

    prompt: Prompt
    split: str
    shots: str
    normalisation: str
    metrics: tuple[str, ...] = ("accuracy",)
    also: tuple[str, ...] = ()
    unconditional: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task; `paper` is its name in the paper's tables (eval/likelihood/paper.py)."""

    name: str
    paper: str
    source: Source
    protocols: Mapping[Protocol, Asking]


WORDS = {"train": ("train",), "validation": ("val", "dev"), "test": ("test",)}


def _files(*folders: str, **archive: str) -> dict[str, tuple[str, ...]]:
    """For each split its file in the original archive, then JSON lines and Parquet as on the hub,
    named after the split, in one of the folders."""
    return {
        split: (
            *((archive[split],) if split in archive else ()),
            *(f"{folder}/*{word}*.{{jsonl,parquet}}" for folder in folders for word in words),
        )
        for split, words in WORDS.items()
    }


def _super_glue(folder: str, name: str, reader) -> Source:
    fixed = "wsc.fixed" if name == "wsc" else name
    folders = dict.fromkeys((name, fixed))
    return Source(
        rows=reader,
        files=_files(*folders, train=f"{folder}/train.jsonl", validation=f"{folder}/val.jsonl"),
        tfds=f"super_glue/{fixed}",
        where=f"https://dl.fbaipublicfiles.com/glue/superglue/data/v2/{folder}.zip",
    )


def _arc(folder: str, name: str) -> Source:
    words = {"train": "Train", "validation": "Dev", "test": "Test"}
    files = {split: f"{folder}/{folder}-{word}.jsonl" for split, word in words.items()}
    hub = _files(name, folder)
    return Source(
        rows=rows.arc,
        files={s: (f"ARC-V1-Feb2018-2/{file}", file, *hub[s]) for s, file in files.items()},
        tfds=f"ai2_arc/{folder}",
        where="https://ai2-public-datasets.s3-us-west-2.amazonaws.com/arc/ARC-V1-Feb2018.zip",
    )


def _race(level: str) -> Source:
    folders = {"train": "train", "validation": "dev", "test": "test"}
    archive = {split: f"RACE/{folder}/{level}/*.txt" for split, folder in folders.items()}
    return Source(
        rows=rows.race,
        files=_files(f"race_{level}", f"{{race,RACE}}/{level}", **archive),
        tfds=f"race/{level}",
        where="http://www.cs.cmu.edu/~glai1/data/race/RACE.tar.gz",
        join=rows.race_articles,
        tfds_splits={"validation": "dev"},
    )


HELLASWAG = Source(
    rows=rows.hellaswag,
    files=_files(
        "hellaswag", "hellaswag/data", train="hellaswag_train.jsonl",
        validation="hellaswag_val.jsonl",
    ),
    tfds="hellaswag",
    where="https://github.com/rowanz/hellaswag/tree/master/data",
    get="download hellaswag_train.jsonl and hellaswag_val.jsonl from {} into --data_dir",
)  # fmt: skip
MAIN = "OpenBookQA-V1-Sep2018/Data/Main"
OPENBOOKQA = Source(
    rows=rows.openbookqa,
    files=_files(
        "openbookqa", "openbookqa/main", train=f"{MAIN}/train.jsonl",
        validation=f"{MAIN}/dev.jsonl", test=f"{MAIN}/test.jsonl",
    ),
    tfds="openbookqa",
    where="https://s3-us-west-2.amazonaws.com/ai2-website/data/OpenBookQA-V1-Sep2018.zip",
)  # fmt: skip
PIQA = Source(
    rows=rows.piqa,
    files=_files(
        "piqa", "piqa/data", train="physicaliqa-train-dev/train.jsonl",
        validation="physicaliqa-train-dev/dev.jsonl",
    ),
    tfds="piqa",
    where="https://storage.googleapis.com/ai2-mosaic/public/physicaliqa/physicaliqa-train-dev.zip",
)  # fmt: skip
STORYCLOZE = Source(
    rows=rows.storycloze,
    files={
        split: (f"cloze_test_{word}__spring2016*.csv", f"storycloze/*_{word}_*.csv", *hub)
        for (split, hub), word in zip(list(_files("storycloze").items())[1:], ("val", "test"))
    },
    tfds="story_cloze/2016",
    where="https://www.cs.rochester.edu/nlp/rocstories/",
    get="ask for it by the form at {}, which sends a link; save the two files of 2016 in "
    "--data_dir as cloze_test_val__spring2016.csv and cloze_test_test__spring2016.csv",
)
WINOGRAD = Source(
    rows=rows.winograd,
    files={"test": ("WSCollection.xml", "winograd/*.{xml,jsonl,parquet}")},
    tfds="wsc273",
    where="https://cs.nyu.edu/faculty/davise/papers/WinogradSchemas/WSCollection.xml",
    get="download {} into --data_dir",
)
WINOGRANDE = Source(
    rows=rows.winogrande,
    files=_files(
        "winogrande", "{winogrande/,}winogrande_xl", train="winogrande_1.1/train_xl.jsonl",
        validation="winogrande_1.1/dev.jsonl",
    ),
    tfds="winogrande",
    where="https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip",
    tfds_splits={"train": "train_xl"},
)  # fmt: skip


def _both(gpt3: Asking, lm_eval: Asking) -> dict[Protocol, Asking]:
    return {"gpt3": gpt3, "lm_eval": lm_eval}


def _standard(
    gpt3: Prompt,
    lm_eval: Prompt,
    normalisation: str = "token",
    *,
    split: str = "validation",
    shots: str = "train",
    metrics: tuple[str, ...] = ("accuracy",),
    also: tuple[str, ...] = (),
    unconditional: str = "",
) -> dict[Protocol, Asking]:
    """`lm_eval` compares sums; `also` are other normalisations that it reports."""
    return _both(
        Asking(gpt3, split, shots, normalisation, metrics, unconditional=unconditional),
        Asking(lm_eval, split, shots, "sum", metrics, also),
    )


ACC_NORM = ("character",)  # lm_eval's acc_norm
ARC = _standard(
    prompts.question_answer,
    prompts.question_answer,
    "unconditional",
    split="test",
    also=ACC_NORM,
    unconditional="Answer:",
)
RACE = _both(
    Asking(prompts.race_gpt3, "test", "train", "unconditional", unconditional="A:"),
    Asking(prompts.race_lm_eval, "test", "test", "sum"),
)

_TABLE = (
    Task("arc_easy", "ArcE", _arc("ARC-Easy", "arc_easy"), ARC),
    Task("arc_challenge", "ArcC", _arc("ARC-Challenge", "arc_challenge"), ARC),
    Task("boolq", "BoolQ", _super_glue("BoolQ", "boolq", rows.boolq),
         _standard(prompts.boolq_gpt3, prompts.boolq_lm_eval)),
    Task("cb", "CB", _super_glue("CB", "cb", rows.cb),
         _standard(prompts.cb_gpt3, prompts.cb_lm_eval, metrics=("accuracy", "macro_f1"))),
    Task("copa", "COPA", _super_glue("COPA", "copa", rows.copa),
         _both(Asking(prompts.copa_gpt3, "validation", "train", "sum", also=("token",)),
               Asking(prompts.copa_lm_eval, "validation", "train", "sum"))),
    Task("hellaswag", "HellaSwag", HELLASWAG,
         _standard(prompts.hellaswag_gpt3, prompts.hellaswag_lm_eval, also=ACC_NORM)),
    Task("multirc", "MultiRC", _super_glue("MultiRC", "multirc", rows.multirc),
         _both(Asking(prompts.multirc_gpt3, "validation", "train", "sum",
                      ("f1a", "question_exact", "accuracy")),
               Asking(prompts.multirc_lm_eval, "validation", "train", "sum",
                      ("accuracy", "f1a", "question_exact")))),
    Task("openbookqa", "OpenBookQA", OPENBOOKQA,
         _standard(prompts.openbookqa, prompts.openbookqa, "unconditional", split="test",
                   also=ACC_NORM, unconditional="Answer:")),
    Task("piqa", "PIQA", PIQA,
         _standard(prompts.piqa_gpt3, prompts.piqa_lm_eval, also=ACC_NORM)),
    Task("race_middle", "RaceM", _race("middle"), RACE),
    Task("race_high", "RaceH", _race("high"), RACE),
    Task("record", "ReCoRD", _super_glue("ReCoRD", "record", rows.record),
         _both(Asking(prompts.record_gpt3, "validation", "train", "sum", ("em", "f1")),
               Asking(prompts.record_lm_eval, "validation", "train", "sum", ("em", "f1")))),
    Task("rte", "RTE", _super_glue("RTE", "rte", rows.rte),
         _standard(prompts.rte_gpt3, prompts.rte_lm_eval)),
    Task("storycloze", "StoryCloze", STORYCLOZE,
         _standard(prompts.storycloze, prompts.storycloze, split="test", shots="validation")),
    Task("wic", "WiC", _super_glue("WiC", "wic", rows.wic),
         _standard(prompts.wic_gpt3, prompts.wic_lm_eval)),
    Task("winograd", "Winograd", WINOGRAD,
         _standard(prompts.winograd_gpt3, prompts.winograd_lm_eval, "partial", split="test",
                   shots="test")),
    Task("winogrande", "Winogrande", WINOGRANDE,
         _standard(prompts.winogrande, prompts.winogrande, "partial")),
    Task("wsc", "WSC", _super_glue("WSC", "wsc", rows.wsc),
         _standard(prompts.wsc_gpt3, prompts.wsc_lm_eval)),
)  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for task in _TABLE}

_HELD_OUT = Asking(prompts.held_out, "validation", "validation", "token")
OFFLINE = Task("held_out", "", Source(make=offline.passages), _both(_HELD_OUT, _HELD_OUT))
KNOWN: dict[str, Task] = {**TASKS, OFFLINE.name: OFFLINE}


def choose_tasks(names: str) -> list[Task]:
    """The tasks of a list with commas, or all. Raises ValueError that suggests the nearest name."""
    if names == "all":
        return list(KNOWN.values())
    for name in names.split(","):
        if name not in KNOWN:
            hint = nearest(name, KNOWN) or f"; known: {', '.join(KNOWN)}"
            raise ValueError(f"tasks={names}: unknown task {name!r}{hint}")
    return [KNOWN[name] for name in dict.fromkeys(names.split(","))]
