"""Stores written by hand for tests that need no text."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data.reading.manifest import COUNTS, FORMAT, MANIFEST
from data.reading.store import TOKENIZER, TokenStore
from data.sealed import seal

EOS = 1


@pytest.fixture
def make_store(tmp_path):
    """Writes a store without text: make_store(train=[shard, shard], validation=[shard])."""

    def make(dtype: str = "<u2", **splits: list[list[int]]) -> TokenStore:
        folder = tmp_path / f"store_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        manifest = {
            "format": FORMAT,
            "tokenizer_sha256": _write(folder / TOKENIZER, b"model"),
            "vocab_size": 2**16,
            "eos_id": EOS,
            "pad_id": 0,
            "dtype": dtype,
            "splits": {name: _split(folder, name, dtype, s) for name, s in splits.items()},
        }
        (folder / MANIFEST).write_text(json.dumps(seal(manifest)))
        return TokenStore(folder)

    return make


def _split(folder: Path, name: str, dtype: str, shards: list[list[int]]) -> dict:
    records = [
        {
            "file": f"{name}-{i:05d}.bin",
            "tokens": len(shard),
            "documents": len(starts),
            "bytes": 3 * len(shard),
            "sha256": _write(folder / f"{name}-{i:05d}.bin", np.array(shard, dtype).tobytes()),
            "offsets_sha256": _write(
                folder / f"{name}-{i:05d}.offsets", np.array(starts, "<u8").tobytes()
            ),
        }
        for i, (shard, starts) in enumerate(zip(shards, _starts(shards)))
    ]
    return {key: sum(r[key] for r in records) for key in COUNTS} | {"shards": records}


def _starts(shards: list[list[int]]) -> list[list[int]]:
    """Places in each shard where a document begins: all that come after an EOS."""
    starts, previous = [], None
    for shard in shards:
        before = [previous, *shard[:-1]]
        starts.append([i for i, token in enumerate(before) if token == EOS])
        previous = shard[-1]
    return starts


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
