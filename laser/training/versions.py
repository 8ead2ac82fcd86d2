"""The packages that a step's bits depend on, beside its config."""

import importlib.metadata
import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)

NAMES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint")


def packages() -> dict[str, str]:
    """Name → the version that is installed; without those that are not."""
    found = {}
    for name in NAMES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def changed_packages(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Those of another version, as "jax: 0.10.2 -> 0.10.3"."""
    names = [name for name in NAMES if before.get(name) != now.get(name)]
    return [f"{name}: {before.get(name, 'none')} -> {now.get(name, 'none')}" for name in names]


def tell_changes(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """A warning where a run goes on with other versions than it was saved with."""
    if changes := changed_packages(before, now):
        log.warning(
            "saved with other versions, so steps may differ in their last bits: %s",
            ", ".join(changes),
        )
