"""Checks a run's folder, and takes back checkpoints that were set aside and are intact after all.

    python scripts/verify_run.py runs/laser

Reads every checkpoint against its checksums, whatever its size, in little memory, and config,
tokenizer and metrics. Only what was set aside as N.unreadable may be moved, back to checkpoints/N.
Exit codes: 0 all is intact, 1 something is not, 2 mistake in the command line.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from laser.training.folders import folder_of
from laser.training.lease import claim
from laser.training.run_folder import UNREADABLE
from laser.training.verification import checkpoint_problems, checkpoints_of, other_problems


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    workdir = folder_of(parser.parse_args(argv).run)
    if not workdir.is_dir():
        parser.error(f"{workdir}: no such folder")
    problems = other_problems(workdir)
    for problem in problems:
        print(problem)
    damaged = bool(problems)
    for folder, step in checkpoints_of(workdir).items():
        found = checkpoint_problems(workdir, folder, step)
        aside = folder.name.endswith(UNREADABLE)
        if found:
            damaged = True
            print(f"{folder}: damaged: {'; '.join(found)}")
        elif aside:
            print(f"{folder}: intact, {_take_back(workdir, folder, step)}")
        else:
            print(f"{folder}: intact")
    print("something is damaged" if damaged else "all is intact")
    return 1 if damaged else 0


def _take_back(workdir: Path, folder: Path, step: int) -> str:
    place = workdir / "checkpoints" / str(step)
    if place.exists():
        return f"but {place} was saved since: remove one of them"
    try:
        claim(workdir)
    except ValueError:
        return "but a process trains here: stop it, and run this again"
    folder.rename(place)
    return f"taken back as {place}"


if __name__ == "__main__":
    sys.exit(main())
