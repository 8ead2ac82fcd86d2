"""Programs in processes of their own, forked from one that has imported jax and our modules.

Importing is more than half of what a small run of train.py costs. The standard library's fork
server does it once for each of pytest's workers. It looks for no devices and reads no XLA_FLAGS:
every program does that itself, and has its own environment, signals, output and exit code.
"""

import atexit
import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

from tests.quick import collect_seldom

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = [
    "data.reading.loader", "eval.opening", "laser.training.loop", "laser.training.tensorboard",
    "train",
]  # fmt: skip
_starting = threading.Lock()


def run(
    program: str, arguments: Sequence[str], env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess:
    """Runs `python -c program arguments...` from the root of the repository, but forked.

    Args:
      program: source text; `__name__` is "__main__" in it.
      arguments: those after the name of the program.
      env: all of its environment.
      timeout: seconds; raises subprocess.TimeoutExpired after them.
    """
    context = multiprocessing.get_context("forkserver")
    with _starting, contextlib.chdir(ROOT):  # from where the server imports
        context.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        values = (program, list(arguments), dict(env), out, err)
        process = context.Process(target=_main, args=values)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        return subprocess.CompletedProcess(
            list(arguments), process.exitcode, out.read_text(), err.read_text()
        )


def _main(program: str, arguments: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    collect_seldom()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c", *arguments]
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    finally:  # what multiprocessing leaves out at a process's end
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
