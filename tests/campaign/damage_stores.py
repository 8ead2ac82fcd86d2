"""Damages token stores, unfinished ones, their sources and exports in every way, and interrupts.

    python -m tests.campaign.damage_stores --tries=20

Each file of a finished store, of a preparation that was killed, of its source and of an exported
model is damaged in each of the six ways, so many times. Bad would be other rows, other parameters
or a store that differs from the one that an undisturbed preparation makes, without a word; or a
traceback. Then preparations are stopped by Ctrl-C at random moments. Ends with 0 if nothing was
bad.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.preparation import prepare as prepare_module
from data.preparation.config import StoreConfig
from data.preparation.prepare import prepare
from data.reading.store import StoreChangedError, TokenStore
from data.sources import corpus, text_files
from data.tokenizer import train_tokenizer
from tests.campaign.damage import ROOT, Trial, Verdict, Way, damage, files_of, report

DOCUMENTS = 240


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=5, help="of each way, for each file (5)")
    parser.add_argument("--kills", type=int, default=20, help="by Ctrl-C (20)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    rng = random.Random(arguments.seed)
    text_files.MIN_PART = 2**15  # several parts of little text
    with tempfile.TemporaryDirectory() as folder:
        made = _Made(Path(folder))
        trials: list[Trial] = []
        for campaign in (_stores, _stores_being_read, _unfinished, _sources, _exports):
            trials += campaign(made, rng, arguments.tries)
        trials += _interrupted(made, rng, arguments.kills)
    return report(trials)


class _Made:
    """What is damaged, each with another one of its kind, to take other bytes from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.source, self.other_source = self._source("source", 0), self._source("other", 1)
        self.tokenizer = folder / "tokenizer.model"
        train_tokenizer(corpus.documents("validation"), self.tokenizer, 400)
        self.store = folder / "store"
        self.prepared(self.source, self.store)
        self.other_store = folder / "other_store"
        self.prepared(self.other_source, self.other_store)

    def prepared(self, source: Path, output: Path) -> dict[str, bytes]:
        """Prepares, or goes on with it, and returns the content of all files."""
        config = StoreConfig(str(source), tokenizer=self.tokenizer, drop_duplicates=True)
        prepare(config, output, workers=1)
        return _contents(output)

    def _source(self, name: str, start: int) -> Path:
        """Files of lines and of one text each, with duplicates among them."""
        folder = self.folder / name
        folder.mkdir()
        texts = [text for _, text in zip(range(DOCUMENTS), corpus.documents("train"))]
        texts = [f"{start} {text}" for text in texts]
        for i in range(4):
            lines = [json.dumps({"text": text}) + "\n" for text in texts[i : i + 120 : 2]]
            (folder / f"{i}.jsonl").write_text("".join(lines))
        for i in range(4):
            (folder / f"{i}.txt").write_text(texts[200 + i])
        return folder


def _stores(made: _Made, rng: random.Random, tries: int) -> list[Trial]:
    """A finished store is damaged and then opened."""
    right = _rows(made.store)
    return [
        _judged("store", told, functools.partial(_rows, copy), right)
        for copy, told in _damaged(made.folder, made.store, made.other_store, rng, tries)
    ]


def _stores_being_read(made: _Made, rng: random.Random, tries: int) -> list[Trial]:
    """A store is opened, read, damaged and read on."""
    trials = []
    for name in (path.name for path in files_of(made.store)):
        for way in Way:
            for read_before in [True, False] * tries:
                with _copy(made.folder, made.store) as copy:
                    store = TokenStore(copy)
                    right = _rows(store if read_before else made.store)
                    told = damage(copy / name, way, rng, _counterpart(made.other_store, name))
                    read_on = functools.partial(_rows, store)
                    trials.append(_judged("store being read", told, read_on, right))
    return trials


def _unfinished(made: _Made, rng: random.Random, tries: int) -> list[Trial]:
    """A preparation is killed at a random write, a file of it damaged, and the same one goes on."""
    trials = []
    right = _contents(made.store)
    for way in Way:
        for _ in range(10 * tries):
            with _killed(made, rng) as killed:
                path = rng.choice(files_of(killed))
                others = [p for p in files_of(killed) if p != path] or [made.tokenizer]
                alike = [p for p in others if p.suffix == path.suffix] or others
                told = damage(path, way, rng, rng.choice(alike))
                go_on = functools.partial(made.prepared, made.source, killed)
                trials.append(_judged("unfinished store", told, go_on, right))
    return trials


def _sources(made: _Made, rng: random.Random, tries: int) -> list[Trial]:
    """Between a kill and the resumption a file of the source is damaged: the store must be that of
    the source as it is now, made in one go."""
    trials = []
    for way in Way:
        for _ in range(10 * tries):
            with _copy(made.folder, made.source) as source, _killed(made, rng, source) as killed:
                path = rng.choice(files_of(source))
                told = damage(path, way, rng, made.other_source / path.name)
                fresh = made.folder / "fresh"
                right: dict[str, bytes] = {}
                with contextlib.suppress(ValueError):  # perhaps nothing can be made of it
                    right = made.prepared(source, fresh)
                shutil.rmtree(fresh, ignore_errors=True)
                go_on = functools.partial(made.prepared, source, killed)
                trials.append(_judged("source", told, go_on, right))
    return trials


