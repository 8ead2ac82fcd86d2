"""Text to tokens on one machine: writes the folder that data/reading/store.py reads.

Every part of the source becomes shards of its own (data/sources/parts.py), on all cores, streamed
in batches, so that memory does not grow with the corpus. What is finished of a part is recorded in
the folder `progress`; the manifest comes last. Killed at any moment and started again, preparation
goes on with the parts that are missing, and the store comes out the same to the byte, by any
number of workers. beam_pipeline.py does the same on a cluster.
"""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import atomic
from data.preparation.config import StoreConfig
from data.preparation.duplicates import find_duplicates, hash_part, read_duplicates
from data.preparation.shards import (
    Progress,
    Record,
    broken_records,
    check_broken,
    token_dtype,
    write_json,
    write_part,
)
from data.preparation.workers import cores, run_parts
from data.reading.files import folder_to_write, path_of
from data.reading.manifest import (
    COUNTS,
    FORMAT,
    MANIFEST,
    PREPARE_AGAIN,
    read_manifest,
    read_sealed,
)
from data.reading.store import TOKENIZER, TokenStore
from data.sources.parts import SPLITS, Part, Source
from data.sources.registry import sample_texts
from data.tokenizer import SAMPLE_BYTES, Tokenizer, train_tokenizer

log = logging.getLogger(__name__)

PROGRESS, REQUEST, TOKENIZER_DONE = "progress", "request.json", "tokenizer.json"
HASHES, DUPLICATES = "hashes", "duplicates"


def prepare(
    config: StoreConfig, output: str | Path, *, workers: int | None = None
) -> dict[str, Any]:
    """Writes a token store, or goes on with one, or does nothing if it is there already.

    Args:
      config: what the store is made of. An unfinished store may go on with another `max_broken`.
      output: the folder to write; must be new, empty, or begun with the same config.
      workers: processes; default: one for each core.

    Returns:
      The manifest.

    Raises:
      ValueError: the config, the input or the folder are wrong, or another process prepares there;
        the message says what to change.
      RuntimeError: a worker process died.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: must be at least 1")
    folder = folder_to_write(output)
    source = config.open()
    request = config.request(source)
    _make(folder, folder)
    busy = (
        f"output={folder}: another process prepares it; wait for its end, or choose another folder"
    )
    with alone_in(folder, busy):
        if (folder / MANIFEST).exists():
            _check_finished(folder, request, config.max_broken)
            log.info("%s is complete already", folder)
        else:
            files = source.files()
            begin(folder, request, files)
            tokenizer = _tokenizer(folder, source, config)
            preparation = Preparation(source, folder, tokenizer, config.max_broken)
            records = preparation.run(workers or cores(), config.drop_duplicates)
            manifest = make_manifest(config, request, tokenizer, records)
            check_files(folder, files, source.files(), "while they were read")
            write_json(folder / MANIFEST, manifest)
        TokenStore(folder)  # all is there, and as it was written, whenever that was
        shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    return read_manifest(folder)


@contextlib.contextmanager
def alone_in(folder: Path, busy: str) -> Iterator[None]:
    """Keeps other preparations from a folder, until this ends or its process does.

    The folder itself is locked: a file in it would be one of the store's. Raises ValueError, which
    says `busy`, if one is at work there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(busy) from None
        except OSError as error:  # as on NFS
            log.warning("%s: no locks there (%s): prepare it once at a time", folder, error)
        yield
    finally:
        os.close(handle)


