"""What programs print: our own messages to stdout, and libraries only when something is wrong;
and how those begin and end that have flags and no config."""

import concurrent.futures
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from absl import flags

from laser.training import exits, hosts

HELP = {"--help", "-help", "-h"}
Result = TypeVar("Result")


class _Lasting:
    """A text stream that goes on into nothing where nobody reads it any more.

    A terminal that was closed, a pipe whose reader has ended or a full disk under a log must not
    end a run: its numbers are in its folder.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_standard_streams() -> None:
    """Where a program is started without one of them, the next file that it opens would be it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or os.fdopen(number, "w", encoding="utf-8", closefd=False)
        if not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream))


def _quiet(report: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Without what tensorstore tells the event loops that Orbax has closed, after a failed read or
    save: pages of it, and the failure itself is told elsewhere."""

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    return hook


def start_logging(to_stderr: bool = False) -> None:
    """Plain lines to stdout or stderr, which may be closed. Replaces handlers that libraries have
    installed before."""
    _open_standard_streams()
    sys.unraisablehook = _quiet(sys.unraisablehook)
    stream = sys.stderr if to_stderr else sys.stdout
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=stream, force=True)
    logging.getLogger("jax").setLevel(logging.ERROR)
    # Orbax logs by absl what it also raises, each error with several pages of tracebacks; so does
    # what reads and writes behind addresses.
    for name in ("absl", "fsspec", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def run_program(
    values: flags.FlagValues,
    usage: str,
    argv: Sequence[str],
    run: Callable[[], None],
    advice: str = "",
) -> int:
    """Reads the command line into `values` and calls `run`, which raises ValueError for a mistake.

    Args:
      values: the program's flags.
      usage: what --help prints before them.
      argv: the program's name and its arguments.
      run: RuntimeError and OSError are no mistakes: a worker died; the disk is full.
      advice: what to do then.

    Returns:
      The exit code, where it is no mistake: that ends the program with its own.
    """
    if HELP & set(argv[1:]):
        print(usage.strip(), values.main_module_help(), sep="\n\n")
        return exits.DONE
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        positional = values(list(argv))[1:]
        if positional:
            raise ValueError(f"unexpected argument {positional[0]!r}: write --flag=value")
        run()
    except (ValueError, flags.Error) as error:
        exit_with(argv[0], str(error))
    except (RuntimeError, OSError) as error:
        words = "; ".join(filter(None, [str(error), advice]))
        print(f"{Path(argv[0]).name}: {words}", file=sys.stderr)
        return exits.FAILED
    return exits.DONE


def exit_with(program: str, message: str) -> NoReturn:
    """Leaves the program with the exit code for mistakes of the command line or the config."""
    print(f"{Path(program).name}: error: {message}", file=sys.stderr)
    sys.exit(exits.MISTAKE)


def end_on_ctrl_c(words: str, before: Callable[[], None] = lambda: None) -> None:
    """From here on Ctrl-C ends the program at once, with these words in place of a traceback.

    `before` is called first, to remove what would be left behind.

    No KeyboardInterrupt, which jax's callback of the garbage collector may swallow. The program
    ends by SIGINT, which shells call exit code 130.
    """

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        os.write(2, f"\n{words}\n".encode())  # print may have been interrupted itself
        hosts.end_the_others("it was stopped by Ctrl-C")
        before()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, end)


def interruptible(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments) in another thread, so that Ctrl-C does not wait for what XLA compiles.

    Python hears of signals between two of the main thread's instructions, and a compiler takes
    minutes for one.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()
