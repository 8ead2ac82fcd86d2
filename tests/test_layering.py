"""Who may import whom, read from the import statements of every file.

The attention functions are what people copy out, so they must not pull in the rest; configs are
checked before jax starts, so what checks them must not import jax; and a prepared store is read
without TensorFlow, which takes seconds and a gigabyte to import.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = (
    "configs", "data", "eval", "export", "laser", "models", "scripts", "study", "tests", "train",
)  # fmt: skip

# Module prefix → the prefixes of ours that it may import besides itself. The longest one counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "laser": (),
    "laser.attention": (),
    "laser.torch": (),
    "laser.dropins": ("laser.attention", "laser.torch"),
    "models": ("laser.attention",),
    "laser.training": ("models", "laser.attention", "data"),
    "laser.planning": ("models", "laser.attention", "laser.training"),
    "data": (),
    "data.sources": ("data.addresses", "data.errors", "data.tfds_sets", "data.tokenizer"),
    "data.reading": ("data.addresses", "data.errors", "data.sealed", "data.tokenizer"),
    "data.images": ("data.errors", "data.reading", "data.tfds_sets"),
    "eval": (
        "models",
        "laser.attention",
        "data",
        "laser.training.checkpoint",
        "laser.training.compiler",
        "laser.training.config",
        "laser.training.fields",
        "laser.training.folders",
        "laser.training.hardware",
        "laser.training.hosts",
        "laser.training.objectives",
        "laser.training.preemption",
        "laser.training.run_folder",
        "laser.training.share",
        "laser.training.sharding",
        "laser.training.speech_rows",
    ),
    "eval.opening": ("eval", "data.tokenizer", "laser.training"),  # what train.py starts
    "eval.tasks": ("data.sources.corpus", "laser.training.fields"),
    "export": (
        "models",
        "data.addresses",
        "data.reading.mixture",
        "data.sealed",
        "data.tokenizer",
        "laser.training.checkpoint",
        "laser.training.config",
        "laser.training.folders",
        "laser.training.metrics",
        "laser.training.run_folder",
    ),
    "study": (
        "configs.base",
        "configs.study",
        "models",
        "laser.attention",
        "laser.training",
        "data.addresses",
        "data.reading",
        "data.sealed",
        "eval.likelihood",
        "eval.run",
        "eval.tasks",
    ),
    "configs": (),
}
LIGHT = (
    "models.config", "laser.training.config", "laser.training.devices", "laser.training.fields",
    "laser.training.flags",
)  # fmt: skip
LIGHT_DATA = (
    "data.reading.store", "data.reading.order", "data.tokenizer", "data.reading.loader",
)  # fmt: skip
MUST_NOT_IMPORT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LIGHT, ("jax", "jaxlib", "flax", "optax", "orbax")),
    **dict.fromkeys(LIGHT_DATA, ("seqio", "tensorflow", "tensorflow_datasets")),
    "configs": ("jax", "flax", "optax"),
    "laser.attention": ("flax", "optax", "equinox", "torch", "ml_collections"),
    "laser.torch": ("jax", "numpy", "transformers"),
}


def _within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def _imports(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute names of all that a source imports, at any depth; `from a import b` gives a.b."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _violations(source: str, module: str, is_package: bool = False) -> list[str]:
    rules = [prefix for prefix in MAY_IMPORT if _within(module, prefix)]
    found = []
    for name in sorted(_imports(source, module, is_package)):
        if rules and name.split(".")[0] in OURS:
            prefix = max(rules, key=len)
            if not any(_within(name, allowed) for allowed in (prefix, *MAY_IMPORT[prefix])):
                found.append(f"{module} imports {name}")
        for prefix, forbidden in MUST_NOT_IMPORT.items():
            if _within(module, prefix) and any(_within(name, other) for other in forbidden):
                found.append(f"{module} imports {name}")
    return found


def _modules() -> list[tuple[Path, str, bool]]:
    modules = []
    for top in sorted({prefix.split(".")[0] for prefix in MAY_IMPORT}):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            modules.append((path, ".".join(parts[:-1] if is_package else parts), is_package))
    return modules


def test_every_module_keeps_to_its_layer():
    modules = _modules()
    for prefix in MAY_IMPORT:
        assert any(_within(module, prefix) for _, module, _ in modules), prefix
    found = [
        line
        for path, module, is_package in modules
        for line in _violations(path.read_text(), module, is_package)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "module, source",
    [
        ("laser.attention.kernels.flash", "from models import decoder"),
        ("laser.attention.interface", "def f():\n    import laser.training.step"),
        ("laser.attention.interface", "from ..training import step"),
        ("models.decoder", "from laser import training"),
        ("models.config", "import jax.numpy as jnp"),
        ("laser.training.config", "from jax import Array"),
        ("laser.training.step", "from laser.planning import report"),
        ("data.reading.store", "import tensorflow as tf"),
        ("data.reading.order", "from laser.attention import attention"),
        ("data.reading.store", "from data.preparation import prepare"),
        ("eval.likelihood.scoring", "from laser.training import loop"),
        ("eval.tasks.sources", "from eval.likelihood import oneshot"),
        ("configs.c4", "from models.config import ModelConfig"),
        ("laser.attention.interface", "import torch"),
        ("laser.torch", "from laser.attention import chunked"),
        ("laser.dropins.flax", "from models import decoder"),
        ("study.run", "from scripts import study"),
    ],
)
def test_a_violation_is_found(module, source):
    assert _violations(source, module)


@pytest.mark.parametrize(
    "module, source",
    [
        ("laser.attention.interface", "from laser.attention import reference\nimport jax"),
        ("laser.attention.interface", "from . import reference"),
        ("models.decoder", "from laser.attention import attention"),
        ("laser.training.loop", "from data.reading.loader import batches\nimport models.decoder"),
        (
            "eval.likelihood.oneshot",
            "from laser.training import checkpoint\nfrom data import tokenizer",
        ),
        ("configs.c4", "from configs import base"),
        ("laser.dropins.flax", "from laser.attention import dot_product_attention"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert not _violations(source, module)


def _loaded_after_importing(modules: tuple[str, ...]) -> set[str]:
    program = f"import sys\nimport {', '.join(modules)}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_configs_are_checked_without_jax():
    loaded = _loaded_after_importing((*LIGHT, "configs.c4"))
    assert "laser.training.config" in loaded
    assert not loaded & {"jax", "flax", "optax", "tensorflow"}


def test_prepared_tokens_are_read_without_tensorflow():
    loaded = _loaded_after_importing(LIGHT_DATA)
    assert "data.reading.store" in loaded
    assert not loaded & {"seqio", "tensorflow", "tensorflow_datasets"}
