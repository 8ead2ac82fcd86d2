"""Shows what a token store holds, and what the model reads at a step.

    python scripts/inspect_data.py stores/c4 --step=1000 --rows=2
    python scripts/inspect_data.py stores/c4 --verify
    python scripts/inspect_data.py stores/web:0.7,stores/code:0.3 --step=1000

Prints counts of each split, the loss that frequencies of tokens alone reach, a histogram of
document lengths as a PNG, and rows of the step's global batch as text. A mark in the text says
where a document begins and which one it is, so that packing and shuffling can be seen. The order is
that of training with the same seed, batch size and length.
With --verify it reads all files and compares them with their checksums; stores of up to 16 GiB are
compared at every start of training, too.
Exit codes: 0 done, 2 mistake in the command line or the store, 130 stopped by Ctrl-C, 1 anything
else.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from laser.training.console import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c("stopped")

import numpy as np

from data.reading import mixture
from data.reading.order import BLOCK_ROWS
from data.reading.store import Split, TokenStore
from data.tokenizer import Tokenizer

BINS_PER_OCTAVE = 4
OCTAVES = 32  # documents of up to 4 billion tokens
COUNTED = 2**26  # tokens of a split whose frequencies are counted


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "store", help="folder of a token store, or a mixture of several, a:0.7,b:0.3"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare all files with their checksums, no more"
    )
    parser.add_argument("--step", type=int, default=0, help="counted from 0")
    parser.add_argument("--rows", type=int, default=2, help="of the batch to show (2)")
    parser.add_argument("--seq_len", type=int, default=1024, help="tokens of a row (1024)")
    parser.add_argument("--batch_size", type=int, default=1024, help="rows of a step (1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (0)")
    parser.add_argument(
        "--block_rows", type=int, default=BLOCK_ROWS, help=f"data.block_rows ({BLOCK_ROWS})"
    )
    parser.add_argument("--png", help="histogram of lengths (default: STORE-lengths.png beside it)")
    arguments = parser.parse_args(argv)
    try:
        parts = mixture.parse(arguments.store)
        if arguments.png and len(parts) > 1:
            parser.error(
                f"--png={arguments.png}: there is a picture for each of {len(parts)} stores"
            )
        stores = [TokenStore(part.path) for part in parts]
        if arguments.verify:
            for part, store in zip(parts, stores):
                verify(part.path, store)
            return 0
        rows = step_rows(
            stores, [part.share for part in parts], arguments.step, arguments.rows,
            arguments.seq_len, arguments.batch_size, arguments.seed, arguments.block_rows,
        )  # fmt: skip
        for part, store in zip(parts, stores):
            if len(parts) > 1:
                print(f"{part.path}, {float(part.share):.1%} of the rows")
            describe(part.path, store, arguments.seq_len, arguments.png)
        for row in rows:
            print(f"\n{row}")
    except ValueError as error:
        print(f"inspect_data.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a file of the store has changed meanwhile; no place for the picture
        print(f"inspect_data.py: {error}", file=sys.stderr)
        return 1
    return 0


def verify(folder: str, store: TokenStore) -> None:
    """Raises ValueError if a file of the store is not as it was written."""
    if not store.is_verified:
        store.verify()
    print(f"{folder}: every file is as it was written; fingerprint {store.fingerprint}")


def describe(folder: str, store: TokenStore, seq_len: int, png: str | None) -> None:
    """Prints what a store holds, and draws the lengths of its documents."""
    # Beside a folder; of an address only the name is left.
    whole = Path(folder.rpartition("/")[2] if "://" in folder else folder).resolve()
    picture = Path(png or f"{whole}-lengths.png")
    counts = {name: length_counts(store.split(name)) for name in store.split_names}
    print("\n".join(summary(store, name, counts[name]) for name in counts))
    if len(store.split_names) > 1:
        train, validation = (
            token_counts(store.split(name), store.vocab_size) for name in ("train", "validation")
        )
        nats = frequency_loss(train, validation)
        print(f"loss of validation by the frequencies of train's tokens alone: {nats:.3f} nats")
    draw(counts, seq_len, f"Lengths of documents in {whole.name}", picture)
    print(f"lengths of documents: {picture}")


def step_rows(
    stores: Sequence[TokenStore],
    shares: Sequence[Fraction],
    step: int,
    count: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    block_rows: int,
) -> list[str]:
    """The first rows of a step's global batch, as text, of stores with their shares of the rows.

    Raises:
      ValueError: a number is out of range, or a store is shorter than a row.
    """
    splits = [store.split("train") for store in stores]
    tokenizer = Tokenizer(stores[0].tokenizer_path)
    mixed = mixture.Mixture(splits, shares)
    places = mixed.places(seed, step, batch_size, seq_len, block_rows)
    texts = []
    for i, number in enumerate(places.rows[:count].tolist()):
        k, row = mixed.located(number, seq_len)
        name = "the split" if len(stores) == 1 else stores[k].path
        text = "".join(row_pieces(splits[k], tokenizer, row, seq_len))
        texts.append(f"--- step {step}, row {i} of {batch_size}: row {row} of {name}\n{text}")
    return texts


def row_pieces(split: Split, tokenizer: Tokenizer, row: int, seq_len: int) -> Iterator[str]:
    """Text of a row, and before each document's piece a mark with its number and the token.

    A row begins with the last token of the row before it, which is often inside of a document.
    """
    (tokens,) = split.rows([row], seq_len)
    start = row * seq_len
    edges = np.flatnonzero(tokens == tokenizer.eos_id) + 1
    for begin, end in zip([0, *edges], [*edges, len(tokens)]):
        if begin < end:
            document = split.document_at(start + int(begin))
            place = "leading EOS" if document < 0 else f"document {document}"
            ends = ", to its end" if tokens[end - 1] == tokenizer.eos_id else ""
            yield f"[[{place}, {end - begin} tokens{ends}]]{tokenizer.decode(tokens[begin:end])}"


def length_counts(split: Split) -> np.ndarray:
    """Documents by length: bin b counts those of 2**(b/4) to 2**((b+1)/4) tokens with their EOS."""
    counts = np.zeros(BINS_PER_OCTAVE * OCTAVES, np.int64)
    for lengths in split.document_lengths():
        bins = np.floor(BINS_PER_OCTAVE * np.log2(lengths + 1)).astype(np.int64)
        counts += np.bincount(bins, minlength=len(counts))
    return counts


def summary(store: TokenStore, name: str, counts: np.ndarray) -> str:
    """What a split holds, in two lines."""
    split = store.split(name)
    middle = int(np.searchsorted(np.cumsum(counts), split.num_documents / 2))
    mean = (split.num_tokens - 1) / split.num_documents
    return (
        f"{name}: {split.num_tokens:,} tokens, {split.num_documents:,} documents, "
        f"{split.num_bytes:,} bytes, {split.num_bytes / split.num_tokens:.2f} bytes per token\n"
        f"  a document has {mean:,.0f} tokens on average, half of them have fewer than "
        f"{2 ** ((middle + 1) / BINS_PER_OCTAVE):,.0f}"
    )


def token_counts(split: Split, vocab_size: int) -> np.ndarray:
    """How often each token is a target in the first rows of a split."""
    length = min(4096, split.num_tokens - 1)
    counts = np.zeros(vocab_size, np.int64)
    for row in range(min(split.num_rows(length), COUNTED // length)):
        counts += np.bincount(split.rows([row], length)[0, 1:], minlength=vocab_size)
    return counts


def frequency_loss(train: np.ndarray, validation: np.ndarray) -> float:
    """Nats a token of validation, each token being counted once more in train than it is there."""
    shares = (train + 1) / (train + 1).sum()
    return float(-(validation * np.log(shares)).sum() / validation.sum())


def draw(counts: dict[str, np.ndarray], seq_len: int, title: str, png: Path) -> None:
    """Shares of documents by their length, a curve for each split, and the length of a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7.5, 4), layout="constrained")
    edges = 2 ** (np.arange(BINS_PER_OCTAVE * OCTAVES + 1) / BINS_PER_OCTAVE)
    for (name, count), color in zip(counts.items(), ("#4878a8", "#d1495b")):
        is_first = name == next(iter(counts))
        axes.stairs(
            count / count.sum(),
            edges,
            label=f"{name}, {count.sum():,} documents",
            fill=is_first,
            color=color,
            alpha=0.6 if is_first else 1.0,
            linewidth=1.6,
        )
    axes.axvline(
        seq_len, color="0.3", linewidth=1, linestyle="--", label=f"row, {seq_len:,} tokens"
    )
    used = np.flatnonzero(sum(counts.values()))
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(edges[used[0]], seq_len / 2), max(edges[used[-1] + 1], seq_len * 2))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a document, its EOS included; 4 bins an octave")
    axes.set_ylabel("share of documents")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(png, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
