"""kill -9 at random moments: what is prepared in many runs is what one run prepares."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from data.sources import corpus
from tests.system import children, contents

ROOT = Path(__file__).resolve().parents[3]
KILLS, PARTS = 10, 30
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from data.sources import text_files
from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare

if __name__ == "__main__":
    text_files.MIN_PART = 1
    source, output, tokenizer = sys.argv[2:]
    prepare(StoreConfig(source, tokenizer=tokenizer, drop_duplicates=True), output, workers=2)
"""


@pytest.fixture
def command(tmp_path, tokenizer_path):
    """Makes the command that prepares 30 files of 2 MB, a part each, into a folder."""
    source = tmp_path / "source"
    source.mkdir()
    chapters = list(corpus.documents("train"))
    for i in range(PARTS):
        texts = chapters[:9] + [f"{i} {text}" for text in chapters[i::4]]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (source / f"{i:02d}.json.zst").write_bytes(zstandard.compress(lines.encode(), 1))
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)

    def make(output: Path) -> list[str]:
        return [*map(str, (sys.executable, script, ROOT, source, output, tokenizer_path))]

    return make


def _finished(store: Path) -> tuple[int, int]:
    """Hashed parts and written ones."""
    hashes, parts = store.glob("progress/hashes/*.hashes"), store.glob("progress/part-*.json")
    return len(list(hashes)), len(list(parts))


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace(tmp_path, command):
    """At first while it starts or looks for duplicates, the last four while it writes."""
    reference, store = tmp_path / "reference", tmp_path / "store"
    subprocess.run(command(reference), check=True, stderr=subprocess.DEVNULL)
    rng = random.Random(1)
    seen = []
    for kill in range(KILLS):
        process = subprocess.Popen(command(store), stderr=subprocess.DEVNULL)
        while kill > 1 and (_finished(store) == seen[-1] or (kill > 5 and not _finished(store)[1])):
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.06) if kill > 1 else rng.uniform(0, 0.6))
        workers = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
        seen.append(_finished(store))
        assert not (store / "manifest.json").exists()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{child}").exists() for child in workers):
            assert time.monotonic() < deadline, "workers outlived the process that started them"
            time.sleep(0.01)
    assert len(set(seen)) >= KILLS - 1
    assert seen == sorted(seen)
    assert seen[2][1] == 0
    assert all(written for _, written in seen[6:])
    subprocess.run(command(store), check=True, stderr=subprocess.DEVNULL)
    assert contents(store) == contents(reference)
