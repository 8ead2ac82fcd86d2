"""A run's folder is self-contained: config, tokenizer and data fingerprint lie in it.

config.json       {"config": every field, "data": {"fingerprint": ...}}
tokenizer.model   a copy of the store's
checkpoints/      laser/training/checkpoint.py
metrics.jsonl, tensorboard/     laser/training/metrics.py
skipped.jsonl     steps without an update, with the ids of their rows
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data.store import TokenStore
from laser.training.config import RunConfig, diff_configs, load_config, to_dict


def open_run_folder(workdir: str, config: RunConfig, store: TokenStore, allow_change: bool) -> None:
    """Makes the folder, or checks that it belongs to the same config and data.

    Args:
      workdir: made if it is not there.
      config: of the run that is about to start or go on.
      store: its data. It may have moved, but its content is compared.
      allow_change: keep the old record as config.N.json and go on with the new one.

    Raises:
      ValueError: the folder holds a run of another config or other data; the message shows what
      differs.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"config": to_dict(config), "data": {"fingerprint": store.fingerprint}}
    path = folder / "config.json"
    if path.exists():
        changes = _changes(json.loads(path.read_text()), record)
        if changes and not allow_change:
            lines = "\n  ".join(changes)
            raise ValueError(
                f"{workdir} holds a run of another config or other data:\n  {lines}\n"
                "Choose another --workdir, or go on with the new one by --allow_config_change"
            )
        if changes:
            path.rename(folder / f"config.{len(list(folder.glob('config.*.json')))}.json")
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    shutil.copyfile(store.tokenizer_path, folder / "tokenizer.model")


def load_run_config(workdir: str) -> RunConfig:
    """The config that a run was started with. Raises ValueError where there is no run."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir}: no run here (config.json is missing)")
    return load_config(json.loads(path.read_text())["config"])


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = [
        line
        for line in diff_configs(old["config"], new["config"])
        if not line.startswith("data.store:")  # the same data may lie elsewhere
    ]
    was, now = old["data"]["fingerprint"], new["data"]["fingerprint"]
    if was != now:
        lines.append(f"data: the store's fingerprint {was} -> {now} (other text or tokenizer)")
    return lines
