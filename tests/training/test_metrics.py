"""The record of a run: whole after kills and resumes, and valid JSON whatever the numbers are."""

import io
import json
import logging
import math
import re
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from laser.training import folders
from laser.training.metrics import (
    JsonlWriter,
    TerminalLine,
    format_count,
    format_duration,
    make_writer,
    mark_of,
    read_metrics,
)
from laser.training.records import Records
from laser.training.tensorboard import TensorBoardWriter


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _steps(path):
    return [line["step"] for line in read_metrics(path)]


def test_each_step_is_there_once_after_a_kill_and_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    killed = JsonlWriter(str(tmp_path))
    for step in (10, 20, 30):
        killed.write(step, {"loss": 1.0})
    killed.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # torn by the kill

    resumed = JsonlWriter(str(tmp_path))
    resumed.truncate_after(20)
    assert _steps(path) == [10, 20]
    for step in (30, 40):
        resumed.write(step, {"loss": 2.0})
    resumed.close()

    assert _steps(path) == [10, 20, 30, 40]
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 1.0, 2.0, 2.0]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert _steps(path) == [1]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


@pytest.mark.parametrize("broken", [b'{"st', bytes(40), b"\xff\xfe", b"[1]", b'{"loss": 1}', b""])
def test_lines_that_cannot_be_read_are_left_out_kept_aside_and_told(tmp_path, caplog, broken):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + broken + b'\n{"step": 3}\n{"step": 4}\n{"st'
    path.write_bytes(content)
    JsonlWriter(str(tmp_path)).truncate_after(3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    assert "1 lines cannot be read" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content


def test_a_change_of_what_was_written_is_told(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.5}\n')
    mark = mark_of(path)
    with path.open("a") as file:
        file.write('{"step": 2, "loss": 1.5}\n')
    JsonlWriter(str(tmp_path)).truncate_after(1, mark)
    assert caplog.text == ""
    path.write_text('{"step": 1, "loss": 1.7}\n')
    JsonlWriter(str(tmp_path)).truncate_after(1, mark)
    assert "up to step 1 are not those that were written" in caplog.text


def test_skipped_steps_that_are_done_again_are_there_once(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_text('{"step": 3}\n{"step": 9}\n')
    make_writer(Records(tmp_path), 10, resume_step=5, enabled=True).close()
    assert path.read_text() == '{"step": 3}\n'


def test_tensorboard_reads_a_resumed_run_last_though_the_clock_was_set_back(tmp_path, monkeypatch):
    for now in (2e9, 1e9, 3e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        writer = TensorBoardWriter(Records(tmp_path), first_step=int(now // 1e8))
        writer.close()
    events = _read_events(tmp_path / "tensorboard")  # in the order of their names, as there
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert starts == [20, 10, 30]


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    writer = JsonlWriter(str(tmp_path))
    writer.write(1, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
    writer.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_null(tmp_path, value):
    writer = JsonlWriter(str(tmp_path))
    writer.write(1, {"loss": value, "mfu": 0.5})
    writer.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "mfu": 0.5}


def _read_events(folder):
    events = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(content[:8], "little")
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_tensorboard_gets_the_values_and_hides_what_is_done_again(tmp_path):
    writer = TensorBoardWriter(Records(tmp_path), first_step=21)
    writer.write(30, {"eval/loss": 2.5})
    writer.close()
    events = _read_events(tmp_path / "tensorboard")
    assert [e.step for e in events if e.session_log.status == SessionLog.START] == [21]
    written = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert written == [(30, "eval/loss", 2.5)]


METRICS = {
    "loss": 3.21456,
    "gradient_norm": 0.5,
    "tokens_per_second": 12345.6,
    "mfu": 0.412,
    "seconds_per_step": 2.0,
}


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("laser.training.metrics.time.monotonic", lambda: clock.now)
    return clock


def _seen(stream):
    """The lines of a terminal, where each is what was written over it last."""
    return [re.split("\r\x1b\\[K", line)[-1] for line in stream.getvalue().split("\n")]


def _steps_seen(stream):
    return [int(line.split()[1].partition("/")[0]) for line in _seen(stream) if "step" in line]


def test_a_terminal_has_one_line_written_over_and_keeps_the_first_and_one_a_minute(clock):
    stream = _Terminal()
    writer = TerminalLine(1000, stream)
    for step in range(1, 14):
        writer.write(step, METRICS)
        clock.now += 10
    assert _steps_seen(stream) == [1, 7, 13]
    writer.write(14, METRICS)
    writer.write(15, METRICS)
    writer.write(15, {"eval/loss": 3.0})
    assert _seen(stream)[-2:] == ["step 15/1,000  eval loss 3.0000", ""]
    writer.write(16, METRICS)
    writer.close()
    assert _steps_seen(stream) == [1, 7, 13, 15, 15, 16]
    assert stream.getvalue().endswith("\n")


def test_what_is_logged_begins_a_line_of_its_own(clock, monkeypatch):
    stream = _Terminal()
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    writer = TerminalLine(1000, stream)
    for step in (1, 2):
        writer.write(step, METRICS)
    logging.warning("saved")
    logging.warning("and on")
    writer.write(3, METRICS)
    writer.close()
    assert [line[:10] for line in _seen(stream)] == [
        "step 1/1,0", "step 2/1,0", "saved", "and on", "step 3/1,0", "",
    ]  # fmt: skip
    assert not handler.filters


def test_of_a_narrow_terminal_the_last_numbers_are_left_out(monkeypatch):
    """And of none a part: 3,547 of 3,547,142 tokens/s would be a number, too."""
    metrics = METRICS | {"tokens_per_second": 3547142.0, "seconds_per_step": 1.25}
    for columns, last in ((80, "3,547,142 tokens/s"), (60, "loss 3.2146"), (12, "step 123,45")):
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = _Terminal()
        writer = TerminalLine(160000, stream)
        writer.write(123456, metrics)
        (line,) = filter(None, _seen(stream))
        assert line.endswith(last)
        if columns > 12:
            assert line.startswith("step 123,456/160,000  left 12 h 41 min  loss 3.2146")
        writer.write(123456, {"eval/a": 1.0, "eval/b": 2.0, "eval/c": 3.0})
        assert _seen(stream)[-2].endswith("a 1.0000  b 2.0000  c 3.0000")


def test_a_log_file_has_a_line_now_and_then_and_the_last_step_always(clock):
    stream = io.StringIO()
    writer = TerminalLine(40, stream)
    for step in (10, 20, 30, 40):
        writer.write(step, METRICS)
        clock.now += 5
    first, second, last = stream.getvalue().splitlines()
    assert first == (
        "step 10/40  left 1 min 0 s  loss 3.2146  12,346 tokens/s  MFU 41.2%  grad norm 0.5"
    )
    assert second.startswith("step 30/40")
    assert last.startswith("step 40/40")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1.0882, "1.09"), (134.1, "134"), (999.7, "1 k"), (301203456, "301 M"),
        (1048576, "1.05 M"), (167.77e9, "168 B"), (15.3e12, "15.3 T"), (0.00123, "0.00123"),
    ],
)  # fmt: skip
def test_counts(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12, "12 s"), (250, "4 min 10 s"), (12300, "3 h 25 min"), (183600, "2 d 3 h")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_only_the_first_process_writes(tmp_path):
    writer = make_writer(Records(tmp_path / "other"), 10, resume_step=0, enabled=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "other").exists()


def test_a_fresh_run_in_a_folder_with_metrics_starts_them_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    writer = make_writer(Records(tmp_path), 10, resume_step=0, enabled=True)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert _steps(tmp_path / "metrics.jsonl") == [1]
    assert (tmp_path / "tensorboard").is_dir()


def test_in_a_mounted_bucket_files_that_grow_are_written_as_a_whole(tmp_path, monkeypatch):
    """gcsfuse shows what was written to a file when it is closed."""
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(folders, "MOUNTS", mounts)
    workdir = tmp_path / "bucket" / "runs" / "mine"
    workdir.mkdir(parents=True)
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nname {tmp_path}/bucket fuse.gcsfuse rw 0 0\n")
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
    records = Records(workdir, ["metrics.jsonl"])
    writer = make_writer(records, 10, resume_step=1, enabled=True)
    writer.write(2, {"loss": 1.0})
    assert len(read_metrics(workdir / "metrics.jsonl")) == 1
    records.write()
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl")] == [1, 2]
    writer.close()
    mounts.write_text("/dev/sda1 / ext4 rw 0 0\n")
    assert Records(workdir).folder == workdir
