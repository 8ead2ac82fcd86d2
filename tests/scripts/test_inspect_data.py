"""Rows of a step as text: every token shown once, documents told apart, in training's order."""

import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data.reading.loader import train_batches
from data.reading.mixture import Mixture
from data.reading.store import TokenStore
from data.sources import corpus
from data.tokenizer import Tokenizer
from scripts import inspect_data
from scripts.inspect_data import (
    draw,
    frequency_loss,
    length_counts,
    row_pieces,
    step_rows,
    token_counts,
)
from tests.data.padded import documents_of

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"\[\[(leading EOS|document \d+), (\d+) tokens(, to its end)?\]\]")


@pytest.mark.parametrize("shares", [[1], [Fraction(3, 4), Fraction(1, 4)]])
def test_the_rows_shown_are_those_that_training_reads(store, shares, tmp_path):
    folders = [store, shutil.copytree(store, tmp_path / "other")][: len(shares)]
    stores = [TokenStore(folder) for folder in folders]
    splits = [opened.split("train") for opened in stores]
    tokenizer = Tokenizer(stores[0].tokenizer_path)
    options = {"seq_len": 64, "batch_size": 8, "seed": 5, "block_rows": 3}
    texts = step_rows(stores, [Fraction(share) for share in shares], 7, 8, **options)
    with train_batches(
        splits[0] if len(splits) == 1 else Mixture(splits, shares), start_step=7, stop_step=8,
        segment_ids=False, eos_id=stores[0].eos_id, **options,
    ) as batches:  # fmt: skip
        _, batch = next(batches)
    assert len(texts) == 8
    for i, text in enumerate(texts):
        heading, _, shown = text.partition("\n")
        assert heading.startswith(f"--- step 7, row {i} of 8: row ")
        row = [*np.array(batch["inputs"])[i], np.array(batch["targets"])[i, -1]]
        assert MARK.sub("", shown) == tokenizer.decode(row)
    if len(splits) > 1:
        assert sum(f" of {folders[1]}\n" in text for text in texts) == 2


def test_the_loss_that_frequencies_reach(store):
    opened = TokenStore(store)
    counted = []
    for name in ("train", "validation"):
        split = opened.split(name)
        documents = documents_of(split)
        tokens = [token for document in documents for token in [*document, opened.eos_id]]
        whole = (split.num_tokens - 1) // 4096 * 4096 or split.num_tokens - 1
        counted.append(np.bincount(tokens[:whole], minlength=400))
        np.testing.assert_array_equal(token_counts(split, 400), counted[-1])
    train, validation = counted
    shares = [(train[token] + 1) / (train.sum() + 400) for token in range(400)]
    nats = -sum(n * np.log(share) for n, share in zip(validation, shares)) / validation.sum()
    assert frequency_loss(train, validation) == pytest.approx(nats)
    assert nats < np.log(400)


def test_every_document_is_marked_where_it_begins(store):
    opened = TokenStore(store)
    split, tokenizer = opened.split("train"), Tokenizer(opened.tokenizer_path)
    shown, names = "", []
    for row in range(split.num_rows(1000)):
        pieces = "".join(row_pieces(split, tokenizer, row, 1000))
        marks = MARK.findall(pieces)
        assert sum(int(count) for _, count, _ in marks) == 1001
        names += [name for name, _, _ in marks if not names or name != names[-1]]
        shown += MARK.sub("", pieces)
    count = split.document_at(split.num_rows(1000) * 1000) + 1
    assert names == ["leading EOS", *(f"document {i}" for i in range(count))]
    first = tokenizer.decode(documents_of(split)[0])
    assert first in set(corpus.documents("train"))
    assert shown.startswith(first[:500])


def test_lengths_are_counted_in_the_right_bins(store, tmp_path):
    split = TokenStore(store).split("train")
    counts = length_counts(split)
    lengths = np.concatenate(list(split.document_lengths())) + 1
    assert counts.sum() == split.num_documents
    for b in np.flatnonzero(counts):
        low, high = 2 ** (b / 4), 2 ** ((b + 1) / 4)
        assert counts[b] == ((lengths >= low) & (lengths < high)).sum()
    assert lengths.sum() == split.num_tokens - 1
    draw({"train": counts}, 64, "x", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def _script(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "inspect_data.py"), *map(str, arguments)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


def test_the_script_shows_counts_rows_and_a_picture(store, tmp_path):
    png = tmp_path / "lengths.png"
    result = _script(store, "--step=2", "--rows=1", "--seq_len=128", f"--png={png}")
    assert result.returncode == 0, result.stderr
    split = TokenStore(store).split("train")
    assert f"train: {split.num_tokens:,} tokens, {split.num_documents:,} docu" in result.stdout
    assert "validation: " in result.stdout
    assert len(MARK.findall(result.stdout)) >= 1
    assert png.is_file()


@pytest.mark.parametrize("verified_bytes", [0, 2**34])  # a store that is large, and a small one
def test_a_store_is_verified_on_request(store, tmp_path, monkeypatch, capsys, verified_bytes):
    monkeypatch.setattr("data.reading.store.VERIFIED_BYTES", verified_bytes)
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    assert inspect_data.main([str(copy), "--verify"]) == 0
    fingerprint = TokenStore(copy).fingerprint
    expected = f"{copy}: every file is as it was written; fingerprint {fingerprint}\n"
    assert capsys.readouterr().out == expected
    path = copy / "train-00000.bin"
    path.write_bytes(path.read_bytes()[::-1])
    assert inspect_data.main([str(copy), "--verify"]) == 2
    assert f"error: {path} is corrupt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["/nowhere"], "no finished token store"),
        (["STORE", "--step=-1"], "step=-1"),
        (["STORE", "--seq_len=100000000"], "num_rows=0"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(store, arguments, reason):
    result = _script(*(store if a == "STORE" else a for a in arguments))
    assert result.returncode == 2
    assert result.stderr.startswith("inspect_data.py: error: ")
    assert reason in result.stderr
