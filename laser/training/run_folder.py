"""A run's folder is self-contained: config, tokenizer and data fingerprint lie in it.

What is there:

    config.json       {"config": every field, "data": {"fingerprint": ..., "order": ...},
                      "init_step": ..., "tokenizer": sha256 of tokenizer.model,
                      "sha256": of all the rest}
    config.N.json     those before it: changed by --allow_config_change, or other places of data
    versions.json     laser/training/versions.py of the process that trained here last
    tokenizer.model   a copy of the data's
    checkpoints/      laser/training/checkpoint.py; each names the sha256 of its config
    N.unreadable/     a damaged checkpoint that was moved out of the way
    metrics.jsonl, tensorboard/     laser/training/metrics.py
    skipped.jsonl     steps without an update, with the ids of their rows
    .saved            there as soon as the run has had a checkpoint
    .lock             held by the process that trains here, and its pid
"""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.addresses import is_address, told_as_os_errors
from data.reading.files import path_of
from data.reading.order import ORDER
from data.sealed import SEAL, file_sha256, seal, unseal
from laser.training import hosts, versions
from laser.training.config import RunConfig, diff_configs, load_config, to_dict
from laser.training.folders import folder_of, write_atomically
from laser.training.lease import claim

if TYPE_CHECKING:  # imports jax; what reads a config must not
    from laser.training.rows import Rows

log = logging.getLogger(__name__)

# May differ when a run goes on: where the same data lie, how they are read, and how it is watched.
OF_NO_MATTER = (
    "data.store", "data.tasks_dir", "data.prefetch", "data.read_ahead", "data.requests",
    "data.cache_dir", "data.cache_gb", "images.source", "images.test", "images.workers",
    "images.max_broken", "training.wandb_project", "training.profile_steps",
    "training.step_timeout_seconds",
)  # fmt: skip
SEEN_SECONDS = 20.0  # a mounted bucket may show a new file to other hosts as late as this
COMMITTED = "commit_success.txt"  # Orbax's, where no folder can be renamed when it is finished
VERSIONS = "versions.json"
UNREADABLE = "unreadable"  # ending of the folder that a damaged checkpoint is moved to


def check_hosts_agree(config: RunConfig, rows: "Rows", init_step: int | None) -> None:
    """Raises ValueError, on all hosts, if one was started with another config, other data or other
    versions of packages."""
    text = json.dumps([_record(config, rows, init_step), versions.packages()])
    records = [json.loads(other) for other in hosts.exchange("describe config and data", text)]
    (first, of_first), lines = records[0], []
    for i, (record, installed) in enumerate(records):
        changes = [*_changes(first, record), *versions.changed_packages(of_first, installed)]
        lines += [f"{hosts.name(i)}: {line}" for line in changes]
    if lines:
        raise ValueError("not all hosts run the same as host 0:\n  " + "\n  ".join(lines))


def open_run_folder(
    workdir: str,
    config: RunConfig,
    rows: "Rows",
    init_step: int | None,
    allow_change: bool,
    tensors: Mapping[str, str],
) -> dict[str, Any]:
    """Makes the folder, or checks that it belongs to the same config and data.

    One host writes; the others see what it wrote when this returns, or hear why it refused.

    Args:
      workdir: made if it is not there.
      config: of the run that is about to start or go on.
      rows: its data. They may have moved, but their content is compared.
      init_step: of the checkpoint that a new run starts from, if there is an init_from.
      allow_change: keep the old record as config.N.json and go on with the new one.
      tensors: of the state that is about to be trained, by name, as "float32[8,300]".

    Returns:
      The record in config.json. Its init_step is `init_step`, or that of the run which is there:
      its init_from may have gone on since.

    Raises:
      ValueError: the folder holds a run of another config or other data, and the message shows
      what differs; its checkpoints are of another model or optimizer; its config.json is missing
      or damaged; another process trains there; it cannot be written; or it is not one folder for
      all hosts. Nothing in it was changed.
    """
    folder = folder_of(workdir)
    path = folder / "config.json"
    with hosts.together("open the run's folder"):
        if hosts.is_first():
            try:
                with told_as_os_errors(folder):
                    claim(folder)
                    _open(folder, config, rows, init_step, allow_change, tensors)
            except OSError as error:
                raise ValueError(
                    f"workdir={workdir}: cannot be written ({error}); choose another --workdir"
                ) from error
    own = path.read_text() if hosts.is_first() else ""
    written = hosts.exchange("read the run's folder", own)[0]
    with hosts.together("see the run's folder"):
        _wait_for(path, written)
    return json.loads(written)


