"""How long preparation will take and how large the store will be, from a sample of the parts.

Some megabytes are read and tokenised from parts spread over the source, on one core. Text per byte
of a file (or per example), tokens per byte and speed are taken from them; it is assumed that cores
don't slow each other down, nor their reads from a disk or a bucket, and that the whole is like the
sample.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.addresses import is_address
from data.preparation.config import StoreConfig
from data.preparation.shards import token_dtype
from data.preparation.workers import cores
from data.reading.store import OFFSET_DTYPE
from data.sources.parts import Document, Part, Source
from data.tokenizer import Tokenizer, train_tokenizer

SAMPLE_PARTS, SAMPLE_BYTES = 8, 2**22  # parts, and bytes of text from each


@dataclass(frozen=True)
class Estimate:
    """What preparing all of a source is expected to take.

    Attributes:
      parts: of the source, which is the most that can be done at a time.
      workers: processes that the time is for.
      documents, tokens: of all splits.
      text_bytes: in UTF-8.
      store_bytes: of all files.
      bytes_per_second: of text, by one core.
      seconds: without the training of a tokenizer.
      hashing_seconds: of these, for reading the text once more to find duplicates.
      free_bytes: on the disk that the store goes to; None behind an address.
    """

    parts: int
    workers: int
    documents: int
    tokens: int
    text_bytes: int
    store_bytes: int
    bytes_per_second: float
    seconds: float
    hashing_seconds: float
    free_bytes: int | None

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f"; {self.free_bytes / 1e9:,.1f} GB are free"
        lines = [
            f"text      {self.text_bytes / 1e9:,.3f} GB in {self.documents:,} documents",
            f"tokens    {self.tokens:,}",
            f"store     {self.store_bytes / 1e9:,.3f} GB{free}",
            f"time      {_hours(self.seconds)} with {self.workers} workers, at "
            f"{self.bytes_per_second / 1e6:.1f} MB/s each",
        ]
        if self.hashing_seconds:
            lines.append(
                f"          {_hours(self.hashing_seconds)} of it to find duplicates, for which all "
                "is read twice"
            )
        if self.parts < self.workers:
            lines.append(f"parts     {self.parts}: more workers than that share parts as threads")
        return "\n".join(lines)


def _hours(seconds: float) -> str:
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes:02d} min"


@dataclass
class _Sample:
    """Sums over the sampled documents; `read` is in the unit of Part.size."""

    texts: list[str]
    read: int = 0
    read_text: int = 0  # bytes of the documents that make up `read`


def estimate(config: StoreConfig, output: str | Path, *, workers: int | None = None) -> Estimate:
    """Reads a sample and writes nothing. Arguments are those of `prepare.prepare`.

    With `vocab_size` a tokenizer is trained on the sample alone.

    Raises:
      ValueError: the config or the source are wrong, or the sample has no documents.
    """
    opened = config.open()
    count = min(SAMPLE_PARTS, len(opened.parts))
    chosen = [opened.parts[len(opened.parts) * i // count] for i in range(count)]
    began = time.perf_counter()  # a disk or a bucket may take longer than the processor
    samples = [_sample(opened, part) for part in chosen]
    reading = time.perf_counter() - began
    texts = [text for sample in samples for text in sample.texts]
    if not texts:
        raise ValueError(f"source={config.source}: no documents at the beginnings of {count} parts")
    model = _tokenizer(texts, config)
    began = time.process_time()
    tokens = sum(len(ids) + 1 for ids in model.encode_arrays(texts))
    hashing = reading if config.drop_duplicates else 0.0
    seconds = hashing + reading + time.process_time() - began
    sample_bytes = sum(len(text.encode()) for text in texts)
    size = sum(part.size for part in opened.parts)
    text_bytes = size * sum(s.read_text for s in samples) // sum(s.read for s in samples)
    per_byte = text_bytes / sample_bytes
    in_all = per_byte / (workers or cores())
    token_size = np.dtype(token_dtype(model.vocab_size)).itemsize
    store_bytes = tokens * token_size + len(texts) * OFFSET_DTYPE.itemsize
    return Estimate(
        parts=len(opened.parts),
        workers=workers or cores(),
        documents=round(len(texts) * per_byte),
        tokens=round(tokens * per_byte),
        text_bytes=text_bytes,
        store_bytes=round(store_bytes * per_byte),
        bytes_per_second=sample_bytes / seconds,
        seconds=seconds * in_all,
        hashing_seconds=hashing * in_all,
        free_bytes=None
        if is_address(output)  # which Beam writes to
        else shutil.disk_usage(_existing(Path(output))).free,
    )


def _tokenizer(texts: list[str], config: StoreConfig) -> Tokenizer:
    if config.tokenizer is not None:
        return Tokenizer(config.tokenizer)
    assert config.vocab_size is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        train_tokenizer(texts, path, config.vocab_size)
        return Tokenizer(path)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return folder if folder.exists() else _existing(folder.parent)


def _sample(source: Source, part: Part) -> _Sample:
    """The beginning of a part.

    Compressed files are read ahead in blocks, so text is compared with what was read only between
    the ends of blocks, where the reader's place changes.
    """
    sample = _Sample([])
    size = first_text = 0
    first_read: int | None = None
    last = 0
    for record in source.read(part):
        if not isinstance(record, Document):
            continue
        if record.read != last:
            if first_read is None:
                first_read, first_text = record.read, size
            else:
                sample.read, sample.read_text = record.read - first_read, size - first_text
            last = record.read
            if size >= SAMPLE_BYTES:
                return sample
        sample.texts.append(record.text)
        size += len(record.text.encode())
    sample.read, sample.read_text = part.size, size  # it was read to its end
    return sample