def _exports(made: _Made, rng: random.Random, tries: int) -> list[Trial]:
    """A file of an exported model is damaged and the model imported."""
    from tests.export.test_export import MODELS, exported

    trials = []
    for name in ("gpt2", "laser"):
        one, other = made.folder / name, made.folder / f"{name}-other"
        exported(one, made.store, MODELS[name])
        exported(other, made.store, MODELS[name], seed=1)

        right = _imported(one)
        trials += [
            _judged(f"export, {name}", told, functools.partial(_imported, copy), right)
            for copy, told in _damaged(made.folder, one, other, rng, tries)
        ]
    return trials


def _imported(folder: Path) -> str:
    import jax

    from export.folder import load_exported

    config, params = load_exported(folder)
    tokenizer = (folder / "tokenizer.model").read_bytes()
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]
    return _digest([repr(config).encode(), tokenizer, *leaves])


def _interrupted(made: _Made, rng: random.Random, kills: int) -> list[Trial]:
    """Ctrl-C at random moments, until the same command has prepared the store."""
    trials = []
    output = made.folder / "interrupted"
    command = [
        sys.executable, str(ROOT / "scripts" / "prepare_data.py"), f"--source={made.source}",
        f"--output={output}", "--vocab_size=600", "--workers=2",
    ]  # fmt: skip
    for i in range(kills):
        process = subprocess.Popen(
            ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command],  # as in the background
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        time.sleep(rng.uniform(0.1, 3.0))
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            trials.append(Trial(f"number {i}", "Ctrl-C", Verdict.HUNG))
            continue
        finished = process.returncode == 0  # before it came
        said = process.returncode == -signal.SIGINT and "stopped; what is" in errors
        bad = "Traceback" in errors or not (finished or said)
        verdict = Verdict.UGLY if bad else Verdict.SAME if finished else Verdict.REFUSED
        trials.append(Trial(f"number {i}", "Ctrl-C", verdict, errors[-300:]))
        if finished:
            shutil.rmtree(output)
    subprocess.run(command, check=True, capture_output=True)
    reference = made.folder / "reference"
    command[3] = f"--output={reference}"
    subprocess.run(command, check=True, capture_output=True)
    same = _contents(output) == _contents(reference)
    verdict = Verdict.SAME if same else Verdict.WRONG
    return [*trials, Trial("the store in the end", "Ctrl-C", verdict)]


def _damaged(
    folder: Path, one: Path, other: Path, rng: random.Random, tries: int
) -> Iterator[tuple[Path, str]]:
    """Copies of a folder with one file damaged, and what was done."""
    for path in files_of(one):
        for way in Way:
            for _ in range(tries):
                with _copy(folder, one) as copy:
                    told = damage(copy / path.name, way, rng, _counterpart(other, path.name))
                    yield copy, told


def _counterpart(folder: Path, name: str) -> Path:
    """The file of that name in another folder, or one of its kind."""
    alike = [path for path in files_of(folder) if path.suffix == Path(name).suffix]
    return next((path for path in alike if path.name == name), alike[0])


@contextlib.contextmanager
def _copy(folder: Path, original: Path) -> Iterator[Path]:
    copy = folder / "copy"
    shutil.copytree(original, copy)
    yield copy
    shutil.rmtree(copy)


@contextlib.contextmanager
def _killed(made: _Made, rng: random.Random, source: Path | None = None) -> Iterator[Path]:
    """A store whose preparation ended at one of its writes."""
    output = made.folder / "killed"
    write_json, left = prepare_module.write_json, rng.randint(2, 10)

    def counted(path: Path, content: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        if left == 0 or path.name == "manifest.json":
            raise KeyboardInterrupt
        write_json(path, content)

    prepare_module.write_json = counted  # type: ignore[assignment]
    try:
        with contextlib.suppress(KeyboardInterrupt):
            made.prepared(source or made.source, output)
    finally:
        prepare_module.write_json = write_json
    yield output
    shutil.rmtree(output)


def _judged(group: str, told: str, result: Callable[[], Any], right: Any) -> Trial:
    try:
        verdict, detail = Verdict.SAME if result() == right else Verdict.WRONG, ""
    except (ValueError, StoreChangedError) as error:
        is_one_line = "\n" not in str(error) and str(error)
        verdict, detail = Verdict.REFUSED if is_one_line else Verdict.UGLY, str(error)
    except Exception as error:
        verdict, detail = Verdict.UGLY, repr(error)
    return Trial(told, group, verdict, detail)


def _rows(opened: TokenStore | Path) -> str:
    """All that can be read of a store."""
    store = TokenStore(opened) if isinstance(opened, Path) else opened
    parts = [store.fingerprint.encode(), f"{store.eos_id} {store.pad_id}".encode()]
    for name in ("train", "validation"):
        split = store.split(name)
        count = split.num_rows(64, partial=True)
        rows, valid = split.padded_rows(range(count), 64, store.pad_id)
        lengths = np.concatenate(list(split.document_lengths()))
        parts += [rows.tobytes(), valid.tobytes(), lengths.tobytes(), str(split.num_bytes).encode()]
    return _digest(parts)


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files_of(folder)}


if __name__ == "__main__":
    sys.exit(main())