def _make(folder: Path, output: Path) -> None:
    """Makes a folder of the output, or that itself. Raises ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output={output}: no folder can be made there ({error.strerror}); choose another one"
        ) from error


def goes_on(
    folder: Path, request: Record, files: dict[str, str], finished: str, again: str
) -> bool:
    """Whether what was begun in a folder goes on, or is to be begun anew.

    Args:
      folder: may have nothing in it.
      request: what is to be prepared.
      files: its sources have, with what tells their content from another.
      finished: pattern of the files that only a finished part has.
      again: what to do where the record of the request is damaged.

    Raises:
      ValueError: another request, or other files, have finished parts there.
    """
    begun = folder / PROGRESS / REQUEST
    if not begun.exists():
        return False
    saved = read_sealed(begun, again)
    if any(folder.glob(finished)):
        check_same(folder, saved["request"], request)
        check_files(folder, saved["files"], files, "since this preparation began")
    return saved == {"request": request, "files": files}


def begin(folder: Path, request: Record, files: dict[str, str]) -> None:
    """Makes the folder, or checks that it was begun with this request and these very files.

    One that has no shards yet, of another request, is begun anew. The files are those of
    `Source.files`.
    """
    begun = folder / PROGRESS / REQUEST
    same = goes_on(folder, request, files, "*.bin", PREPARE_AGAIN)
    if begun.exists():
        pattern = f"*{atomic.TEMPORARY}"
        for path in [*folder.glob(pattern), *begun.parent.rglob(pattern)]:
            path.unlink(missing_ok=True)  # a killed run's
        if same:
            return
        (folder / TOKENIZER).unlink(missing_ok=True)  # nothing else is lost by starting anew
        shutil.rmtree(begun.parent)
    _make(begun.parent, folder)
    others = sorted(path.name for path in folder.iterdir() if path.name != PROGRESS)
    if others:
        raise ValueError(
            f"output={folder}: holds {others[0]} and is no token store; choose an empty folder"
        )
    write_json(begun, {"request": request, "files": files})


def _check_finished(folder: Path, request: Record, max_broken: int) -> None:
    """Raises ValueError if a finished store is not what was asked for."""
    saved = read_manifest(folder)
    check_same(folder, saved["request"], request)
    if (broken := sum(saved["broken"].values())) > max_broken:
        raise ValueError(
            f"max_broken={max_broken}: {folder} is complete and lacks {broken} broken records "
            f"of its source; allow as many, or mend them and choose another folder"
        )


def _tokenizer(folder: Path, source: Source, config: StoreConfig) -> Tokenizer:
    """That of the store, made if it is not finished. What is finished may not have changed."""
    path, done = folder / TOKENIZER, folder / PROGRESS / TOKENIZER_DONE
    if not done.exists():
        path.unlink(missing_ok=True)
        write_tokenizer(path, source, config.vocab_size, config.tokenizer)
        write_json(done, {"model_sha256": Tokenizer(path).sha256})
    tokenizer = Tokenizer(path)
    if tokenizer.sha256 != read_sealed(done, PREPARE_AGAIN)["model_sha256"]:
        raise ValueError(f"{path}: damaged since it was made; {PREPARE_AGAIN}")
    return tokenizer


def write_tokenizer(
    path: Path,
    source: Source,
    vocab_size: int | None,
    tokenizer: str | Path | None,
    sample_bytes: int = SAMPLE_BYTES,
) -> None:
    """Copies the tokenizer, or trains one on the train split, if it is not there yet."""
    if path.exists():
        return
    temporary = atomic.temporary_path(path)
    if tokenizer is not None:
        temporary.write_bytes(path_of(tokenizer).read_bytes())
        warn_of_losses(tokenizer)
    else:
        assert vocab_size is not None
        log.info("training a tokenizer with %d entries", vocab_size)
        train_tokenizer(sample_texts(source), temporary, vocab_size, sample_bytes)
    atomic.publish(temporary, path)


def warn_of_losses(tokenizer: str | Path) -> None:
    """Says in the log what text a tokenizer does not give back."""
    if lost := Tokenizer(tokenizer).lost():
        log.warning(
            "tokenizer=%s: loses %s in decode(encode(text)): prompts lose their structure "
            "and bits per byte their meaning; scripts/train_tokenizer.py makes one that doesn't",
            tokenizer,
            ", ".join(lost),
        )


def make_manifest(
    config: StoreConfig, request: Record, tokenizer: Tokenizer, records: Sequence[Record]
) -> Record:
    """The manifest, from the records of all parts in their order.

    Raises:
      ValueError: a split has no documents.
    """
    splits: Record = {}
    for split in SPLITS:
        shards = [r["shards"][split] for r in records if split in r["shards"]]
        totals = {key: sum(shard[key] for shard in shards) for key in COUNTS}
        if not totals["documents"]:
            raise ValueError(
                f"source={config.source}: no documents for the {split} split; give more documents, "
                "another validation_fraction, or a subfolder named validation"
            )
        duplicates = sum(r["duplicates"].get(split, 0) for r in records)
        splits[split] = totals | {"duplicates_dropped": duplicates, "shards": shards}
    return {
        "format": FORMAT,
        "request": request,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "dtype": token_dtype(tokenizer.vocab_size),
        "max_broken": config.max_broken,
        "broken": broken_records(records),
        "splits": splits,
    }


@dataclass(frozen=True)
class Preparation:
    """The parts of one store."""

    source: Source
    folder: Path
    tokenizer: Tokenizer
    max_broken: int

    def run(self, workers: int, drop_duplicates: bool) -> list[Record]:
        """Writes the shards that are missing. Returns the records of all parts in their order."""
        parts = self.source.parts
        total = sum(part.size for part in parts)
        records = {part.index: r for part in parts if (r := self._finished(part)) is not None}
        if records:
            log.info("going on after %d of %d parts", len(records), len(parts))
        if drop_duplicates and len(records) < len(parts):
            self._find_duplicates(workers, total)
        todo = [part for part in parts if part.index not in records]
        check_broken(list(records.values()), self.max_broken)
        for part, record in run_parts(self._write, todo, workers, "preparing", total):
            records[part.index] = record
            for message in record["messages"]:
                log.warning("skipped: %s", message)
            check_broken(list(records.values()), self.max_broken)
        return [records[part.index] for part in parts]

    def _write(self, part: Part, threads: int, progress: Progress) -> Record:
        """Writes the shards of a part, in a worker, and then the record of it."""
        duplicates = self.folder / PROGRESS / DUPLICATES
        record = write_part(
            self.source,
            part,
            self.tokenizer,
            self.folder,
            drop=read_duplicates(duplicates, part.index) if duplicates.exists() else (),
            max_broken=self.max_broken,
            threads=threads,
            progress=progress,
        )
        write_json(self._record_path(part), {"part": part.index, **record})
        return record

    def _find_duplicates(self, workers: int, total: int) -> None:
        progress = self.folder / PROGRESS
        if (progress / DUPLICATES).exists():
            return
        (progress / HASHES).mkdir(exist_ok=True)
        todo = [part for part in self.source.parts if not self._hash_path(part).exists()]
        for _ in run_parts(self._hash, todo, workers, "hashing", total):
            pass
        log.info("looking for duplicates")
        paths = [self._hash_path(part) for part in self.source.parts]
        find_duplicates(paths, progress / DUPLICATES)

    def _hash(self, part: Part, threads: int, progress: Progress) -> None:
        hash_part(self.source, part, self._hash_path(part), progress)

    def _finished(self, part: Part) -> Record | None:
        path = self._record_path(part)
        if not path.exists():
            return None
        record = read_sealed(path, PREPARE_AGAIN)
        if record["part"] != part.index:
            raise ValueError(f"{path}: is that of part {record['part']}; {PREPARE_AGAIN}")
        return record

    def _record_path(self, part: Part) -> Path:
        return self.folder / PROGRESS / f"part-{part.index:05d}.json"

    def _hash_path(self, part: Part) -> Path:
        return self.folder / PROGRESS / HASHES / f"{part.index:05d}.hashes"


def check_same(folder: Path, saved: Record, request: Record) -> None:
    """Raises ValueError if a folder was not begun with this request."""
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


def check_files(folder: Path, before: dict[str, str], now: dict[str, str], when: str) -> None:
    """Raises ValueError if files of the source are not as they were."""
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if changed:
        others = f" and {len(changed) - 1} others" if len(changed) > 1 else ""
        raise ValueError(
            f"output={folder}: files of the source have changed {when}, as {changed[0]}{others}; "
            "put them back as they were, time of modification included, or delete the folder"
        )


def _flat(record: Record) -> Record:
    source = {f"source.{key}": value for key, value in record["source"].items()}
    return source | {key: value for key, value in record.items() if key != "source"}
