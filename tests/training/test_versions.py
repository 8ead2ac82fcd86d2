"""The versions of packages that a run is made with."""

import importlib.metadata

from laser.training import versions


def test_they_are_those_that_are_installed(monkeypatch):
    found = versions.packages()
    assert found["jax"] == importlib.metadata.version("jax")
    assert found["orbax-checkpoint"] == importlib.metadata.version("orbax-checkpoint")
    monkeypatch.setattr(versions, "NAMES", ("jax", "no-such-package"))
    assert list(versions.packages()) == ["jax"]


def test_only_changes_are_told(caplog):
    versions.tell_changes({"jax": "1", "libtpu": "2"}, {"jax": "1", "libtpu": "2"})
    assert caplog.text == ""
    versions.tell_changes({"jax": "1", "libtpu": "2"}, {"jax": "3", "flax": "4", "libtpu": "2"})
    assert "last bits: jax: 1 -> 3, flax: none -> 4" in caplog.text
