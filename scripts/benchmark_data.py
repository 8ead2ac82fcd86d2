"""Measures preparation and loading against what bounds them.

    python scripts/benchmark_data.py [--speed_mb=400] [--memory_mb=10,500] [--rounds=3]
    python scripts/benchmark_data.py --latency_ms=50

  preparation  CPU time of all processes, and wall time, over those of SentencePiece's own encode
               for the same documents in memory on as many cores; from .json.gz as C4's and from
               TFDS's two formats. In turns, so that other work on the machine meets all of them;
               the median of the rounds. With several cores the start of the workers counts
  memory       peak of a process that prepares, for several amounts of text
  loader       rows/s of 1,024 tokens in batches of 1,024 rows, put on the device, over what a host
               of the 301m model on TPU v5e could consume at the peak of its chips; and the seconds
               waited for data by a consumer 20 times as fast as that host

With --latency_ms, in place of all this: rows/s of one host that reads from a bucket so far away,
beside what the hosts of three slices take at the bounds of docs/plans.md.

Text is made of the embedded corpus, cut anew with the lengths of web documents.
"""

import argparse
import functools
import gzip
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import sentencepiece

from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare
from data.preparation.workers import cores
from data.reading.store import TokenStore
from data.sources import corpus
from data.tokenizer import train_tokenizer
from scripts import benchmark_bucket

FILES, VOCAB_SIZE = 8, 8_000
SEQ_LEN, BATCH_SIZE, STEPS, SPEED_UP = 1024, 1024, 30, 20
CHIPS = 4  # of a host, in slices of v5e with several hosts
KINDS = ("json.gz", "tfrecord", "array_record")
OTHERS = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://www.example.com/a/page-12345.html"}
PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare

if __name__ == "__main__":
    source, output, tokenizer, workers = sys.argv[2:]
    prepare(StoreConfig(source, tokenizer=tokenizer), output, workers=int(workers))
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    own = status["VmHWM"].split()[0]  # ru_maxrss would begin with that of the process before
    print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed_mb", type=int, default=400, help="text to prepare (400)")
    parser.add_argument("--memory_mb", default="10,500", help="amounts of text (10,500)")
    parser.add_argument("--rounds", type=int, default=3, help="of preparation (3)")
    parser.add_argument("--latency_ms", type=float, help="before each request of a reading host")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.latency_ms is not None:
            benchmark_bucket.measure(folder / "store", arguments.latency_ms / 1000)
            return 0
        tokenizer = folder / "tokenizer.model"
        train_tokenizer(corpus.documents("train"), tokenizer, VOCAB_SIZE)
        compare_speed(folder, tokenizer, arguments.speed_mb * 10**6, arguments.rounds)
        for kind, size in itertools.product(KINDS, map(int, arguments.memory_mb.split(","))):
            measure_memory(folder, kind, tokenizer, size * 10**6)
        measure_loader(TokenStore(folder / "json.gz-1-0"))
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


