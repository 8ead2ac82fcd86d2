"""A folder that transformers or timm loads and `load_exported` reads back, bit for bit.

config.json          configuration of the architecture; its entry `laser` has the run's config
model.safetensors    float32; the file's metadata has a SHA-256 over all tensors
tokenizer.model      SentencePiece, with tokenization_laser.py that wraps it; of text alone
*_laser.py           the model in PyTorch, where transformers has none that computes the same
load_timm.py         makes timm's model of a vision transformer
SHA256SUMS           of all files but the last one, for `sha256sum -c SHA256SUMS` and the way back
README.md            the model card, to be edited
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data.addresses import is_address
from data.sealed import SEAL, file_sha256, seal
from data.tokenizer import Tokenizer
from export.configurations import configuration, tokenizer_configuration
from export.layouts import Layout, choose_layout, from_tensors, to_tensors
from export.tensors import Tensors
from laser.training.checkpoint import Checkpoints
from laser.training.config import RunConfig, load_config, to_dict
from laser.training.run_folder import write_run
from models.config import require
from models.families import AnyModelConfig, Parameters

REMOTE = Path(__file__).parent / "remote"
# Of layouts that need others than the tokenizer's.
MODULES: dict[str, tuple[str, ...]] = {
    "laser": ("tokenization_laser.py", "configuration_laser.py", "modeling_laser.py"),
    "timm": ("load_timm.py",),
}
SUMS = "SHA256SUMS"
CHECKSUM = "sha256"  # in the file's metadata; whoever writes the file anew leaves it out


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where parameters come from: a run's config, the step, and its data's fingerprint."""

    config: RunConfig
    step: int
    fingerprint: str


