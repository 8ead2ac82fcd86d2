"""One host that reads its part of a large store far away; part of scripts/benchmark_data.py.

The store has no more than its files' sizes: 1.1 GiB of zeros that take no place on the disk. What
is measured is the reading side alone: the order, the requests and the rows that come of them.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from configs import base
from data.reading.blocks import BlockReader
from data.reading.files import LocalFile
from data.reading.manifest import COUNTS, FORMAT, MANIFEST
from data.reading.order import Places
from data.reading.store import TOKENIZER, Split, TokenStore
from data.sealed import seal

SEQ_LEN, BATCH_SIZE, SHARD_TOKENS, SHARDS = 1024, 1024, 2**26, 9
STEPS = 512  # two blocks of every lane
CHIPS = 4  # of a host, in slices of v5e and v5p with several hosts
PLANS = Path(__file__).resolve().parent.parent / "docs" / "plans.json"
RUNS = {("301m", "v5e-64"): 64, ("2p2b", "v5e-256"): 256, ("301m", "v5p-128"): 64}  # → chips
COLUMNS = (
    "size", "slice", "hosts", "rows/s of a host", "needed at the bound", "times", "first rows, s",
    "blocks in memory, MB", "requests/s of all hosts at the bound",
)  # fmt: skip


class LateFiles:
    """Puts a latency before each read of a store's files.

    Attributes:
      requests, read_bytes: so far.
    """

    def __init__(self, seconds: float):
        self._seconds, self._lock = seconds, threading.Lock()
        self.requests = self.read_bytes = 0

    @contextlib.contextmanager
    def everywhere(self) -> Iterator["LateFiles"]:
        read = LocalFile.read

        def read_late(file: LocalFile, start: int, size: int) -> bytes:
            time.sleep(self._seconds)
            with self._lock:
                self.requests, self.read_bytes = self.requests + 1, self.read_bytes + size
            return read(file, start, size)

        with mock.patch.object(LocalFile, "read", read_late):
            yield self


def measure(folder: Path, latency: float) -> None:
    """Prints a table: rows a second of a host of each of RUNS, beside what its chips take.

    Args:
      folder: for the store.
      latency: before each read, in seconds.
    """
    split = write_empty_store(folder).split("train")
    gib = SHARDS * SHARD_TOKENS * 2 / 2**30
    print(
        f"{latency * 1000:.0f} ms before each request; {gib:.1f} GiB of tokens, rows of {SEQ_LEN}"
    )
    print(f"batches of {BATCH_SIZE} rows; {CHIPS} chips a host\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for (size, slice_name), chips in RUNS.items():
        print(_measured_line(split, latency, size, slice_name, chips // CHIPS), flush=True)


def _measured_line(split: Split, latency: float, size: str, slice_name: str, hosts: int) -> str:
    data, lanes = base.get_config().data, np.arange(BATCH_SIZE // hosts)
    needed = len(lanes) / _bound_seconds(size, slice_name)

    def plan() -> Iterator[tuple[int, Places]]:
        for step in range(STEPS):
            yield step, split.places(0, step, BATCH_SIZE, SEQ_LEN, data.block_rows)[lanes]

    with (
        LateFiles(latency).everywhere() as files,
        BlockReader(split, SEQ_LEN, plan(), data.read_ahead, data.requests) as reader,
    ):
        began = time.perf_counter()
        held, first = 0, 0.0
        for step, _ in reader:
            first = first or time.perf_counter() - began
            if step % 16 == 0:
                held = max(held, reader.num_blocks)
        seconds = time.perf_counter() - began
    rows = STEPS * len(lanes) / seconds
    megabytes = held * files.read_bytes / files.requests / 1e6
    requests = files.requests / STEPS * needed / len(lanes) * hosts
    return (
        f"| {size} | {slice_name} | {hosts} | {rows:,.0f} | {needed:,.0f} | {rows / needed:.1f} "
        f"| {first:.2f} | {megabytes:.0f} | {requests:.1f} |"
    )


def _bound_seconds(size: str, slice_name: str) -> float:
    """The least time of a step, of docs/plans.md."""
    plans = json.loads(PLANS.read_text())
    bound = plans[f"size={size},attention=laser,slice={slice_name}"]["bound"]
    return max(bound.values())


def write_empty_store(folder: Path) -> TokenStore:
    """A store of zeros."""
    folder.mkdir()
    (folder / TOKENIZER).write_bytes(b"none")
    zeros = hashlib.sha256()
    for _ in range(SHARD_TOKENS * 2 // 2**20):
        zeros.update(bytes(2**20))
    shards: list[dict[str, Any]] = []
    for i in range(SHARDS):
        with (folder / f"train-{i:05}.bin").open("wb") as file:
            file.truncate(SHARD_TOKENS * 2)
        (folder / f"train-{i:05}.offsets").write_bytes(bytes(8))
        shards.append(
            {
                "file": f"train-{i:05}.bin",
                "tokens": SHARD_TOKENS,
                "documents": 1,
                "bytes": 4 * SHARD_TOKENS,
                "sha256": zeros.hexdigest(),
                "offsets_sha256": hashlib.sha256(bytes(8)).hexdigest(),
            }
        )
    train = {key: sum(shard[key] for shard in shards) for key in COUNTS} | {"shards": shards}
    manifest = {
        "format": FORMAT,
        "tokenizer_sha256": hashlib.sha256(b"none").hexdigest(),
        "vocab_size": 2**16,
        "eos_id": 1,
        "pad_id": 0,
        "dtype": "<u2",
        "splits": {"train": train},
    }
    (folder / MANIFEST).write_text(json.dumps(seal(manifest)))
    return TokenStore(folder)
