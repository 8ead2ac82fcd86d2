"""The small run of tests/eval."""

from tests.eval.conftest import trained_run

__all__ = ["trained_run"]
