"""Every source of text by its name, as parts of documents (parts.py).

    bible                           the embedded corpus
    tfds:c4/en:3.1.0                TensorFlow Datasets, any set with a "text"; or just `c4`
    tfds:c4/multilingual:3.1.0@af   a set whose splits are called `af` and `af-validation`
    hf:NAME or hf:NAME@CONFIG       Hugging Face datasets, or a folder that save_to_disk wrote
    anything else                   a folder of text files (text_files.py)

TFDS and `datasets` are imported only for the sources that need them.
"""

import importlib.metadata
import importlib.util
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data.sources import corpus
from data.sources.parts import SPLITS, Broken, Document, Part, Source, number_parts
from data.sources.text_files import TextFolder
from data.tfds_sets import TFDS

HUGGING_FACE = "hf:"
DEFAULT_FIELD = "text"
SAMPLE_PARTS = 64  # that a sample is drawn from
SAMPLE_DOCUMENTS = 2**20  # read at most, to draw it
HF_PART = 2**16  # examples


def open_source(
    name: str, text_field: str | None = None, validation_fraction: float | None = None
) -> Source:
    """The source of that name; what it has is listed, and nothing of it read.

    Args:
      name: see the top of this file.
      text_field: of JSON lines, Parquet files and Hugging Face datasets; default "text".
      validation_fraction: of a folder without validation files, or of a set of TFDS without a
        validation split.

    Raises:
      ValueError: there is no such source here, or an argument is not for it.
    """
    is_task = name in ("bible", "c4") or name.startswith(TFDS)
    if is_task and text_field is not None:
        raise ValueError(f"text_field={text_field}: {name} has its own; leave it out")
    has_splits = name == "bible" or name.startswith(HUGGING_FACE)
    if has_splits and validation_fraction is not None:
        raise ValueError(
            f"validation_fraction={validation_fraction}: of {name} the split 'validation' is read; "
            "leave it out"
        )
    if name == "bible":
        return BibleSource()
    if name == "c4" or name.startswith(TFDS):
        from data.sources.tfds_files import C4, TfdsSource

        return TfdsSource(C4 if name == "c4" else name, validation_fraction)
    if name.startswith(HUGGING_FACE):
        return HuggingFaceSource(name, text_field or DEFAULT_FIELD)
    return TextFolder(name, text_field or DEFAULT_FIELD, validation_fraction)


def sample_texts(source: Source) -> Iterator[str]:
    """Train documents from the beginnings of up to SAMPLE_PARTS parts, always the same ones."""
    parts = [part for part in source.parts if "train" in part.shards]
    if len(parts) > SAMPLE_PARTS:
        chosen = random.Random(0).sample(range(len(parts)), SAMPLE_PARTS)
        parts = [parts[i] for i in sorted(chosen)]
    for part in parts:
        records = source.read(part)
        documents = (r for r in records if isinstance(r, Document) and r.split == "train")
        yield from (d.text for d in islice(documents, SAMPLE_DOCUMENTS // len(parts)))


class BibleSource:
    """The embedded corpus: one part, its size in chapters."""

    def __init__(self) -> None:
        self.parts = number_parts([(SPLITS, sum(1 for _ in corpus.chapters()), None)])

    def description(self) -> dict[str, Any]:
        """The versions of the packages."""
        packages = corpus.TRANSLATIONS.values()
        return {"kind": "bible"} | {name: importlib.metadata.version(name) for name in packages}

    def files(self) -> dict[str, str]:
        """None: a version of a package has one content."""
        return {}

    def read(self, part: Part) -> Iterator[Document | Broken]:
        """Chapters of both splits."""
        for read, chapter in enumerate(corpus.chapters(), start=1):
            yield Document(SPLITS[chapter.held_out], chapter.text, read)


class HuggingFaceSource:
    """Splits "train" and "validation" of a dataset; a part is a run of examples."""

    def __init__(self, name: str, text_field: str):
        self._path, _, self._config = name.removeprefix(HUGGING_FACE).partition("@")
        self._text_field = text_field
        self._loaded: Any = None
        sets = self._datasets()
        missing = [split for split in SPLITS if split not in sets]
        if missing:
            raise ValueError(f"source={name}: no split {missing[0]}, only {', '.join(sets)}")
        if text_field not in sets["train"].column_names:
            has = ", ".join(sets["train"].column_names)
            raise ValueError(f"text_field={text_field}: {name} has only {has}")
        self.parts = number_parts(
            ((split,), min(HF_PART, len(sets[split]) - start), start)
            for split in SPLITS
            for start in range(0, len(sets[split]), HF_PART)
        )
        prints = {split: [len(sets[split]), sets[split]._fingerprint] for split in SPLITS}
        self._description = {
            "kind": "Hugging Face", "name": name, "text_field": text_field, "splits": prints,
        }  # fmt: skip

    def description(self) -> dict[str, Any]:
        """Name, and what `datasets` says that the content is."""
        return self._description

    def files(self) -> dict[str, str]:
        """None: the description has a fingerprint of the content."""
        return {}

    def read(self, part: Part) -> Iterator[Document | Broken]:
        """Examples, in order."""
        (split,) = part.shards
        examples = self._datasets()[split]
        for read, row in enumerate(range(part.content, part.content + part.size), start=1):
            text = examples[row][self._text_field]
            if isinstance(text, str):
                yield Document(split, text, read)
            else:
                yield Broken("no text", f"{self._path}, {split}, row {row}: no text")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}  # other processes open the files themselves

    def _datasets(self):
        if self._loaded is None:
            if importlib.util.find_spec("datasets") is None:
                raise ValueError(
                    f"source={HUGGING_FACE}{self._path}: needs the package datasets: "
                    "pip install datasets"
                )
            import datasets

            if (Path(self._path) / "dataset_dict.json").is_file():
                self._loaded = datasets.load_from_disk(self._path)
            else:
                self._loaded = datasets.load_dataset(self._path, self._config or None)
        return self._loaded
