"""The run's folder: what is damaged, of other checkpoints or not to be written is refused."""

import copy
import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import pytest

from configs import base
from data.sealed import SEAL, seal
from laser.training import run_folder
from laser.training.checkpoint import Checkpoints
from laser.training.config import load_config
from laser.training.run_folder import load_record, open_run_folder
from laser.training.tensors import tensor_types
from scripts import verify_run

CONFIG = load_config(base.get_config())
FASTER = dataclasses.replace(
    CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=0.5)
)
STATE = {"params": {"w": jnp.arange(12.0).reshape(3, 4)}, "step": jnp.int32(5)}
OTHER_STATE = {"params": {"w": jnp.zeros((3, 5))}, "step": jnp.int32(0)}


class Rows:
    fingerprint = "f1"

    def __init__(self, tokenizer_path):
        self.tokenizer_path = str(tokenizer_path)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "store.model"
    path.write_bytes(b"the tokenizer of the data")
    return Rows(path)


def start(run, rows, config=CONFIG, allow_change=False, state=STATE):
    return open_run_folder(str(run), config, rows, None, allow_change, tensor_types(state))


@pytest.fixture
def run(tmp_path, rows):
    """Folder of a run with checkpoints 5 and 10 and metrics."""
    folder = tmp_path / "run"
    record = start(folder, rows)
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    with Checkpoints(folder, CONFIG.checkpoint) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, STATE, note={"config": record[SEAL]})
    return folder


def content_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


def test_a_flipped_bit_of_config_or_tokenizer_is_named(run, rows):
    load_record(str(run))
    for name, message in (
        ("config.json", "config.json is damaged"),
        ("tokenizer.model", "tokenizer.model is not the tokenizer of this run"),
    ):
        path = run / name
        content = path.read_bytes()
        for place in range(5, len(content) - 5, len(content) // 7):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(ValueError, match=rf"{run}/{message}.*put it back"):
                load_record(str(run))
        path.unlink()
        with pytest.raises(ValueError, match=f"{path} is missing"):
            load_record(str(run))
        path.write_bytes(content)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it is empty"),
        (bytes(300), "it is empty"),
        (b"{}", "no checksum of itself"),
        (b'{"config', "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (None, "is missing beside checkpoints"),
    ],
)
def test_a_damaged_config_goes_on_with_the_runs_own_command_alone(run, rows, content, reason):
    path = run / "config.json"
    before = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as refused:
        start(run, rows, FASTER, allow_change=True)
    assert reason in str(refused.value)
    assert "put the file back" in str(refused.value)
    assert (path.read_bytes() if path.exists() else None) == content
    start(run, rows)
    assert path.read_bytes() == before
    load_record(str(run))


def test_other_data_are_named_whatever_they_are(run, rows, monkeypatch):
    """Text, images or speech."""
    monkeypatch.setattr(rows, "fingerprint", "f2")
    words = r"data: the fingerprint f1 -> f2 \(other data or tokenizer\)"
    with pytest.raises(ValueError, match=words):
        start(run, rows)