def _open(
    folder: Path,
    config: RunConfig,
    rows: "Rows",
    init_step: int | None,
    allow_change: bool,
    tensors: Mapping[str, str],
) -> None:
    path = folder / "config.json"
    step, sidecar = _newest_sidecar(folder)
    saved, problem = _saved_record(folder)
    if saved and saved["config"].get("init_from") == config.init_from:
        init_step = saved.get("init_step")
    record = seal(_record(config, rows, init_step))
    if problem:
        if record[SEAL] != sidecar.get("config"):
            raise ValueError(
                f"{path} {problem}, and no checkpoint there says that it was that of this "
                "command: put the file back from a backup, give the command that the run was "
                "started with, or choose another --workdir"
            )
        log.warning("%s %s: written again, with the config of checkpoint %d", path, problem, step)
    check_origin(folder, step, sidecar, record if problem else None)
    changes = _changes(saved, record) if saved else []
    if changes and not allow_change:
        lines = "\n  ".join(changes)
        raise ValueError(
            f"{folder} holds a run of another config or other data:\n  {lines}\n"
            "Choose another --workdir, or go on with the new one by --allow_config_change"
        )
    if other := different_tensors(sidecar, tensors) or _other_optimizer(saved, config):
        raise ValueError(
            f"{folder}: checkpoint {step} is of another model or optimizer: {other}. Choose "
            "another --workdir; --config.init_from starts from a run's parameters alone"
        )
    if changes:
        log.info("%s goes on with another config or other data:", folder)
        for line in changes:
            log.info("  %s", line)
    if saved and saved[SEAL] != record[SEAL]:  # checkpoints name the old one
        old = (path.name.split(".")[1] for path in folder.glob("config.*.json"))
        number = max((int(name) for name in old if name.isdecimal()), default=-1) + 1
        write_atomically(folder / f"config.{number}.json", path.read_text())
    write_run(folder, record, rows.tokenizer_path)
    if not 0 < config.training.steps <= step:  # what has ended is not trained on
        write_atomically(folder / VERSIONS, json.dumps(versions.here(), indent=2) + "\n")


