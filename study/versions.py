"""What a result may depend on besides its config."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any


def versions() -> dict[str, Any]:
    """Of this repository and its packages, and the kind of machine."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {"commit": _commit(), "packages": packages, "machine": machine()}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # as in small containers
        return "unknown"
    return git.stdout.strip() or "unknown"


def machine() -> str:
    """The kind of machine that this is, in words."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or "unknown"
    return f"{platform.machine()}, {processor}"
