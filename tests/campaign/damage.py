"""What all campaigns share: ways to damage a file, programs that may hang, verdicts, the table.

A campaign is a list of trials. Each damages something, runs a program as a user would, and judges
how that ended. Two ends are good: the result is right to the bit, or it is refused with a reason.

    trials = []
    for way in WAYS:
        told = damage(path, way, rng, other=another_path)
        ended = run([sys.executable, "train.py", ...])
        trials.append(judge(f"shard, {told}", way, ended, same=lambda: read(result) == expected))
    sys.exit(report(trials))
"""

import collections
import dataclasses
import enum
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HANG_SECONDS = 60.0  # without working at all: a program that waits for nothing that comes
WORK_SECONDS = 0.02  # of CPU time per second; less is a thread that wakes up and looks around


class Way(enum.StrEnum):
    """How a file is damaged."""

    FLIP = "bit flipped"
    TRUNCATE = "truncated"
    EMPTY = "emptied"
    ZERO = "part zeroed"
    DELETE = "deleted"
    SWAP = "other file's bytes"


class Verdict(enum.StrEnum):
    """How a trial ended."""

    SAME = "same bits"
    REFUSED = "refused"  # exit code not 0, with a reason of a few lines
    UGLY = "UGLY"  # a traceback, or the end without a word
    WRONG = "WRONG"  # exit code 0, and the result is another one
    HUNG = "HUNG"


GOOD = (Verdict.SAME, Verdict.REFUSED)


@dataclasses.dataclass(frozen=True)
class Ended:
    """A program that has ended. `code` as subprocess has it: -9 for SIGKILL."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    hung: bool = False


@dataclasses.dataclass(frozen=True)
class Trial:
    """One try. `group` is its row in the table; `detail` the last words of a program."""

    name: str
    group: str
    verdict: Verdict
    detail: str = ""


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, in an order that does not change."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(path: Path, way: Way, rng: random.Random, other: Path) -> str:
    """Damages a file in place and tells how.

    Args:
      path: the file.
      way: what to do to it.
      rng: says where.
      other: a file whose bytes are not those of `path`, for `Way.SWAP`.

    Returns:
      The file's name and what was done, such as "manifest.json: bit flipped at 120.3".
    """
    content = path.read_bytes()
    where = ""
    if way == Way.DELETE:
        path.unlink()
    elif way == Way.SWAP:
        path.write_bytes(other.read_bytes())
        where = f" ({other.name})"
    elif way == Way.EMPTY or not content:
        path.write_bytes(b"")
    elif way == Way.TRUNCATE:
        length = rng.randrange(len(content))
        path.write_bytes(content[:length])
        where = f" to {length} of {len(content)}"
    elif way == Way.ZERO:
        first = rng.randrange(len(content))
        length = min(rng.randint(1, 4096), len(content) - first)
        path.write_bytes(content[:first] + bytes(length) + content[first + length :])
        where = f" from {first} to {first + length}"
    else:
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        flipped = bytes([content[place] ^ (1 << bit)])
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
        where = f" at {place}.{bit}"
    return f"{path.name}: {way}{where}"


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    during: Callable[[subprocess.Popen], None] | None = None,
    limit: float = 900.0,
) -> Ended:
    """Runs a program from the root of the repository, and ends it where it hangs.

    It hangs if all its processes together use almost no CPU time for HANG_SECONDS: a busy machine
    makes it slow, not idle.

    Args:
      command: program and arguments.
      env: on top of this process's environment.
      during: called with the process once it runs, to send it a signal for example.
      limit: seconds after which it has hung all the same.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL,
            stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        if during is not None:
            during(process)
        hung = not _ends_by_itself(process, began + limit)
        if hung:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Ended(code, *texts, seconds=time.monotonic() - began, hung=hung)


def _ends_by_itself(process: subprocess.Popen, deadline: float) -> bool:
    worked, since = cpu_seconds(process.pid), time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now, total = time.monotonic(), cpu_seconds(process.pid)
        if total - worked > WORK_SECONDS * (now - since) + 0.05:
            worked, since = total, now
        if now - since > HANG_SECONDS or now > deadline:
            return False
    return True


def cpu_seconds(session: int) -> float:
    """That all processes of a session have used so far."""
    ticks = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # After the name in brackets: state, parent, group, session, ..., utime, stime.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def judge(name: str, group: str, ended: Ended, same: Callable[[], bool]) -> Trial:
    """The verdict on a program that has ended.

    Args:
      name: what was done, as `damage` tells it.
      group: row of the table.
      ended: of `run`.
      same: whether the result is that of the undisturbed program; asked where it ended with 0.
    """
    said = [line for line in (ended.stdout + "\n" + ended.stderr).splitlines() if line.strip()]
    words = said[-1][:300] if said else ""
    if ended.hung:
        return Trial(name, group, Verdict.HUNG, words)
    if ended.code == 0:
        return Trial(name, group, Verdict.SAME if same() else Verdict.WRONG, words)
    ugly = "Traceback (most recent call last)" in ended.stdout + ended.stderr
    if ugly or ended.code < 0 or not said:
        return Trial(name, group, Verdict.UGLY, f"exit code {ended.code}: {words}")
    return Trial(name, group, Verdict.REFUSED, words)


def report(trials: Sequence[Trial]) -> int:
    """Prints a table of verdicts by group, and each trial that did not end well. 0 if all did."""
    counts = collections.Counter((trial.group, trial.verdict) for trial in trials)
    groups = list(dict.fromkeys(trial.group for trial in trials))
    width = max([len(group) for group in groups] + [5])
    print(" " * width, *(f"{verdict:>9}" for verdict in Verdict))
    for group in groups:
        print(f"{group:{width}}", *(f"{counts[group, verdict] or '':>9}" for verdict in Verdict))
    totals = collections.Counter(trial.verdict for trial in trials)
    print(f"{'total':{width}}", *(f"{totals[verdict]:>9}" for verdict in Verdict))
    bad = [trial for trial in trials if trial.verdict not in GOOD]
    for trial in bad:
        print(f"{trial.verdict}  {trial.group}  {trial.name}\n    {trial.detail}")
    print(f"{len(trials)} trials, {len(bad)} of them not well")
    return 1 if bad else 0
