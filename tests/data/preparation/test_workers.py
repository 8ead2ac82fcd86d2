"""Worker processes: what fails or dies in one ends the run, and files need no TensorFlow."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

WITHOUT = """
import sys
from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare
source, output, tokenizer = sys.argv[1:]
prepare(StoreConfig(source, tokenizer=tokenizer, validation_fraction=0.2), output)
print(*sys.modules)
"""


def test_files_are_prepared_without_tensorflow(tmp_path, tokenizer_path):
    source = tmp_path / "source"
    source.mkdir()
    lines = "".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(50))
    (source / "a.jsonl").write_text(lines)
    command = [sys.executable, "-c", WITHOUT, source, tmp_path / "store", tokenizer_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "data.preparation.prepare" in loaded
    assert not loaded & {"tensorflow", "seqio", "tensorflow_datasets", "datasets", "jax"}


DYING = """
import os, sys
sys.path.insert(0, sys.argv[1])
from data.sources.parts import Part
from data.preparation.workers import run_parts

def job(part, threads, progress):
    progress(1, 1)
    if part.index == 3:
        os._exit(9) if sys.argv[2] == "die" else 1 / 0
    return part.index

if __name__ == "__main__":
    parts = [Part(i, 1, {}, None) for i in range(6)]
    print([result for _, result in run_parts(job, parts, 2, "test", 6)])
"""


@pytest.mark.parametrize(
    "how, message",
    [("die", "RuntimeError: a worker process died"), ("raise", "ZeroDivisionError")],
)
def test_a_worker_that_fails_or_dies_ends_it_all(tmp_path, how, message):
    script = tmp_path / "script.py"
    script.write_text(DYING)
    done = subprocess.run(
        [sys.executable, script, ROOT, how], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert message in done.stderr


STARTING = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
if __name__ != "__main__":  # a worker, before it has read what it should do
    os._exit(9) if sys.argv[2] == "die" else time.sleep(1000)
from data.sources.parts import Part
from data.preparation.workers import run_parts

class Job:
    def __init__(self):
        self.content = bytes(2**22)  # more than a pipe holds

    def __call__(self, part, threads, progress):
        pass

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it was ignored
    print("starting", flush=True)
    list(run_parts(Job(), [Part(i, 1, {}, None) for i in range(6)], 2, "test", 6))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["die", "hang"])
def test_workers_that_never_get_to_work_do_not_hold_it_up(tmp_path, how):
    """They die while they start, or Ctrl-C comes while they do."""
    script = tmp_path / "script.py"
    script.write_text(STARTING)
    process = subprocess.Popen(
        [sys.executable, script, ROOT, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "starting\n"
        if how == "hang":
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while len(children.read_text().split()) < 2:  # the first is multiprocessing's own
                time.sleep(0.001)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    expected = "KeyboardInterrupt" if how == "hang" else "RuntimeError: a worker process died (exit"
    assert expected in errors.splitlines()[-1]
    assert process.returncode == (-signal.SIGINT if how == "hang" else 1)