def _saved_record(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """config.json, or None and what is wrong with it, in words; "" where there was no run."""
    path = folder / "config.json"
    try:
        saved = _read_record(path) if path.exists() else None
    except ValueError as error:
        return None, f"is damaged, or not written by train.py ({error})"
    lost = not saved and (saved_step_folders(folder) or set_aside(folder))
    return saved, "is missing beside checkpoints" if lost else ""


def _other_optimizer(saved: Mapping[str, Any] | None, config: RunConfig) -> str:
    """In words; moments of two optimizers may have the same shapes."""
    before = saved["config"]["optimizer"]["name"] if saved else config.optimizer.name
    now = config.optimizer.name
    return f"optimizer.name is {before} there and {now} here" if before != now else ""


def write_run(folder: Path, record: Mapping[str, Any], tokenizer_path: str | Path) -> None:
    """Writes config.json, a record that is sealed, and then the tokenizer, if any, beside it."""
    write_atomically(folder / "config.json", json.dumps(record, indent=2) + "\n")
    if tokenizer_path:
        write_atomically(folder / "tokenizer.model", path_of(tokenizer_path).read_bytes())


def _record(config: RunConfig, rows: "Rows", init_step: int | None) -> dict[str, Any]:
    data = {"fingerprint": rows.fingerprint, "order": ORDER}
    path = rows.tokenizer_path
    tokenizer = file_sha256(path_of(path)) if path else ""
    return {
        "config": to_dict(config), "data": data, "init_step": init_step, "tokenizer": tokenizer,
    }  # fmt: skip


def _wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + SEEN_SECONDS
    while not (path.exists() and path.read_text() == text):
        if time.monotonic() > deadline:
            raise ValueError(
                f"{path}: not what host 0 has written there; workdir must be one folder that all "
                "hosts share, such as one in a bucket"
            )
        time.sleep(0.2)


def load_run_config(workdir: str, step: int | None = None) -> RunConfig:
    """The config of a run, see `load_record`. Raises ValueError where there is no run."""
    return load_config(load_record(workdir, step)["config"])


def load_record(workdir: str, step: int | None = None) -> dict[str, Any]:
    """The content of config.json, after a look at it and at the tokenizer; for a checkpoint from
    before a change of the config, that of the config.N.json that it was saved with.

    Raises ValueError where there is no run, or what is asked for is missing or damaged.
    """
    try:
        with told_as_os_errors(workdir):
            return _load_record(folder_of(workdir), step)
    except OSError as error:
        raise ValueError(f"{workdir}: cannot be read ({error})") from error


def _load_record(folder: Path, step: int | None) -> dict[str, Any]:
    path, tokenizer = folder / "config.json", folder / "tokenizer.model"
    again = "put it back from a backup, or start train.py again as before: it writes the file anew"
    if not path.exists():
        if saved_step_folders(folder):
            raise ValueError(f"{path} is missing beside checkpoints: {again}")
        raise ValueError(f"{folder}: no run here (config.json is missing)")
    try:
        record = _read_record(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {again}") from error
    earlier = _earlier_record(folder, step, record[SEAL]) if step is not None else None
    if earlier and earlier["tokenizer"] != record["tokenizer"]:
        raise ValueError(
            f"{folder}: checkpoint {step} was saved with another tokenizer than {tokenizer.name}, "
            "which is that of the run's newest config"
        )
    record = earlier or record
    if not record["tokenizer"]:
        return record
    if not tokenizer.exists():
        raise ValueError(f"{tokenizer} is missing: {again}")
    if file_sha256(tokenizer) != record["tokenizer"]:
        raise ValueError(f"{tokenizer} is not the tokenizer of this run: {again}")
    return record


def _earlier_record(folder: Path, step: int, newest: str) -> dict[str, Any] | None:
    """What a checkpoint was saved with, unless that is `newest`, or can't be told: who reads its
    tensors hears of that."""
    try:
        sealed = read_sidecar(folder / "checkpoints" / str(step)).get("config", newest)
    except ValueError as error:
        log.warning("checkpoint %d: %s", step, error)
        return None
    return None if sealed == newest else _records(folder).get(sealed)


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    """The run's config.json and all that came before it, by their seals."""
    records = {}
    for path in sorted(folder.glob("config*.json")):
        try:
            record = _read_record(path)
        except ValueError as error:
            log.warning("%s is damaged (%s)", path, error)
        else:
            records[record[SEAL]] = record
    return records


def load_versions(folder: Path) -> dict[str, Any]:
    """What a run's process said of itself, see laser/training/versions.py; nothing where it is one
    of before. Raises ValueError if it is damaged."""
    path = folder / VERSIONS
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: is damaged ({error}); delete it") from error


def load_fingerprint(workdir: str, step: int | None = None) -> str:
    """That of the data of a run, see `load_record`. Raises ValueError as that."""
    return load_record(workdir, step)["data"]["fingerprint"]


def _read_record(path: Path) -> dict[str, Any]:
    """A config.json. Raises ValueError if it is not what was once written."""
    record = unseal(path.read_bytes())
    for key in ("config", "data", "tokenizer"):
        if key not in record:
            raise ValueError(f"it has no {key!r}")
    return record


def saved_step_folders(workdir: Path) -> dict[int, Path]:
    """Step → folder of each checkpoint that was finished, damaged or not, in order."""
    folder = workdir / "checkpoints"
    found = folder.iterdir() if folder.exists() else ()  # is_dir() hides that nothing answers
    steps = sorted((int(path.name), path) for path in found if path.name.isdigit())
    if is_address(workdir):
        return {step: path for step, path in steps if (path / COMMITTED).exists()}
    return dict(steps)


def set_aside(workdir: Path) -> list[Path]:
    """The folders of checkpoints that were moved out of the way."""
    return sorted(workdir.glob(f"*.{UNREADABLE}"))


def read_sidecar(step_folder: Path) -> dict[str, Any]:
    """What was written beside a checkpoint's tensors. Raises ValueError if it is damaged."""
    path = step_folder / "record" / "metadata"
    try:
        return unseal(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError("record/metadata is missing") from None
    except ValueError as error:
        raise ValueError(f"record/metadata is damaged: {error}") from error


def _newest_sidecar(folder: Path) -> tuple[int, dict[str, Any]]:
    """The newest step whose sidecar can be read, and it; (0, {}) if there is none."""
    for step, path in reversed(saved_step_folders(folder).items()):
        try:
            return step, read_sidecar(path)
        except ValueError as error:
            log.warning("%s: %s", path, error)
    return 0, {}


def check_origin(
    folder: Path, step: int, sidecar: Mapping[str, Any], record: Mapping[str, Any] | None = None
) -> None:
    """Raises ValueError unless a checkpoint was saved with the folder's config or one before it.

    Args:
      folder: of the run.
      step: of the checkpoint.
      sidecar: of the checkpoint, or {}.
      record: in place of config.json, where that is about to be written again.
    """
    if "config" not in sidecar:
        return
    known = _records(folder).keys() | ({record[SEAL]} if record else set())
    if sidecar["config"] not in known:
        raise ValueError(
            f"{folder / 'config.json'} is not the one that checkpoint {step} was saved with: put "
            "that back from a backup"
        )


def different_tensors(sidecar: Mapping[str, Any], tensors: Mapping[str, str]) -> str:
    """How the tensors of a checkpoint differ from those that are wanted, by the first one; ""
    if they do not."""
    if not sidecar:
        return ""
    there = {name: entry["type"] for name, entry in sidecar.get("tensors", {}).items()}
    return different_types(there, tensors)


def different_types(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """How tensors there differ from those here, by the first name; "" if they do not."""
    names = sorted(there.keys() | here.keys())
    other = [name for name in names if there.get(name) != here.get(name)]
    if not other:
        return ""
    name = other[0]
    more = f" ({len(other)} tensors differ)" if len(other) > 1 else ""
    return f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here{more}"


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = [
        line
        for line in diff_configs(old["config"], new["config"])
        if line.partition(":")[0] not in OF_NO_MATTER
    ]
    was, now = old["data"]["fingerprint"], new["data"]["fingerprint"]
    if was != now:
        lines.append(f"data: the fingerprint {was} -> {now} (other data or tokenizer)")
    if old["data"].get("order") != new["data"]["order"]:
        lines.append(
            "data: this version reads the rows in another order than the run has read them"
        )
    return lines
