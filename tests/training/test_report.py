"""The report: one step behind, each step once, speeds over training time alone."""

import json

import pytest

from laser.training import hosts
from laser.training.report import Report


class Recorder:
    def __init__(self):
        self.records = []

    def write(self, step, metrics):
        self.records.append((step, dict(metrics)))

    def close(self):
        pass


class Clock:
    """Stands in for time.perf_counter."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("laser.training.report.time.perf_counter", clock)
    return clock


def make_report(recorder, skipped, log_every=1, peak_flops=1e6, bound_seconds=0.0, steps=1000):
    return Report(
        recorder,
        steps=steps,
        log_every=log_every,
        tokens_per_step=1000,
        flops_per_token=50,
        peak_flops=peak_flops,
        bound_seconds=bound_seconds,
        on_skipped=lambda step, metrics: skipped.append(step),
    )


def metrics(loss=1.0, skipped_in_a_row=0.0):
    return {"loss": loss, "gradient_norm": 1.0, "skipped_in_a_row": skipped_in_a_row}


def two_steps(report, clock, seconds, waited=0.0):
    """The second of them has a speed."""
    for step in (1, 2):
        clock.now += seconds
        report.push(step, metrics(), waited * (step - 1))
        report.flush()


def test_reads_a_step_when_the_next_one_is_on_its_way(clock):
    recorder = Recorder()
    report = make_report(recorder, [])
    report.push(1, metrics(1.5), 0.0)
    assert recorder.records == []
    clock.now += 1
    report.push(2, metrics(2.5), 0.0)
    assert [(step, record["loss"]) for step, record in recorder.records] == [(1, 1.5)]
    clock.now += 1
    report.flush()
    report.flush()
    assert [step for step, _ in recorder.records] == [1, 2]


def test_speed_counts_neither_evaluation_nor_saving(clock):
    recorder = Recorder()
    report = make_report(recorder, [], log_every=2)
    for step, waited in ((1, 0.1), (2, 0.3), (3, 0.3), (4, 0.9)):
        clock.now += 2.0
        report.push(step, metrics(), waited)
        report.flush()
        with report.off_the_clock():
            clock.now += 100.0
        with report.off_the_clock():
            clock.now += 50.0
    steps = dict(recorder.records)
    assert sorted(steps) == [1, 2, 4]
    assert steps[4]["seconds_per_step"] == pytest.approx(2.0)
    assert steps[4]["tokens_per_second"] == pytest.approx(500)
    assert steps[4]["mfu"] == pytest.approx(500 * 50 / 1e6)
    assert steps[4]["data_wait_seconds"] == pytest.approx(0.3)
    assert steps[4]["perplexity"] == pytest.approx(2.718281828)
    assert steps[4]["memory_gib"] > 0


@pytest.mark.parametrize("before", [0, 20])
def test_the_first_step_of_a_process_which_compiles_has_no_speed(clock, before):
    recorder = Recorder()
    report = make_report(recorder, [], bound_seconds=0.5, log_every=4, steps=before + 6)
    clock.now += 600.0  # to compile
    for step in range(1, 7):
        clock.now += 2.0
        report.push(before + step, metrics(), 30.0 + 0.25 * step)
        report.flush()
        with report.off_the_clock():
            clock.now += 100.0
    steps = dict(recorder.records)
    assert [step - before for step in steps] == ([4, 6] if before else [1, 4, 6])
    if not before:
        speeds = {"seconds_per_step", "tokens_per_second", "mfu", "of_bound", "data_wait_seconds"}
        assert not speeds & steps[1].keys()
        assert {"loss", "perplexity", "memory_gib"} < steps[1].keys()
    for step in (4, 6):
        assert steps[before + step]["seconds_per_step"] == pytest.approx(2.0)
        assert steps[before + step]["data_wait_seconds"] == pytest.approx(0.25)


def test_no_mfu_where_the_peak_is_unknown(clock):
    recorder = Recorder()
    report = make_report(recorder, [], peak_flops=0.0)
    two_steps(report, clock, 1.0)
    assert "tokens_per_second" in recorder.records[1][1]
    assert "mfu" not in recorder.records[1][1]


def test_how_near_a_step_comes_to_its_bound(clock):
    recorder = Recorder()
    report = make_report(recorder, [], bound_seconds=0.5)
    two_steps(report, clock, 2.0)
    assert recorder.records[1][1]["of_bound"] == pytest.approx(0.25)


def test_skipped_steps_are_told_whether_or_not_they_are_logged(clock):
    skipped = []
    report = make_report(Recorder(), skipped, log_every=10)
    for step in range(1, 6):
        clock.now += 1
        report.push(step, metrics(float("nan"), step in (2, 4)), 0.0)
    report.flush()
    assert skipped == [2, 4]


def test_the_host_that_waits_longest_for_data_is_told_and_named(clock, monkeypatch, caplog):
    said = []
    monkeypatch.setattr(hosts, "tell", said.append)
    others = ["", '{"data_wait_seconds": 0.3, "memory_gib": 7.5}', ""]
    monkeypatch.setattr(hosts, "told", lambda: others)
    recorder = Recorder()
    report = make_report(recorder, [])
    two_steps(report, clock, 1.0, waited=0.05)
    assert json.loads(said[0])["data_wait_seconds"] == pytest.approx(0.05)
    _, record = recorder.records[1]
    assert record["data_wait_seconds"] == 0.3
    assert record["memory_gib"] == 7.5
    assert "host 0 waits 0.3 s a step for data, of 1 s" in caplog.text.replace("host 1", "host 0")
    others[1] = '{"data_wait_seconds": 0.08, "memory_gib": 7.5}'
    caplog.clear()
    clock.now += 1
    report.push(3, metrics(), 0.05)
    report.flush()
    assert "waits" not in caplog.text
