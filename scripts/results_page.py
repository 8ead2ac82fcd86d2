"""Remakes the tables of docs/results.md from the raw numbers in docs/results/.

    python scripts/results_page.py            # writes the page
    python scripts/results_page.py --check    # exits with 1 if a table is not that of its numbers

On the page, what stands between `<!-- tables of NAME.json -->` and `<!-- end -->` is made from
docs/results/NAME.json, a study's numbers.json as scripts/study.py --report writes it; and so is
`<!-- inspection of NAME.json -->`, from scripts/inspect_attention.py. The rest is written by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from laser.training.folders import write_atomically
from scripts.inspect_attention import report
from study.report import read_numbers
from study.tables import all_tables

MARKED = re.compile(
    r"(<!-- (?P<kind>tables|inspection) of (?P<name>[\w-]+\.json) -->\n)"
    r"(?:(?!<!--).)*(?P<end><!-- end -->)",
    re.DOTALL,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args(argv)
    try:
        old = arguments.page.read_text(encoding="utf-8")
        new = remade(old, arguments.page.with_suffix(""))
    except (OSError, ValueError) as error:
        print(f"results_page.py: error: {error}", file=sys.stderr)
        return 2
    if arguments.check and new != old:
        print(f"{arguments.page}: a table is not that of its numbers; run results_page.py")
        return 1
    if not arguments.check:
        write_atomically(arguments.page, new)
    return 0


def remade(page: str, numbers: Path) -> str:
    """The page with its tables made anew from the files in a folder. Raises ValueError where
    numbers are damaged, or the page has no place for tables."""
    marks, found = page.count("<!--"), len(MARKED.findall(page))
    if not found or marks != 2 * found:
        raise ValueError(
            f"{found} places between `<!-- tables of NAME.json -->`, or `inspection of`, and "
            f"`<!-- end -->`, and {marks} comments: each needs both of its lines"
        )

    def tables(match: re.Match[str]) -> str:
        if match["kind"] == "tables":
            made = all_tables(read_numbers(numbers / match["name"]))
        else:
            made = f"```\n{report(json.loads((numbers / match['name']).read_text()))}\n```"
        return f"{match[1]}\n{made}\n\n{match['end']}"

    return MARKED.sub(tables, page)


if __name__ == "__main__":
    sys.exit(main())
