"""Measures preparation and loading against what bounds them.

    python scripts/benchmark_data.py [--speed_mb=100] [--memory_mb=10,500] [--consumed=150]

  preparation  time over that of SentencePiece's own encode for the same documents in memory, on one
               core and on all; the text is read from .json.gz as C4's
  memory       peak of a process that prepares, for several amounts of text
  loader       rows/s of 1,024 tokens in batches of 1,024 rows, put on the device, over what a host
               consumes. 150 rows/s is about what the 301m model takes on a host of four v5e chips:
               4 · 197 TFLOP/s · 0.4 / (2.1 GFLOP a token · 1,024)

Text is made of the embedded corpus, cut anew with the lengths of web documents. Other work on the
machine shows in the numbers, so times are the best of three.
"""

import argparse
import functools
import gzip
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sentencepiece

from data import corpus
from data.prepare import prepare
from data.store import TokenStore
from data.tokenizer import train_tokenizer
from data.workers import cores

FILES, REPEATS, VOCAB_SIZE = 8, 3, 8_000
SEQ_LEN, BATCH_SIZE, STEPS = 1024, 1024, 30
PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from data.prepare import prepare

if __name__ == "__main__":
    prepare(sys.argv[2], sys.argv[3], tokenizer=sys.argv[4], workers=int(sys.argv[5]))
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    own = status["VmHWM"].split()[0]  # ru_maxrss would begin with that of the process before
    print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed_mb", type=int, default=100, help="text to prepare (100)")
    parser.add_argument("--memory_mb", default="10,500", help="amounts of text (10,500)")
    parser.add_argument("--consumed", type=float, default=150, help="rows/s of a host (150)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer.model"
        train_tokenizer(corpus.documents("train"), tokenizer, VOCAB_SIZE)
        compare_speed(folder, tokenizer, arguments.speed_mb * 10**6)
        for size in map(int, arguments.memory_mb.split(",")):
            measure_memory(folder, tokenizer, size * 10**6)
        measure_loader(TokenStore(folder / "speed-1"), arguments.consumed)
    return 0


def documents(num_bytes: int, seed: int = 0) -> Iterator[str]:
    """About so many bytes of text, in documents whose lengths are spread as those of C4."""
    words = _words()
    rng = random.Random(seed)
    while num_bytes > 0:
        count = int(rng.lognormvariate(5.5, 1.0)) + 1
        start = rng.randrange(len(words) - count)
        text = " ".join(words[start : start + count])
        num_bytes -= len(text)
        yield text


@functools.cache
def _words() -> list[str]:
    return " ".join(corpus.documents("train")).split(" ")


def write_files(folder: Path, num_bytes: int) -> None:
    """C4's layout: .json.gz, one file of validation beside those of the train split."""
    folder.mkdir()
    for i in range(FILES):
        split = "train" if i else "validation"
        with gzip.open(folder / f"c4-{split}.{i:05d}.json.gz", "wb", compresslevel=6) as file:
            for text in documents(num_bytes // FILES, seed=i):
                file.write(json.dumps({"text": text, "url": "x"}).encode() + b"\n")


def compare_speed(folder: Path, tokenizer: Path, num_bytes: int) -> None:
    """Prints times of preparation and of SentencePiece alone."""
    write_files(folder / "speed", num_bytes)
    texts = [t for i in range(FILES) for t in documents(num_bytes // FILES, seed=i)]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    for workers in sorted({1, cores()}):
        encoding = _best(functools.partial(processor.encode, texts, num_threads=workers))
        stores = iter(range(1, REPEATS + 1))

        def run(workers: int = workers, stores: Iterator[int] = stores) -> None:
            output = folder / (f"speed-{next(stores)}" if workers == 1 else f"all-{next(stores)}")
            prepare(str(folder / "speed"), output, tokenizer=tokenizer, workers=workers)

        preparing = _best(run)
        print(
            f"preparation, {workers} of {cores()} cores: {num_bytes / preparing / 1e6:.1f} MB/s; "
            f"SentencePiece alone {num_bytes / encoding / 1e6:.1f} MB/s; "
            f"ratio of times {preparing / encoding:.2f}",
            flush=True,
        )


def measure_memory(folder: Path, tokenizer: Path, num_bytes: int) -> None:
    """Prints the peaks of the first process and of the largest worker."""
    label = f"{num_bytes // 10**6}MB"
    write_files(folder / label, num_bytes)
    script = folder / "peak.py"
    script.write_text(PEAK)
    for workers in (1, 2):
        command = [script, ROOT, folder / label, folder / f"{label}-{workers}", tokenizer, workers]
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, check=True
        )
        own, largest = (int(kib) / 1024 for kib in done.stdout.split())
        worker = f", largest worker {largest:.0f} MiB" if workers > 1 else ""
        print(f"memory, {label} of text, {workers} workers: {own:.0f} MiB{worker}", flush=True)


def measure_loader(store: TokenStore, consumed: float) -> None:
    """Prints rows/s of the loader, and how many times over they would feed a host."""
    from data.loader import train_batches  # imports jax

    with train_batches(
        store.split("train"),
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        seed=0,
        start_step=0,
        stop_step=STEPS + 5,
        segment_ids=True,
        eos_id=store.eos_id,
    ) as batches:
        for _ in range(5):
            next(batches)
        began = time.perf_counter()
        for _, batch in batches:
            batch["inputs"].block_until_ready()
        speed = STEPS * BATCH_SIZE / (time.perf_counter() - began)
    print(f"loader: {speed:,.0f} rows/s, {speed / consumed:.0f} times {consumed:g} rows/s")


def _best(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
