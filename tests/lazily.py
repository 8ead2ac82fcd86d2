"""Modules that few tests need and that take seconds to import, as TensorFlow does."""

import importlib
from typing import Any


class Lazily:
    """The module of that name, imported when a test first takes something of it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest looks whether it is a test or a fixture
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)
