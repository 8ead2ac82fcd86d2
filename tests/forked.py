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

from jax._src import compilation_cache, compiler

from laser.planning.topologies import NO_DEVICE
from laser.training import hardware
from tests.quick import QUICK_FOR_TPU, collect_seldom

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
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(program, arguments, env, out, err)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        return subprocess.CompletedProcess(
            list(arguments), process.exitcode, out.read_text(), err.read_text()
        )


def run_for_tpu(
    program: str, arguments: Sequence[str] = (), optimized: bool = False
) -> subprocess.CompletedProcess:
    """The same for what libtpu compiles, which keeps its memory: no device, and nothing is kept.

    Args:
      program, arguments: as of `run`.
      optimized: with all optimizations, which take the time; see QUICK_FOR_TPU.
    """
    settings = {"JAX_ENABLE_COMPILATION_CACHE": False, **({} if optimized else QUICK_FOR_TPU)}
    # jax, which is imported, read the variables then.
    lines = [f"jax.config.update({name.lower()!r}, {x!r})" for name, x in settings.items()]
    program = "\n".join(["import jax", *lines, program])
    return run(program, arguments, {**os.environ, **NO_DEVICE, "XLA_FLAGS": ""}, timeout=800)


def start(
    program: str, arguments: Sequence[str], env: Mapping[str, str], out: Path, err: Path
) -> multiprocessing.process.BaseProcess:
    """The same, without waiting for its end; with its output in files, which may be one."""
    context = multiprocessing.get_context("forkserver")
    with _starting, contextlib.chdir(ROOT):  # from where the server imports
        context.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    process = context.Process(target=_main, args=(program, list(arguments), dict(env), out, err))
    process.start()
    return process


def _keep_compiled(key, seconds, name, backend, executable, host_callbacks):
    """In place of jax's, which keeps nothing of several hosts' programs but those of the first.

    Each host has programs of its own: keys differ by the devices.
    """
    if not host_callbacks:
        compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))


def _main(program: str, arguments: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    collect_seldom()
    hardware._measured_cpu_flops = lambda: 1e11  # to measure it takes half a second
    compiler._cache_write = _keep_compiled
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
