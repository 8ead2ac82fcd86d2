"""What programs print: our own messages to stdout, and libraries only when something is wrong."""

import logging
import os
import signal
import sys
from types import FrameType

from laser.training import hosts


def start_logging() -> None:
    """Plain lines to stdout. Replaces handlers that libraries have installed before."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("jax").setLevel(logging.ERROR)
    # Orbax logs by absl what it also raises, each error with several pages of tracebacks.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def end_on_ctrl_c(words: str) -> None:
    """From here on Ctrl-C ends the program at once, with these words in place of a traceback.

    No KeyboardInterrupt, which jax's callback of the garbage collector may swallow. The program
    ends by SIGINT, which shells call exit code 130.
    """

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        os.write(2, f"\n{words}\n".encode())  # print may have been interrupted itself
        hosts.end_the_others("it was stopped by Ctrl-C")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, end)
