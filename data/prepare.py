"""Text to tokens: writes the folder that data/store.py reads.

Documents are read and tokenised in batches, so memory does not grow with the corpus. Everything is
written under a temporary name, forced to disk and renamed; the manifest comes last. Until then a
folder `progress` records the request and, for every finished shard, where in the source the next
one begins. Killed at any moment and started again, it goes on from the last finished shard, and the
store comes out the same to the byte.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from data.store import FORMAT, MANIFEST, TOKENIZER
from data.text_files import SPLITS, TextFolder
from data.tokenizer import Tokenizer, train_tokenizer

if TYPE_CHECKING:
    import seqio

log = logging.getLogger(__name__)

TASKS = ("bible", "c4")  # of data/tasks.py; named here, so that a typo is found without TensorFlow
SHARD_TOKENS = 2**29  # 1 GiB. C4 makes 300: a reader keeps all open, and systems allow 1024 files
BATCH_DOCUMENTS, BATCH_BYTES = 1024, 2**22  # tokenised at a time; the first limit reached counts
SOURCE_SHARDS = 1024  # parts that a source is read in; a resumed run skips whole ones
PROGRESS, REQUEST = "progress", "request.json"

Position = tuple[int, int]  # part of the source, documents of it that are done
Record = dict[str, Any]


def prepare(
    source: str,
    output: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    text_field: str | None = None,
    validation_fraction: float | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Writes a token store, or goes on with one, or does nothing if it is there already.

    Args:
      source: "bible" (the embedded corpus), "c4" (from TFDS), or a folder of text files.
      output: the folder to write; must be new, empty, or begun with the same arguments.
      vocab_size: trains a tokenizer of this size on the train split. Either this or `tokenizer`.
      tokenizer: an existing SentencePiece model.
      text_field: of JSON lines in a folder; default "text".
      validation_fraction: of a folder without validation files; see data/text_files.py.
      shard_tokens: at most so many in a shard, unless one document has more.

    Returns:
      The manifest.

    Raises:
      ValueError: the arguments, the input or the folder are wrong; the message says what to change.
    """
    if (vocab_size is None) == (tokenizer is None):
        raise ValueError(f"vocab_size={vocab_size}, tokenizer={tokenizer}: give one of the two")
    text_folder = _open_source(source, text_field, validation_fraction)
    request = {
        "source": text_folder.description() if text_folder else {"kind": "task", "name": source},
        "vocab_size": vocab_size,
        "tokenizer_sha256": Tokenizer(tokenizer).sha256 if tokenizer is not None else None,
        "shard_tokens": shard_tokens,
    }
    folder = Path(output)
    if _begin(folder, request):
        task = _task(source, text_folder)
        _write_tokenizer(folder, task, vocab_size, tokenizer)
        _write_store(folder, task, request, source)
    else:
        log.info("%s is complete already", folder)
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _open_source(
    source: str, text_field: str | None, validation_fraction: float | None
) -> TextFolder | None:
    """The folder, or None for a task."""
    if source not in TASKS:
        return TextFolder(source, text_field or "text", validation_fraction)
    for name, value in (("text_field", text_field), ("validation_fraction", validation_fraction)):
        if value is not None:
            raise ValueError(f"{name}={value}: {source} has its own; it is for folders only")
    return None


def _begin(folder: Path, request: Record) -> bool:
    """Whether there is anything to do; refuses a folder that has shards of another request."""
    manifest, begun = folder / MANIFEST, folder / PROGRESS / REQUEST
    if manifest.exists():
        _check_same(folder, json.loads(manifest.read_text(encoding="utf-8"))["request"], request)
        return False
    if begun.exists():
        saved = json.loads(begun.read_text(encoding="utf-8"))
        if saved == request:
            return True
        if any(folder.glob("*.bin")):
            _check_same(folder, saved, request)
        (folder / TOKENIZER).unlink(missing_ok=True)  # nothing else is lost by starting anew
        shutil.rmtree(begun.parent)
    begun.parent.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.name != PROGRESS)
    if others:
        raise ValueError(
            f"output={folder}: holds {others[0]} and is no token store; choose an empty folder"
        )
    _write_json(begun, request)
    return True


def _check_same(folder: Path, saved: Record, request: Record) -> None:
    old, new = _flat(saved), _flat(request)
    changes = [
        f"{key}: {old.get(key)} there, {new.get(key)} asked for"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]
    if changes:
        raise ValueError(
            f"output={folder}: made from other arguments or other files; choose another folder, "
            f"or delete this one ({'; '.join(changes)})"
        )


def _flat(record: Record) -> Record:
    source = {f"source.{key}": value for key, value in record["source"].items()}
    return source | {key: value for key, value in record.items() if key != "source"}


def _task(source: str, text_folder: TextFolder | None) -> "seqio.Task":
    with _held_back_stderr():  # TensorFlow's libraries print on import whatever the settings are
        from data import tasks

    if text_folder is None:
        return tasks.registered_task(source)
    return tasks.make_task("text_folder", tasks.TextFolderSource(text_folder))


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Keeps what is written to the process' stderr, by C++ too, and shows it only on failure."""
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(real, held_back.read())
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)


def _read(task: "seqio.Task", split: str, start: Position) -> Iterator[tuple[str, Position]]:
    """Documents of a split from a position on, each with the position after it."""
    import seqio
    import tensorflow as tf

    parts = min(len(task.source.list_shards(split)), SOURCE_SHARDS)
    for part in range(start[0], parts):
        dataset = task.get_dataset(
            split=split,
            shuffle=False,
            shard_info=seqio.ShardInfo(part, parts),
            try_in_mem_cache=False,
        )
        done = start[1] if part == start[0] else 0
        try:
            for example in dataset.skip(done).as_numpy_iterator():
                done += 1
                yield example["targets"].decode("utf-8"), (part, done)
        except tf.errors.OpError as error:
            raise getattr(task.source, "error", None) or error from None