def test_a_config_that_is_no_run_of_ours_is_left_alone(tmp_path, rows):
    """The folder of something else, such as an export."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"not written by train\.py"):
        start(folder, rows)
    assert (folder / "config.json").read_text() == '{"model_type": "gpt2"}'


def test_the_config_of_another_run_is_refused(run, rows, tmp_path):
    other = tmp_path / "other"
    start(other, rows, FASTER)
    shutil.copyfile(other / "config.json", run / "config.json")
    with pytest.raises(ValueError, match="not the one that checkpoint 10 was saved with"):
        start(run, rows, FASTER)


def test_another_model_is_refused_before_anything_is_written(run, rows):
    before = content_of(run)
    with pytest.raises(ValueError, match="checkpoint 10 is of another model") as refused:
        start(run, rows, FASTER, allow_change=True, state=OTHER_STATE)
    assert "params/w is float32[3,4] there and float32[3,5] here" in str(refused.value)
    assert content_of(run) == before


def test_another_optimizer_is_refused_though_its_tensors_are_the_same(run, rows):
    lamb = dataclasses.replace(CONFIG.optimizer, name="lamb")
    before = content_of(run)
    with pytest.raises(ValueError, match=r"optimizer\.name is adamw there and lamb here"):
        start(run, rows, dataclasses.replace(CONFIG, optimizer=lamb), allow_change=True)
    assert content_of(run) == before


def _changed(config, section, name):
    """The config with another value of a field, which need not make sense."""
    value = getattr(getattr(config, section), name)
    other = value + 1 if isinstance(value, int | float) else f"{value}x"
    if isinstance(value, bool):
        other = not value
    part = copy.copy(getattr(config, section))
    object.__setattr__(part, name, other)
    changed = copy.copy(config)
    object.__setattr__(changed, section, part)
    return changed


FREE = {
    "data.store", "data.tasks_dir", "data.prefetch", "data.read_ahead", "data.requests",
    "data.cache_dir", "data.cache_gb", "training.wandb_project", "training.profile_steps",
    "training.step_timeout_seconds",
}  # fmt: skip


def test_the_fields_that_may_change_are_those_that_change_no_result(run, rows):
    for section in ("data", "optimizer", "training", "evaluation", "checkpoint", "mesh", "model"):
        for field in dataclasses.fields(getattr(CONFIG, section)):
            if field.name in ("attention", "kind"):
                continue
            name = f"{section}.{field.name}"
            changed = _changed(CONFIG, section, field.name)
            if name in FREE:
                start(run, rows, changed)
                continue
            with pytest.raises(ValueError, match=rf"\n  {re.escape(name)}: "):
                start(run, rows, changed)


def test_a_changed_config_keeps_the_old_one_and_its_checkpoints(run, rows):
    record = start(run, rows, FASTER, allow_change=True)
    assert (run / "config.0.json").exists()
    start(run, rows, FASTER)
    with Checkpoints(run, CONFIG.checkpoint) as checkpoints:
        checkpoints.save(15, STATE, note={"config": record[SEAL]})
    start(run, rows, FASTER)
    (run / "config.0.json").unlink()
    start(run, rows, FASTER)  # the newest is all that training needs


def test_no_config_that_was_kept_is_written_over(run, rows):
    changed = [dataclasses.replace(FASTER, optimizer=dataclasses.replace(
        FASTER.optimizer, learning_rate=rate)) for rate in (0.1, 0.2, 0.3)]  # fmt: skip
    start(run, rows, changed[0], allow_change=True)
    record = start(run, rows, changed[1], allow_change=True)
    with Checkpoints(run, CONFIG.checkpoint) as checkpoints:
        checkpoints.save(15, STATE, note={"config": record[SEAL]})
    kept = (run / "config.1.json").read_text()
    (run / "config.0.json").unlink()
    start(run, rows, changed[2], allow_change=True)
    assert (run / "config.1.json").read_text() == kept
    assert (run / "config.2.json").exists()


def test_a_folder_that_cannot_be_written_is_named(rows):
    with pytest.raises(ValueError, match="workdir=/proc/no/run: cannot be written"):
        start("/proc/no/run", rows)


def damage_tensors(step_folder):
    largest = max((step_folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


def test_verify_takes_back_what_is_intact(run, capsys):
    main = [str(run)]
    assert verify_run.main(main) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all is intact"

    shutil.move(run / "checkpoints" / "10", run / "10.unreadable")
    shutil.copytree(run / "10.unreadable", run / "7.unreadable")  # another step's
    assert verify_run.main(main) == 1
    said = capsys.readouterr().out
    assert f"10.unreadable: intact, taken back as {run}/checkpoints/10" in said
    assert "7.unreadable: damaged: it was saved as step 10" in said
    assert list(run_folder.saved_step_folders(run)) == [5, 10]
    assert verify_run.main(main) == 1
    shutil.rmtree(run / "7.unreadable")
    assert verify_run.main(main) == 0


@pytest.mark.parametrize("what", ["tensors", "sidecar", "config", "tokenizer", "metrics", "mark"])
def test_verify_names_what_is_damaged(run, capsys, what):
    if what == "tensors":
        damage_tensors(run / "checkpoints" / "10")
        expected = "checkpoints/10: damaged: params/w"
    elif what == "sidecar":
        (run / "checkpoints" / "5" / "record" / "metadata").write_bytes(b"")
        expected = "checkpoints/5: damaged: record/metadata is damaged: it is empty"
    elif what == "metrics":
        (run / "metrics.jsonl").write_bytes(bytes(30) + b"\n")
        expected = "metrics.jsonl, line 1 is damaged"
    elif what == "mark":
        sidecar = run / "checkpoints" / "5" / "record" / "metadata"
        content = json.loads(sidecar.read_text())
        content["metrics"] = {"bytes": 20, SEAL: "0"}
        sidecar.write_text(json.dumps(seal(content)))
        expected = "the lines up to step 5 are not those that were written"
    else:
        path = run / {"config": "config.json", "tokenizer": "tokenizer.model"}[what]
        path.write_bytes(path.read_bytes()[:-9])
        expected = f"{path.name} is "
    before = content_of(run)
    assert verify_run.main([str(run)]) == 1
    assert expected in capsys.readouterr().out
    assert content_of(run) == before


def test_verify_refuses_what_is_no_folder(capsys):
    for arguments in ([], ["/nowhere"], ["a", "b"]):
        with pytest.raises(SystemExit) as ended:
            verify_run.main(arguments)
        assert ended.value.code == 2


def test_a_run_that_read_its_rows_in_another_order_is_refused(run, rows):
    record = json.loads((run / "config.json").read_text())
    del record["data"]["order"], record["config"]["data"]["block_rows"]  # as runs once were
    (run / "config.json").write_text(json.dumps(seal(record)))
    for checkpoint in (run / "checkpoints").iterdir():
        sidecar = checkpoint / "record" / "metadata"
        changed = json.loads(sidecar.read_text()) | {"config": seal(record)[SEAL]}
        sidecar.write_text(json.dumps(seal(changed)))
    before = content_of(run)
    with pytest.raises(ValueError, match="reads the rows in another order than the run has read"):
        start(run, rows)
    assert content_of(run) == before