def write_export(
    output: Path,
    origin: Origin,
    params: Parameters,
    tokenizer_path: Path | None,
    *,
    card: str,
    layout: Layout | None = None,
) -> None:
    """Writes the folder, all of it or nothing.

    Args:
      output: must not be there yet.
      origin: of the parameters.
      params: float32 and stacked by layer, as in training.
      tokenizer_path: the run's SentencePiece model; None for images.
      card: text of README.md.
      layout: one that is not `choose_layout`'s, such as `laser`, which serves for every model.

    Raises:
      ValueError: there is something at `output`, or no folder to put it in.
      OSError: it cannot be written, on a full disk for example.
    """
    require(not output.exists(), f"output={output}: exists; choose another or remove it")
    require(output.absolute().parent.is_dir(), f"output={output}: no folder {output.parent}")
    layout = layout or choose_layout(origin.config.model)
    tensors = to_tensors(layout, origin.config.model, params, origin.config.data.seq_len)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".export-") as parent:
        folder = Path(parent) / "export"
        folder.mkdir()
        metadata = {"format": "pt", CHECKSUM: _checksum(tensors)}
        _save(tensors, folder / "model.safetensors", metadata)
        _write_configurations(folder, layout, origin, tokenizer_path)
        for name in MODULES.get(layout, ("tokenization_laser.py",)):
            shutil.copyfile(REMOTE / name, folder / name)
        sums = [f"{file_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
        (folder / SUMS).write_text("".join(sums), encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
        folder.rename(output)


def _save(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # of what the system says of the disk, too
        raise OSError(f"{path}: {error}") from error


def _write_configurations(
    folder: Path, layout: Layout, origin: Origin, tokenizer_path: Path | None
) -> None:
    """config.json and, with a tokenizer, it and its tokenizer_config.json."""
    tokenizer = None
    if tokenizer_path is not None:
        tokenizer = Tokenizer(tokenizer_path)
        (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
        of_tokenizer = tokenizer_configuration(origin.config, tokenizer)
        _write_json(folder / "tokenizer_config.json", of_tokenizer)
    ours = {
        "layout": layout,
        "config": to_dict(origin.config),
        "step": origin.step,
        "fingerprint": origin.fingerprint,
    }
    theirs = configuration(layout, origin.config, tokenizer)
    _write_json(folder / "config.json", {**theirs, "laser": ours})


def load_exported(folder: Path) -> tuple[AnyModelConfig, Parameters]:
    """The model config and the parameters, float32 numpy arrays stacked by layer as in training.

    Raises:
      ValueError: there is no export, a file is damaged, or tensors and config do not fit together;
        the message names the file and the tensor.
    """
    _verify(folder)
    origin, layout = _read_origin(folder / "config.json")
    path = folder / "model.safetensors"
    try:
        config, length = origin.config.model, origin.config.data.seq_len
        return config, from_tensors(layout, config, _read_tensors(path), length)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def import_run(folder: Path, workdir: Path) -> Origin:
    """Makes a run's folder of an exported model, to generate, evaluate and start other runs from.

    It holds no optimizer state. So that nobody resumes it by accident, its data's fingerprint says
    that it was imported, which training refuses.

    Raises:
      ValueError: as `load_exported`, or there is something at `workdir`.
      CheckpointError: the parameters could not be saved.
    """
    require(not workdir.exists(), f"workdir={workdir}: exists; choose another or remove it")
    require(
        not is_address(workdir), f"workdir={workdir}: make a folder here, and copy it to the bucket"
    )
    parent = workdir.absolute().parent
    require(parent.is_dir(), f"workdir={workdir}: no folder {parent}")
    origin, layout = _read_origin(folder / "config.json")
    _, params = load_exported(folder)
    tokenizer = None if layout == "timm" else folder / "tokenizer.model"
    if tokenizer is not None:
        Tokenizer(tokenizer)  # raises ValueError if it is none
    fingerprint = f"imported without optimizer state; was {origin.fingerprint}"
    record = seal(
        {
            "config": to_dict(origin.config),
            "data": {"fingerprint": fingerprint},
            "tokenizer": "" if tokenizer is None else file_sha256(tokenizer),
        }
    )
    with tempfile.TemporaryDirectory(dir=parent, prefix=".import-") as temporary:
        made = Path(temporary) / "run"
        with Checkpoints(made, origin.config.checkpoint) as checkpoints:
            # In the host's memory: one accelerator alone may not hold the whole model.
            params = jax.device_put(params, _cpu())
            checkpoints.save(origin.step, {"params": params}, note={"config": record[SEAL]})
        write_run(made, record, tokenizer or "")
        made.rename(workdir)
    return origin


def _cpu() -> jax.Device:
    """The processor of this host. Raises ValueError where jax was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(
            f"JAX_PLATFORMS={platforms}: the model is put together in the host's memory; use "
            f"{platforms},cpu"
        ) from error


def _verify(folder: Path) -> None:
    """Raises ValueError if a file is not as it was exported. Other programs that save a model write
    no SHA256SUMS: of theirs nothing is known."""
    path = folder / SUMS
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    require(bool(lines), f"{path}: damaged: it names no file; export the model again")
    for line in lines:
        sha256, _, name = line.partition("  ")
        file = folder / name
        require(
            bool(name) and "\0" not in name and file.is_file() and file_sha256(file) == sha256,
            f"{file}: not as it was exported, by its line in {SUMS}: {line[:80]!r}; export the "
            f"model again, or, if another program has rewritten the file, delete {SUMS}",
        )


def _read_origin(path: Path) -> tuple[Origin, Layout]:
    require(path.is_file(), f"{path.parent}: no exported model here (config.json is missing)")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))["laser"]
        config, layout = load_config(record["config"]), record["layout"]
        known = ", ".join(get_args(Layout))
        require(layout in get_args(Layout), f"layout={layout!r}: must be one of {known}")
        return Origin(config, record["step"], record["fingerprint"]), layout
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not written by scripts/export.py, or damaged ({error!r})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> Tensors:
    require(path.is_file(), "no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, TypeError) as error:  # TypeError: a dtype that numpy does not have
        raise ValueError(f"cannot be read: {error}") from error
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors):
        raise ValueError("damaged: the tensors' SHA-256 is not the one in the file's metadata")
    return tensors


def _checksum(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        digest.update(np.asarray(x, order="C").tobytes())
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
