"""What programs print: our own messages to stdout, and libraries only when something is wrong."""

import logging
import sys
from types import TracebackType


def start_logging() -> None:
    """Plain lines to stdout. Replaces handlers that libraries have installed before."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("jax").setLevel(logging.ERROR)
    # Orbax logs by absl what it also raises, each error with several pages of tracebacks.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def end_on_ctrl_c(words: str) -> None:
    """From here on Ctrl-C ends the program with these words in place of a traceback.

    Python then ends itself by SIGINT, which shells call exit code 130.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"\n{words}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
