"""What a step's bits and its speed depend on beside its config: code, packages and machine."""

import importlib.metadata
import logging
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NAMES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint")


def here() -> dict[str, Any]:
    """All of it, of this process: the commit, the packages, the machine, and its devices with those
    of all hosts, as "64 TPU v5 lite"."""
    import jax  # what reads a run does without

    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    return {
        "commit": _commit(), "packages": packages(), "machine": machine(), "devices": devices,
    }  # fmt: skip


def packages() -> dict[str, str]:
    """Name → the version that is installed; without those that are not."""
    found = {}
    for name in NAMES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The kind of machine that this is, in words."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or "unknown"
    return f"{platform.machine()}, {processor}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # as in small containers
        return "unknown"
    return git.stdout.strip() or "unknown"


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