def _write_tokenizer(
    folder: Path, task: "seqio.Task", vocab_size: int | None, tokenizer: str | Path | None
) -> None:
    path, temporary = folder / TOKENIZER, folder / PROGRESS / TOKENIZER
    if path.exists():
        return
    if tokenizer is not None:
        shutil.copyfile(tokenizer, temporary)
    else:
        assert vocab_size is not None
        log.info("training a tokenizer with %d entries", vocab_size)
        texts = (text for text, _ in _read(task, "train", (0, 0)))
        train_tokenizer(texts, temporary, vocab_size)
    _publish(temporary, path)


def _write_store(folder: Path, task: "seqio.Task", request: Record, source: str) -> None:
    tokenizer = Tokenizer(folder / TOKENIZER)
    manifest: Record = {
        "format": FORMAT,
        "request": request,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "dtype": "<u2" if tokenizer.vocab_size <= 2**16 else "<u4",
        "splits": {},
    }
    for split in SPLITS:
        writer = SplitWriter(folder, split, tokenizer, manifest["dtype"], request["shard_tokens"])
        shards = writer.write(task)
        if not shards:
            raise ValueError(
                f"source={source}: no documents for the {split} split; give more documents, "
                "another validation_fraction, or a subfolder named validation"
            )
        totals = {key: sum(s[key] for s in shards) for key in ("tokens", "documents", "bytes")}
        manifest["splits"][split] = totals | {"shards": shards}
    _write_json(folder / MANIFEST, manifest)


class SplitWriter:
    """Writes the shards of one split, those that are missing."""

    def __init__(
        self, folder: Path, split: str, tokenizer: Tokenizer, dtype: str, shard_tokens: int
    ):
        self._folder = folder
        self._split = split
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype)
        self._shard_tokens = shard_tokens
        self._shards: list[Record] = []

    def write(self, task: "seqio.Task") -> list[Record]:
        """Returns what the manifest says of each shard."""
        position = self._resume()
        finished = sum(shard["bytes"] for shard in self._shards)
        shard = None
        with tqdm(
            desc=self._split, initial=finished, unit="B", unit_scale=True, mininterval=1.0
        ) as bar:
            for documents in _batches(_read(task, self._split, position)):
                for (text, after), ids in zip(documents, self._encode(documents)):
                    if shard is not None and shard.tokens + len(ids) > self._shard_tokens:
                        self._finish(shard, position)
                        shard = None
                    if shard is None:
                        shard = self._new_shard()
                    size = len(text.encode())
                    shard.add(ids, size)
                    bar.update(size)
                    position = after
            if shard is not None:
                self._finish(shard, position)
        return self._shards

    def _encode(self, documents: list[tuple[str, Position]]) -> list[list[int]]:
        batch = self._tokenizer.encode_batch([text for text, _ in documents])
        return [ids + [self._tokenizer.eos_id] for ids in batch]

    def _new_shard(self) -> "Shard":
        name = f"{self._split}-{len(self._shards):05d}.bin"
        shard = Shard(self._folder / PROGRESS / name, self._dtype)
        if not self._shards:  # so that the first document, too, has an EOS before it
            shard.write([self._tokenizer.eos_id])
        return shard

    def _finish(self, shard: "Shard", position: Position) -> None:
        record = shard.close()
        _publish(shard.path, self._folder / shard.path.name)
        _write_json(self._progress(len(self._shards)), record | {"next": position})
        self._shards.append(record)

    def _resume(self) -> Position:
        """Takes over the shards that are finished; where to go on."""
        position = (0, 0)
        while (progress := self._progress(len(self._shards))).exists():
            record = json.loads(progress.read_text(encoding="utf-8"))
            position = tuple(record.pop("next"))
            self._shards.append(record)
        if self._shards:
            log.info("%s: going on after %d finished shards", self._split, len(self._shards))
        return position

    def _progress(self, index: int) -> Path:
        return self._folder / PROGRESS / f"{self._split}-{index:05d}.json"


class Shard:
    """A file of tokens that is being written, under a temporary name."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path = path
        self.tokens = 0
        self._dtype = dtype
        self._documents = self._bytes = 0
        self._sha256 = hashlib.sha256()
        self._file = path.open("wb")

    def add(self, ids: list[int], num_bytes: int) -> None:
        """Appends a document whose text has `num_bytes` in UTF-8."""
        self.write(ids)
        self._documents += 1
        self._bytes += num_bytes

    def write(self, ids: list[int]) -> None:
        content = np.array(ids, self._dtype).tobytes()
        self._sha256.update(content)
        self._file.write(content)
        self.tokens += len(ids)

    def close(self) -> Record:
        """Returns what the manifest says of it."""
        self._file.close()
        return {
            "file": self.path.name,
            "tokens": self.tokens,
            "documents": self._documents,
            "bytes": self._bytes,
            "sha256": self._sha256.hexdigest(),
        }


def _batches(
    documents: Iterator[tuple[str, Position]],
) -> Iterator[list[tuple[str, Position]]]:
    batch: list[tuple[str, Position]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_json(path: Path, content: Record) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _publish(temporary, path)


def _publish(temporary: Path, path: Path) -> None:
    """Renames a finished file, so that a crash leaves all of it under that name or nothing."""
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Forces a file's content, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
