"""What programs print: our own messages to stdout, and libraries only when something is wrong."""

import logging
import sys


def start_logging() -> None:
    """Plain lines to stdout. Replaces handlers that libraries have installed before."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("jax").setLevel(logging.ERROR)
    # Orbax logs by absl what it also raises, each error with several pages of tracebacks.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
