"""Instruction bundles of kernels, about cycles, from the schedules that libtpu writes on request.

A fusion's cycles stand in the compiled program, those of a kernel do not. The request costs the
compiler a tenth of its time and 10 to 100 MB on disk, which `take` removes.
"""

import os
import re
import tempfile
from pathlib import Path

KERNEL = re.compile(r"((?:laser|standard|splash)\w*)")
TOTAL = re.compile(r"total scheduled bundles:\s+(\d+)")
_dumps: list[tempfile.TemporaryDirectory] = []  # one, from when it was asked for


def request() -> None:
    """Call before libtpu is loaded, which reads its arguments once."""
    if not _dumps:
        _dumps.append(tempfile.TemporaryDirectory(prefix="bundles-", ignore_cleanup_errors=True))
        ours = arguments(_dumps[0].name) + " --xla_jf_dump_llo_pass_label_regex=final_bundles"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {ours}".strip()


def arguments(folder: str) -> str:
    """Of libtpu, to write its schedules into a folder."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def take() -> dict[str, int]:
    """As `read`, of what was compiled since the last call; empty where nothing was requested."""
    if not _dumps:
        return {}
    found = read(_dumps[0].name)
    for path in Path(_dumps[0].name).iterdir():
        path.unlink()
    return found


def remove() -> None:
    """Of a program that is about to be killed."""
    for dump in _dumps:
        dump.cleanup()


def read(folder: str) -> dict[str, int]:
    """Scheduled bundles of every kernel in a folder of schedules, by name."""
    found = {}
    for path in Path(folder).glob("*schedule-analysis_final_bundles.txt"):
        if kernel := KERNEL.search(path.name):
            count = TOTAL.search(path.read_text())
            found[kernel[1].rstrip("_")] = int(count[1]) if count else 0
    return found
