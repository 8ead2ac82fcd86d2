"""Text to tokens on a cluster, by Apache Beam: the store of prepare.py, bit for bit.

Every part of the source is one element, and its shards are written by the same function as on one
machine, so any runner gives the same bytes with any number of workers. Duplicates are found by a
shuffle in place of sorted files. The manifest is written last, by the pipeline itself. Needs
requirements-beam.txt. The source must be readable by all workers: a mounted folder, or TFDS with
TFDS_DATA_DIR on a bucket; the output is any path that Beam writes. Only its DirectRunner was tried.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from data.preparation.config import StoreConfig
from data.preparation.duplicates import document_hash, document_rank, rank_place
from data.preparation.prepare import make_manifest, write_tokenizer
from data.preparation.shards import Record, check_broken, write_json, write_part
from data.reading.manifest import MANIFEST
from data.reading.store import TOKENIZER
from data.sources.parts import Broken, Source
from data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def prepare_with_beam(config: StoreConfig, output: str, *, options: list[str]) -> None:
    """Writes a token store by a Beam pipeline, and waits for it.

    Args:
      config: what the store is made of.
      output: a path that Beam's file systems write, as gs://bucket/stores/c4; holds no store yet.
      options: of Beam, as ["--runner=DirectRunner", "--direct_num_workers=8"].

    Raises:
      ValueError: the config or the source are wrong.
    """
    if FileSystems.exists(FileSystems.join(output, MANIFEST)):
        raise ValueError(f"output={output}: holds a store already; choose another folder")
    source = config.open()
    request = config.request(source)
    if not FileSystems.exists(output):
        FileSystems.mkdirs(output)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER
        write_tokenizer(path, source, config.vocab_size, config.tokenizer)
        model = Tokenizer(path)
        _copy(path, output)
    with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        elements = pipeline | "Parts" >> beam.Create([(part.index, None) for part in source.parts])
        drops = pipeline | "Nothing" >> beam.Create([])
        if config.drop_duplicates:
            drops = elements | "Duplicates" >> _Duplicates(source)
        (
            {"part": elements, "drop": drops}
            | "Join" >> beam.CoGroupByKey()
            | "Spread" >> beam.Reshuffle()
            | "Write" >> beam.ParDo(_WritePart(source, model, output, config.max_broken))
            | "Records" >> beam.combiners.ToList()
            | "Manifest" >> beam.Map(_write_manifest, config, request, model, output)
        )


class _Duplicates(beam.PTransform):
    """Parts → (part, place of a document to drop)."""

    def __init__(self, source: Source):
        super().__init__()
        self._source = source

    def expand(self, parts: Any) -> Any:
        return (
            parts
            | beam.Reshuffle()
            | beam.FlatMap(_hashes, self._source)
            | beam.GroupByKey()
            | beam.FlatMap(_all_but_the_first)
        )


def _hashes(element: tuple[int, None], source: Any) -> Iterator[tuple[bytes, int]]:
    # Beam checks the annotations of such a function, and can't check a Protocol as Source.
    part = source.parts[element[0]]
    documents = (record for record in source.read(part) if not isinstance(record, Broken))
    for index, document in enumerate(documents):
        rank = document_rank(document.split, part.index, index)
        yield document_hash(document.text.encode()), rank


def _all_but_the_first(element: tuple[bytes, Iterable[int]]) -> Iterator[tuple[int, int]]:
    return (rank_place(rank) for rank in sorted(element[1])[1:])


class _WritePart(beam.DoFn):
    """(part, places to drop) → record of the part, once its files are in the output."""

    def __init__(self, source: Source, tokenizer: Tokenizer, output: str, max_broken: int):
        self._source = source
        self._tokenizer = tokenizer
        self._output = output
        self._max_broken = max_broken

    def process(self, element: tuple[int, dict[str, Iterable]]) -> Iterator[tuple[int, Record]]:
        index, groups = element
        with tempfile.TemporaryDirectory() as folder:
            record = write_part(
                self._source,
                self._source.parts[index],
                self._tokenizer,
                Path(folder),
                drop=frozenset(groups["drop"]),
                max_broken=self._max_broken,
            )
            for path in Path(folder).iterdir():
                _copy(path, self._output)
        for message in record["messages"]:
            log.warning("skipped: %s", message)
        yield index, record


def _write_manifest(
    records: list[tuple[int, Record]],
    config: StoreConfig,
    request: Record,
    tokenizer: Tokenizer,
    output: str,
) -> None:
    ordered = [record for _, record in sorted(records, key=lambda pair: pair[0])]
    check_broken(ordered, config.max_broken)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST
        write_json(path, make_manifest(config, request, tokenizer, ordered))
        _copy(path, output)


def _copy(path: Path, output: str) -> None:
    target = FileSystems.join(output, path.name)
    plain = CompressionTypes.UNCOMPRESSED
    with (
        path.open("rb") as file,
        FileSystems.create(target, "application/octet-stream", plain) as copy,
    ):
        shutil.copyfileobj(file, copy, 2**24)