def write_source(folder: Path, kind: str, num_bytes: int) -> str:
    """Writes C4 in small, in files of one of the KINDS; returns what `prepare` finds it by."""
    if kind == "json.gz":
        _write_json_gz(folder, num_bytes // FILES)
        return str(folder)
    _write_tfds(folder, kind, num_bytes // FILES)
    os.environ["TFDS_DATA_DIR"] = str(folder)
    return "c4"


def _write_json_gz(folder: Path, file_bytes: int) -> None:
    folder.mkdir()
    for i in range(FILES):
        split = "train" if i else "validation"
        with gzip.open(folder / f"c4-{split}.{i:05d}.json.gz", "wb", compresslevel=6) as file:
            for text in documents(file_bytes, seed=i):
                file.write(json.dumps({"text": text} | OTHERS).encode() + b"\n")


def _write_tfds(folder: Path, file_format: str, file_bytes: int) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder("c4/en:3.1.0", data_dir=str(folder), file_format=file_format)
    Path(builder.data_dir).mkdir(parents=True)
    others = OTHERS | {"content-type": "text/html", "content-length": "12345"}
    per_file = sum(1 for _ in documents(file_bytes))
    writer = tfds.core.SequentialWriter(builder.info, per_file, file_format=file_format)
    writer.initialize_splits(["train", "validation"])
    for i in range(FILES):
        examples = ({"text": text} | others for text in documents(file_bytes, seed=i))
        writer.add_examples({"train" if i else "validation": examples})
    writer.close_all()


def compare_speed(folder: Path, tokenizer: Path, num_bytes: int, rounds: int) -> None:
    """Prints how much longer preparation takes than SentencePiece alone, for every kind of file."""
    texts = [text for i in range(FILES) for text in documents(num_bytes // FILES, seed=i)]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))

    def encode(workers: int) -> None:
        for start in range(0, len(texts), 1024):
            processor.encode(texts[start : start + 1024], num_threads=workers)

    def run(kind: str, workers: int, number: int) -> None:
        if kind != "json.gz":
            os.environ["TFDS_DATA_DIR"] = str(folder / kind)
        output = folder / f"{kind}-{workers}-{number}"
        prepare(StoreConfig(sources[kind], tokenizer=tokenizer), output, workers=workers)

    sources = {kind: write_source(folder / kind, kind, num_bytes) for kind in KINDS}
    for workers in sorted({1, cores()}):
        measured = [
            [_seconds(encode, workers), *(_seconds(run, kind, workers, i) for kind in KINDS)]
            for i in range(rounds)
        ]
        ratios = np.median(
            [[times / row[0] for times in row] for row in np.array(measured)], axis=0
        )
        cpu, wall = np.median(measured, axis=0)[0]
        print(
            f"SentencePiece alone, {workers} of {cores()} cores: "
            f"{num_bytes / 1e6 / cpu:.1f} MB per CPU second, {num_bytes / 1e6 / wall:.1f} MB/s"
        )
        for kind, (cpu, wall) in zip(KINDS, ratios[1:]):
            print(
                f"preparation, {workers} of {cores()} cores, {kind}: "
                f"{cpu:.2f} times its CPU time, {wall:.2f} times its wall time",
                flush=True,
            )


def _seconds(function: Callable[..., None], *arguments: Any) -> np.ndarray:
    """CPU time of this process and those that it ran, and wall time."""
    before = np.array([sum(os.times()[:4]), time.perf_counter()])
    function(*arguments)
    return np.array([sum(os.times()[:4]), time.perf_counter()]) - before


def measure_memory(folder: Path, kind: str, tokenizer: Path, num_bytes: int) -> None:
    """Prints the peaks of the first process and of the largest worker."""
    label = f"{kind}-{num_bytes // 10**6}MB"
    source = write_source(folder / label, kind, num_bytes)
    script = folder / "peak.py"
    script.write_text(PEAK)
    for workers in (1, 2):
        command = [script, ROOT, source, folder / f"{label}-{workers}", tokenizer, workers]
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, check=True
        )
        own, largest = (int(kib) / 1024 for kib in done.stdout.split())
        worker = f", largest worker {largest:.0f} MiB" if workers > 1 else ""
        print(
            f"memory, {num_bytes // 10**6} MB of {kind}, {workers} workers: {own:.0f} MiB{worker}",
            flush=True,
        )


def measure_loader(store: TokenStore) -> None:
    """Prints rows/s of the loader over what a host consumes, and what a faster host would wait."""
    from data.reading.loader import train_batches  # imports jax

    consumed = host_rows_per_second()
    start = functools.partial(
        train_batches,
        store.split("train"),
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        seed=0,
        start_step=0,
        stop_step=STEPS,
        segment_ids=True,
        eos_id=store.eos_id,
    )
    with start() as batches:
        began = time.perf_counter()
        for _, batch in batches:
            batch["inputs"].block_until_ready()
        speed = STEPS * BATCH_SIZE / (time.perf_counter() - began)
    print(
        f"loader: {speed:,.0f} rows/s, {speed / consumed:.0f} times the {consumed:.0f} rows/s of "
        f"{CHIPS} chips of v5e at their peak"
    )
    with start() as batches:
        next(batches)
        before = batches.seconds_waited
        began = time.perf_counter()
        for _ in batches:
            time.sleep(BATCH_SIZE / consumed / SPEED_UP)
        elapsed, waited = time.perf_counter() - began, batches.seconds_waited - before
    print(
        f"loader: a host {SPEED_UP} times as fast would wait for data {waited:.2f} s of "
        f"{elapsed:.1f} s"
    )


def host_rows_per_second() -> float:
    """What a host of the 301m model could consume, were all of its chips' FLOP/s of use."""
    from configs import c4
    from laser.training import hardware
    from laser.training.config import load_config
    from models.decoder import train_flops_per_token

    model = load_config(c4.get_config("size=301m")).model
    row_flops = train_flops_per_token(model, SEQ_LEN) * SEQ_LEN
    return CHIPS * hardware.CHIPS["TPU v5 lite"].flops / row_flops


if __name__ == "__main__":
    sys.exit(main())
