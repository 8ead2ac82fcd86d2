"""A run's folder is self-contained: config, tokenizer and data fingerprint lie in it.

config.json       {"config": every field, "data": {"fingerprint": ...}, "init_step": ...}
tokenizer.model   a copy of the data's
checkpoints/      laser/training/checkpoint.py
metrics.jsonl, tensorboard/     laser/training/metrics.py
skipped.jsonl     steps without an update, with the ids of their rows
.lock             held by the process that trains here, and its pid
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from laser.training import hosts
from laser.training.config import RunConfig, diff_configs, load_config, to_dict

if TYPE_CHECKING:  # imports jax; what reads a config must not
    from laser.training.rows import Rows

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)  # of some file systems
_locks: dict[Path, IO[str]] = {}  # of this process, open: to close one is to give it back
SEEN_SECONDS = 20.0  # a mounted bucket may show a new file to other hosts as late as this


def check_hosts_agree(config: RunConfig, rows: "Rows", init_step: int | None) -> None:
    """Raises ValueError, on all hosts, if one was started with another config or other data."""
    text = json.dumps(_record(config, rows, init_step))
    records = [json.loads(other) for other in hosts.exchange("describe config and data", text)]
    lines = [
        f"{hosts.name(i)}: {line}"
        for i, record in enumerate(records)
        for line in _changes(records[0], record)
    ]
    if lines:
        raise ValueError("not all hosts run the same as host 0:\n  " + "\n  ".join(lines))


def open_run_folder(
    workdir: str, config: RunConfig, rows: "Rows", init_step: int | None, allow_change: bool
) -> int | None:
    """Makes the folder, or checks that it belongs to the same config and data.

    One host writes; the others see what it wrote when this returns, or hear why it refused.

    Args:
      workdir: made if it is not there.
      config: of the run that is about to start or go on.
      rows: its data. They may have moved, but their content is compared.
      init_step: of the checkpoint that a new run starts from, if there is an init_from.
      allow_change: keep the old record as config.N.json and go on with the new one.

    Returns:
      `init_step`, or that of the run which is there: its init_from may have gone on since.

    Raises:
      ValueError: the folder holds a run of another config or other data, and the message shows
      what differs; or another process trains there; or it is not one folder for all hosts.
    """
    path = Path(workdir) / "config.json"
    with hosts.together("open the run's folder"):
        if hosts.is_first():
            _lock(Path(workdir))
            _open(Path(workdir), config, rows, init_step, allow_change)
    own = path.read_text() if hosts.is_first() else ""
    written = hosts.exchange("read the run's folder", own)[0]
    with hosts.together("see the run's folder"):
        _wait_for(path, written)
    return json.loads(written)["init_step"]


def _lock(folder: Path) -> None:
    """Keeps other processes from training here until this one has ended, however it ends.

    On a mounted bucket those of this machine alone. Raises ValueError if one does already.
    """
    if folder in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"{folder}: another process trains here ({file.read().strip() or 'pid unknown'}); stop "
            "it or choose another --workdir"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: no locks there, so take care that no other process trains in it", folder)
        return
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[folder] = file


def _open(
    folder: Path, config: RunConfig, rows: "Rows", init_step: int | None, allow_change: bool
) -> None:
    record = _record(config, rows, init_step)
    path = folder / "config.json"
    if path.exists():
        saved = json.loads(path.read_text())
        if saved["config"].get("init_from") == config.init_from:
            record["init_step"] = saved.get("init_step")
        changes = _changes(saved, record)
        if changes and not allow_change:
            lines = "\n  ".join(changes)
            raise ValueError(
                f"{folder} holds a run of another config or other data:\n  {lines}\n"
                "Choose another --workdir, or go on with the new one by --allow_config_change"
            )
        if changes:
            log.info("%s goes on with another config or other data:", folder)
            for line in changes:
                log.info("  %s", line)
            path.rename(folder / f"config.{len(list(folder.glob('config.*.json')))}.json")
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    shutil.copyfile(rows.tokenizer_path, folder / "tokenizer.model")


def _record(config: RunConfig, rows: "Rows", init_step: int | None) -> dict[str, Any]:
    data = {"fingerprint": rows.fingerprint}
    return {"config": to_dict(config), "data": data, "init_step": init_step}


def _wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + SEEN_SECONDS
    while not (path.exists() and path.read_text() == text):
        if time.monotonic() > deadline:
            raise ValueError(
                f"{path}: not what host 0 has written there; workdir must be one folder that all "
                "hosts share, such as a mounted bucket"
            )
        time.sleep(0.2)


def load_run_config(workdir: str) -> RunConfig:
    """The config that a run was started with. Raises ValueError where there is no run."""
    return load_config(load_record(workdir)["config"])


def load_record(workdir: str) -> dict[str, Any]:
    """The content of config.json. Raises ValueError where there is no run."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir}: no run here (config.json is missing)")
    return json.loads(path.read_text())


def load_fingerprint(workdir: str) -> str:
    """That of the data that a run was started with."""
    return json.loads((Path(workdir) / "config.json").read_text())["data"]["fingerprint"]


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = [
        line
        for line in diff_configs(old["config"], new["config"])
        # The same data may lie elsewhere.
        if not line.startswith(("data.store:", "data.tasks_dir:"))
    ]
    was, now = old["data"]["fingerprint"], new["data"]["fingerprint"]
    if was != now:
        lines.append(f"data: the fingerprint {was} -> {now} (other text or tokenizer)")
    return lines
