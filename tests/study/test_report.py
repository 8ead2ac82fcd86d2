"""From made-up runs to results, choices, tables and figures; failures among them are results."""

import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import base
from data.sealed import file_sha256, seal
from laser.training import versions
from laser.training.config import to_dict
from laser.training.run_folder import load_versions
from scripts.study import main
from study import chips, estimate, figures, report, results, run, tables
from study.figures import draw_all
from tests.eval.tasks.test_prompts import RAW

pytestmark = pytest.mark.slow

STUDY = """
from configs import quickstart
from configs.study import Best, Comparison, Stage, Study

def get_config(arguments=""):
    return quickstart.get_config(arguments)

def get_study():
    rate, arms = "optimizer.learning_rate", ("standard", "laser")
    rates = Stage("rates", {rate: (1e-3, 3e-3), "attention": arms}, why="rates")
    main = Stage("main", {"training.seed": (0, 1, 2), "attention": arms, rate: Best(("rates",))})
    compare = Comparison("main", {"attention": "laser"}, {"attention": "standard"})
    return Study([rates, main], [compare], sizes=("main",))
"""


def _loss(settings):
    """LASER's is lower by 0.1, 0.2 and 0.3 for seeds 0, 1, 2; 3e-3 is the better rate for it."""
    seed, rate = settings.get("training.seed", 0), settings["optimizer.learning_rate"]
    laser = settings["attention"] == "laser"
    return 3.0 - (0.1 * (seed + 1) if laser else 0) + (0.5 if laser == (rate == 1e-3) else 0)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Runs that end at once; a list of what was started, and exit codes by key."""
    started, codes = [], {}

    def launch(command, log_file, variables):
        folder = log_file.parent
        key = f"{folder.parent.name}/{folder.name}"
        started.append(key)
        code, words = codes.get(key, (0, "done"))
        with log_file.open("a") as log:
            log.write(f"{words}\n")
        if code == 0:
            if not plans:
                plans.append(run.Plan(str(file)))
            _write_run(folder, plans[0], key)
        end = (
            f"raise SystemExit({code})"
            if code >= 0
            else f"import os; os.kill(os.getpid(), {-code})"
        )
        return subprocess.Popen([sys.executable, "-c", end])

    file = tmp_path / "mine.py"
    file.write_text(STUDY)
    plans = []
    monkeypatch.setattr(run, "_launch", launch)
    monkeypatch.setattr(run, "POLL", 0.01)
    monkeypatch.setattr(estimate, "_matrix_product", lambda: 1e11)
    monkeypatch.setattr(figures, "draw_all", lambda record, folder: [folder / "differences.png"])
    return [f"--study={file}", f"--output={tmp_path / 'out'}"], started, codes, tmp_path / "out"


@pytest.fixture
def drawn(fake, monkeypatch):
    """The figures are drawn, too, which takes more time than all the rest of a study."""
    monkeypatch.setattr(figures, "draw_all", draw_all)


TRAINED_BY = {"commit": "abc", "packages": {"jax": "9"}, "machine": "another", "devices": "1 cpu"}


def _write_config(folder, plan, key, **others):
    """Returns the settings of the run."""
    for stage in plan.study.stages:
        for sign in (1, -1):  # by the loss, or by the error
            for cell in plan.cells(stage, lambda cell, sign=sign: sign * _loss(cell.settings)):
                if cell.key == key:
                    settings, config = cell.settings, to_dict(cell.config())
    (folder / "tokenizer.model").write_bytes(b"t")
    record = {"config": config, "data": {"fingerprint": "f"}, "init_step": None,
              "tokenizer": file_sha256(folder / "tokenizer.model")}  # fmt: skip
    record["config"]["optimizer"] |= others
    (folder / "config.json").write_text(json.dumps(seal(record)))
    (folder / "versions.json").write_text(json.dumps(TRAINED_BY))
    return settings


def _write_run(folder, plan, key, **others):
    settings = _write_config(folder, plan, key, **others)
    final = _loss(settings)
    common = {"gradient_norm": 1.0, "seconds_per_step": 0.5, "skipped_steps": 0.0}
    lines = [{"step": step, "loss": final + 1, **common} for step in range(10, 501, 10)]
    for step, loss in ((250, final + 1.0), (500, final)):
        line = {"step": step, "eval/loss": loss, "eval/bits_per_byte": loss / 2}
        line["eval/error"] = 1 - loss / 10  # the lower loss is the higher error
        lines.insert(step // 10, line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if settings["attention"] == "standard":
        spike = {"step": 300, "loss": 9.0, "deviations": 8.0, "row_ids": []}
        (folder / "spikes.jsonl").write_text(f"{json.dumps(spike)}\n")


def _write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def _table(text, title):
    section = text.partition(f"### {title}\n\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in section.splitlines()[2:]]


@pytest.mark.usefixtures("drawn")
def test_a_study_to_its_report(fake, capsys):
    arguments, started, codes, out = fake
    failing = "rates/learning_rate=0.001,attention=laser"
    codes[failing] = (3, "10 steps in a row had a non-finite loss")
    assert main(arguments) == 0
    text = (out / "report.md").read_text()
    (row,) = _table(text, "Differences of the final validation loss")
    # mean of -0.1, -0.2, -0.3 and t(0.975, 2) = 4.3027 times 0.1 / sqrt(3)
    assert row[:6] == ["main", "laser − standard", "3", "-0.2000", "-0.4484 to +0.0484", "-6.67 %"]
    # on the last half of the curve, one nat in 250 steps
    assert row[6:] == ["90.0 %", "90.0 %", "no difference that these runs can tell"]
    assert ["rates", failing.partition("/")[2], codes[failing][1]] in _table(text, "Failed runs")
    groups = {row[1]: row for row in _table(text, "All groups")}
    assert groups["attention=laser, learning_rate=0.003"][2:5] == [
        "3", "2.8000 ± 0.1000", "1.4000 ± 0.0500",
    ]  # fmt: skip
    assert groups["attention=standard, learning_rate=0.001"][6] == "3"  # at its own rate
    assert groups["attention=laser, learning_rate=0.003"][6] == "0"
    for name in ("rates_rates", "curves_main", "differences"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # Again: nothing is trained, and the tables follow from the numbers alone.
    capsys.readouterr()
    count = len(started)
    assert main(arguments) == 0
    assert len(started) == count == 10

    assert tables.all_tables(report.read_numbers(out / "numbers.json")) in text


@pytest.mark.usefixtures("drawn")
def test_another_measure_than_the_loss_decides(fake, tmp_path, capsys):
    arguments, _, _, out = fake
    both = '("training.seed", "data.shuffle_seed"): [(i, i) for i in range(3)]'
    study = STUDY.replace('"training.seed": (0, 1, 2)', both)
    study = study.replace('sizes=("main",)', 'measure="eval/error"')
    (tmp_path / "mine.py").write_text(study)
    assert main(arguments) == 0
    text = (out / "report.md").read_text()
    (row,) = _table(text, "Differences of the final eval/error")
    # each at its rate of the higher loss, so of the lower error: 0.65, and LASER 0.01 more a seed
    assert row[:6] == ["main", "laser − standard", "3", "+0.0200", "-0.0048 to +0.0448", "+3.08 %"]
    groups = {row[1]: row for row in _table(text, "All groups")}
    chosen = groups["attention=laser, learning_rate=0.001"]
    assert chosen[2:5] == ["3", "3.3000 ± 0.1000", "0.6700 ± 0.0100"]
    best = {(row[1], row[2]) for row in _table(text, "Best learning rates")}
    assert best == {("laser", "0.001"), ("standard", "0.003")}

    (tmp_path / "mine.py").write_text(study.replace("eval/error", "eval/errors"))
    shutil.rmtree(out)
    capsys.readouterr()
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "measure=eval/errors is not in its metrics.jsonl; there are" in told
    assert "eval/error," in told


def test_best_rates_are_of_groups_that_differ_in_nothing_else(monkeypatch, tmp_path):
    def run(rate, decay, seed, loss):
        settings = {"optimizer.learning_rate": rate, "optimizer.weight_decay": decay,
                    "training.seed": seed, "attention": "laser"}  # fmt: skip
        status = {"status": "failed"} if loss is None else {"status": "done", "eval_loss": loss}
        return {"stage": "grid", "settings": settings, **status}

    names = ["optimizer.learning_rate", "optimizer.weight_decay", "training.seed", "attention"]
    runs = [
        run(1e-3, 0.1, 0, 3.0), run(1e-3, 0.1, 1, 4.0), run(2e-3, 0.1, 0, 3.4),
        run(4e-3, 0.1, 0, None), run(1e-3, 1.0, 0, None), run(2e-3, 1.0, 0, None),
    ]  # fmt: skip
    stage = {"name": "grid", "listed": names, "why": "", "runs": 6}
    record = {"stages": [stage], "runs": runs, "measure": "eval/loss"}
    rows = _table(f"### t\n\n{tables.best_rates(record)}\n\n", "t")
    told = "0.001: 3.5000; 0.002: 3.4000; 0.004: failed"
    assert rows == [
        ["grid", "0.1 laser", "0.002", told, "no"],
        ["grid", "1.0 laser", "–", "0.001: failed; 0.002: failed", "yes"],
    ]
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, axis, path: drawn.extend(axis.lines))
    figures.draw_all(record | {"compare": [], "sizes": []}, tmp_path)
    assert [line.get_label() for line in drawn] == ["0.1 laser, 4 runs", "1.0 laser, 2 runs"]
    for line, means in zip(drawn, ([3.5, 3.4, math.nan], [math.nan] * 2), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), means)


def test_runs_that_were_evaluated_once_do_not_tell_when_they_got_there():
    stage = {"name": "s", "listed": ["training.seed", "attention"], "why": "", "runs": 4}
    runs = [
        {"stage": "s", "settings": {"training.seed": seed, "attention": arm}, "status": "done",
         "eval_loss": loss, "curve": [(10, loss)], "steps": 10, "seconds_per_step": 1.0}
        for seed in (0, 1)
        for arm, loss in (("laser", 3.0), ("standard", 3.1))
    ]  # fmt: skip
    comparison = {"stage": "s", "one": {"attention": "laser"}, "other": {"attention": "standard"},
                  "other_stage": ""}  # fmt: skip
    record = {"stages": [stage], "runs": runs, "compare": [comparison], "measure": "eval/loss"}
    (row,) = _table(f"### t\n\n{tables.differences(record)}\n\n", "t")
    assert row[2:4] + row[6:] == ["2", "-0.1000", "–", "–", "laser ends lower"]


def test_fields_that_came_after_a_run_count_as_their_defaults():
    config = results.comparable(base.get_config().to_dict())
    default = config.pop("data.block_rows")
    assert results.changes({"config": config}, {**config, "data.block_rows": default}) == []
    lines = results.changes({"config": config}, {**config, "data.block_rows": default // 2})
    assert lines == [f"data.block_rows: (absent) -> {default // 2}"]


def _sized_runs(with_totals):
    """Three sizes of both arms, exactly on loss = 8 n^-0.1 and 0.98 times that."""
    runs = []
    for dim in (64, 128, 256):
        beside, total = 20 * dim**2, 20 * dim**2 + 1000 * dim
        for arm, factor in (("standard", 1.0), ("laser", 0.98)):
            run = {"stage": "sizes", "settings": {"attention": arm}, "status": "done",
                   "eval_loss": factor * 8 * total**-0.1, "parameters": beside,
                   "config": {"model.model_dim": dim}}  # fmt: skip
            runs.append(run | ({"all_parameters": total} if with_totals else {}))
    return runs


@pytest.mark.parametrize("with_totals", [True, False])
def test_the_power_law_is_of_all_parameters_and_says_how_many_fewer_do(with_totals):
    record = {"stages": [], "sizes": ["sizes"], "config": {"model.vocab_size": 1000},
              "runs": _sized_runs(with_totals)}  # fmt: skip
    told = tables.power_laws(record)
    largest = 20 * 256**2 + 1000 * 256
    assert f"| n at a loss of {8 * largest**-0.1:.4f} |" in told
    standard, laser = _table(f"### t\n\n{told}\n\n", "t")
    assert standard[:3] + standard[4:5] == ["standard", "3", "8.000", "-0.1000"]
    assert standard[6:] == [f"{largest:,}", "+0.00 %"]
    # 0.98 n^-0.1 = N^-0.1: n = 0.98^10 N
    assert laser[:3] + laser[4:5] == ["laser", "3", "7.840", "-0.1000"]
    assert laser[6:] == [f"{largest * 0.98**10:,.0f}", f"{100 * (0.98**10 - 1):.2f} %"]


def test_numbers_are_those_of_a_study(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(seal({"eval_loss": 3.0})))
    with pytest.raises(ValueError, match=r"result\.json: not the numbers of a study"):
        report.read_numbers(path)


@pytest.mark.usefixtures("drawn")
def test_a_run_that_ends_without_a_number_has_failed(fake):
    arguments, started, _, out = fake
    assert main(arguments) == 0
    folder = out / "main" / "seed=1,attention=laser,learning_rate=0.003"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["eval/loss"] = None
    _write_lines(folder / "metrics.jsonl", lines)
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "500").mkdir(parents=True)
    count = len(started)
    assert main(arguments) == 0
    assert len(started) == count
    text = (out / "report.md").read_text()
    assert "ended with a loss that is not finite" in text
    assert _table(text, "Differences of the final validation loss")[0][2] == "2, 1 more failed"


def test_a_run_whose_steps_have_no_speed_has_a_result(fake):
    arguments, _, _, out = fake
    assert main(arguments) == 0
    folder = out / "main" / "seed=1,attention=laser,learning_rate=0.003"
    first = {"step": 1, "loss": 3.0, "gradient_norm": 1.0, "time/steps": 0.25}
    evaluated = {"step": 500, "eval/loss": 3.0}
    _write_lines(folder / "metrics.jsonl", [first, evaluated])
    (folder / "result.json").unlink()
    (folder / "checkpoints" / "500").mkdir(parents=True)
    assert main(arguments) == 0
    assert json.loads((folder / "result.json").read_text())["seconds_per_step"] == 0.25


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert versions.here()["commit"] == "unknown"


def test_a_result_says_what_its_run_was_trained_by(fake):
    arguments, _, codes, out = fake
    codes["main/seed=2,attention=laser,learning_rate=0.003"] = (3, "diverged")
    assert main(arguments) == 0
    name = "seed={},attention=laser,learning_rate=0.003"
    folders = [out / "main" / name.format(seed) for seed in (1, 2)]
    done, failed = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert {name: done[name] for name in TRAINED_BY} == TRAINED_BY
    assert not {*TRAINED_BY} & {*failed}  # it left nothing that says so
    (folders[0] / "versions.json").write_text("{")
    with pytest.raises(ValueError, match=r"versions\.json: is damaged"):
        load_versions(folders[0])


def test_the_speed_is_that_of_such_a_machine(monkeypatch):
    here = {"machine": versions.machine()}
    for accelerator, devices, same in (
        (False, "8 cpu", True), (False, "4 TPU v5 lite", False), (True, "4 TPU v5 lite", True),
        (True, "8 cpu", False),
    ):  # fmt: skip
        monkeypatch.setattr(estimate, "has_accelerator", lambda there=accelerator: there)
        assert estimate._on_such_a_machine({**here, "devices": devices}) == same
        assert estimate._on_such_a_machine(here)  # a result of before
        assert not estimate._on_such_a_machine({"machine": "another", "devices": devices})
        assert not estimate._on_such_a_machine({})


def test_so_many_runs_at_a_time(fake, monkeypatch):
    arguments, started, _, _ = fake
    launch, running, alive = run._launch, [], []

    def slowly(command, log_file, variables):
        launch(command, log_file, variables).wait()
        alive.append(1 + sum(process.poll() is None for process in running))
        running.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"]))
        return running[-1]

    monkeypatch.setattr(run, "_launch", slowly)
    assert main([*arguments, "--at_once=2"]) == 0
    assert len(started) == 10
    assert max(alive) == 2


def test_runs_at_a_time_have_different_chips(fake, monkeypatch):
    arguments, started, _, _ = fake
    launch, given = run._launch, []

    def note(command, log_file, variables):
        taken = [chips for chips, process in given if process.poll() is None]
        assert variables["CUDA_VISIBLE_DEVICES"] not in taken
        launch(command, log_file, variables).wait()
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"])
        given.append((variables["CUDA_VISIBLE_DEVICES"], process))
        return process

    monkeypatch.setattr(run, "_launch", note)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(chips, "has_accelerator", lambda: True)
    monkeypatch.setattr(chips.glob, "glob", lambda pattern: ["/dev/nvidia4"])
    assert main([*arguments, "--at_once=2"]) == 0
    assert len(started) == 10
    assert {name for name, _ in given} == {"4,5", "6,7"}


def test_a_machine_whose_chips_cannot_be_divided_is_refused_before_anything(
    fake, monkeypatch, capsys
):
    arguments, started, _, out = fake
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(chips, "has_accelerator", lambda: True)
    monkeypatch.setattr(chips.glob, "glob", lambda pattern: [])
    assert main([*arguments, "--at_once=2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("study.py: error: --at_once=2: each run takes all TPU chips")
    assert said.count("\n") == 1
    assert (started, out.exists()) == ([], False)


def test_a_run_that_is_killed_goes_on_once(fake):
    arguments, started, codes, out = fake
    key = "main/seed=2,attention=laser,learning_rate=0.003"
    codes[key] = (-9, "")
    assert main(arguments) == 0
    assert started.count(key) == 2
    assert "killed by signal 9, 2 times (9: out of memory?)" in (out / "report.md").read_text()


def test_measuring_that_is_killed_is_no_result(fake, tmp_path, monkeypatch, capsys):
    arguments, started, _, out = fake
    measured = STUDY.replace('why="rates"', 'measures=("continuations",)')
    (tmp_path / "mine.py").write_text(measured)
    launch = run._launch

    def kill_what_measures(command, log_file, variables):
        if "study.measure" in command:
            end = "import os; os.kill(os.getpid(), 9)"
            return subprocess.Popen([sys.executable, "-c", end])
        process = launch(command, log_file, variables)
        (log_file.parent / "checkpoints" / "500").mkdir(parents=True)
        return process

    monkeypatch.setattr(run, "_launch", kill_what_measures)
    assert main(arguments) == 2
    assert "its measuring was killed by signal 9, 2 times" in capsys.readouterr().err
    assert started == ["rates/learning_rate=0.001,attention=standard"]  # and once
    assert not (out / started[0] / "result.json").exists()


ONE_SHOT = STUDY.replace('"attention": arms, rate: Best(("rates",))}', '"attention": arms, rate: '
                         'Best(("rates",))}, measures=("oneshot",)').replace(
    'sizes=("main",)', 'tasks=("copa", "cb")'
)  # fmt: skip


def _measure_at_once(monkeypatch, commands):
    """In place of study.measure: LASER has 10, 20 and 30 points more of COPA, by seed."""
    launch = run._launch

    def measure(command, log_file, variables):
        if "study.measure" not in command:
            return launch(command, log_file, variables)
        commands.append(command)
        settings = results.load_record(str(log_file.parent))["config"]
        more = (settings["training"]["seed"] + 1) / 10
        copa = 0.5 + (more if settings["attention"]["kind"] == "laser" else 0)
        measured = {"oneshot": {"tasks": {"copa": copa, "cb": 0.4}, "mean": (copa + 0.4) / 2}}
        (log_file.parent / "measured.json").write_text(json.dumps(measured))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(run, "_launch", measure)


def test_one_shot_tasks_are_measured_and_compared(fake, tmp_path, monkeypatch):
    arguments, _, _, out = fake
    (tmp_path / "mine.py").write_text(ONE_SHOT)
    for folder, rows in (("COPA", "copa"), ("CB", "cb")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for split in ("train", "val"):
            lines = [json.dumps({**RAW[rows], "premise": f"{split} {i}."}) for i in range(3)]
            (tmp_path / "data" / folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    commands = []
    _measure_at_once(monkeypatch, commands)
    assert main([*arguments, f"--data_dir={tmp_path / 'data'}"]) == 0
    assert len(commands) == 6  # those of `rates` are not measured
    for command in commands:
        assert {"--tasks=copa,cb", f"--data_dir={tmp_path / 'data'}", "oneshot"} <= {*command}
    text = (out / "report.md").read_text()
    by_group = {row[1]: row[2:] for row in _table(text, "One-shot accuracy, in percent")}
    assert by_group == {
        "attention=standard, learning_rate=0.001":
            ["3", "45.00 ± 0.00", "40.00 ± 0.00", "50.00 ± 0.00"],
        "attention=laser, learning_rate=0.003":
            ["3", "55.00 ± 5.00", "40.00 ± 0.00", "70.00 ± 10.00"],
    }  # fmt: skip
    differences = _table(text, "Differences of one-shot accuracy, in points")
    untold = "no difference that these runs can tell"
    # mean of 10, 20, 30 and t(0.975, 2) = 4.3027 times 10 / sqrt(3)
    assert [row[1:] for row in differences] == [
        ["laser − standard", "mean", "3", "+10.00", "-2.42 to +22.42", untold],
        ["laser − standard", "cb", "3", "+0.00", "+0.00 to +0.00", untold],
        ["laser − standard", "copa", "3", "+20.00", "-4.84 to +44.84", untold],
    ]
    assert tables.all_tables(report.read_numbers(out / "numbers.json")) in text
    assert main(arguments) == 0  # nothing is measured any more, so no data are asked for


def test_data_of_tasks_that_are_missing_stop_a_study_before_it_trains(
    fake, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    arguments, started, _, out = fake
    (tmp_path / "mine.py").write_text(ONE_SHOT)
    (tmp_path / "data").mkdir()
    for given, words in (
        ([], "no data of super_glue/copa"),
        ([f"--data_dir={tmp_path / 'data'}"], "no data of super_glue/copa"),
        (["--data_dir=nowhere"], "data_dir=nowhere: no such folder"),
    ):
        assert main([*arguments, *given]) == 2
        assert words in capsys.readouterr().err
    assert (started, out.exists()) == ([], False)


def test_a_share_without_runs_ends_without_a_report(fake, tmp_path, capsys):
    arguments, started, _, out = fake
    study = STUDY.replace('Study([rates, main], [compare], sizes=("main",))', "Study([rates])")
    (tmp_path / "mine.py").write_text(study)
    out.mkdir()
    (out / "study.json.host-1.tmp").write_text("{")  # another machine begins just now
    assert main([*arguments, "--share=3/3"]) == 0
    assert "this share has no runs" in capsys.readouterr().out
    assert started == []
    assert not (out / "report.md").exists()
    assert main([*arguments, "--report"]) == 2
    assert main([*arguments, "--share=1/3"]) == 0
    assert main([*arguments, "--share=3/3"]) == 0
    assert (out / "report.md").exists()


def test_what_cannot_be_read_or_written_is_one_line(fake, tmp_path, capsys):
    arguments, _, _, out = fake
    assert main([arguments[0], f"--output={tmp_path / 'mine.py' / 'out'}"]) == 1
    told = capsys.readouterr().err
    assert "Not a directory" in told
    assert told.count("\n") == 1
    out.mkdir()
    for content in ("{", "[]", '{"study": "x.py"}'):
        (out / "study.json").write_text(content)
        assert main(arguments) == 2
        assert f"{out / 'study.json'}: is damaged" in capsys.readouterr().err


def test_shares_have_each_run_once(fake, monkeypatch, capsys):
    arguments, started, _, out = fake
    for share, rate in (("1/2", 0.001), ("2/2", 0.003)):
        capsys.readouterr()
        assert main([*arguments, "--commands", f"--share={share}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert all(f"learning_rate={rate}" in line for line in lines)  # both arms of it

    def stop_waiting(runner, words):
        if words.startswith("waiting"):
            runner._receive(signal.SIGTERM, None)

    monkeypatch.setattr(run.Runner, "_tell", stop_waiting)
    assert main([*arguments, "--share=1/2"]) == 75  # its runs of `main` wait for the other's rates
    assert started == [
        f"rates/learning_rate=0.001,attention={arm}" for arm in ("standard", "laser")
    ]
    assert not (out / "report.md").exists()
    assert main([*arguments, "--share=2/2"]) == 0
    assert len(started) == 2 + 2 + 2
    assert {key.split(",")[0] for key in started[4:]} == {"main/seed=1"}
    assert main([*arguments, "--share=1/2"]) == 0
    assert len(started) == len(set(started)) == 10


def test_memory_that_does_not_suffice_is_a_result(fake):
    arguments, started, codes, out = fake
    key = "main/seed=2,attention=laser,learning_rate=0.003"
    codes[key] = (1, "out of memory: RESOURCE_EXHAUSTED: 3 GiB\nsaid by another process")
    assert main(arguments) == 0
    assert started.count(key) == 1
    text = (out / "report.md").read_text()
    reason = "out of memory: RESOURCE_EXHAUSTED: 3 GiB"
    assert _table(text, "Failed runs") == [["main", key.partition("/")[2], reason]]
    (row,) = _table(text, "Differences of the final validation loss")
    assert row[2] == "2, 1 more failed"


def test_an_error_that_is_no_result_is_tried_once_more_and_ends_the_study(fake, capsys):
    arguments, started, codes, out = fake
    key = "rates/learning_rate=0.001,attention=standard"
    codes[key] = (1, "OSError: no space left on device")
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "exit code 1: OSError: no space left on device, 2 times" in told
    assert started == [key] * 2
    assert not (out / key / "result.json").exists()
    del codes[key]
    assert main(arguments) == 0


def test_a_run_that_another_process_trains_is_waited_for(fake, monkeypatch):
    """Also where that process wrote into the log meanwhile."""
    arguments, started, codes, _ = fake
    monkeypatch.setattr(run, "WAIT", 0.01)
    key = "rates/learning_rate=0.001,attention=standard"
    codes[key] = (2, f"train.py: error: {run.OTHER_TRAINS}\nstep 20 loss 5.0")
    launch = run._launch

    def once(command, log_file, variables):
        process = launch(command, log_file, variables)
        codes.pop(key, None)
        return process

    monkeypatch.setattr(run, "_launch", once)
    assert main(arguments) == 0
    assert started.count(key) == 2


def test_the_place_of_the_data_is_that_of_each_machine(fake):
    arguments, _, _, out = fake
    elsewhere = "--config.data.store=/data/mine"
    assert main([*arguments, "--", elsewhere]) == 0
    before = (out / "study.json").read_text()
    assert elsewhere in before
    other = ["--config.data.store=/data/other", "--config.data.cache_dir=/tmp/blocks",
             "--config.data.requests=8", "--config.training.wandb_project=mine"]  # fmt: skip
    assert main([*arguments, "--", *other]) == 0
    assert main([*arguments, "--report", "--", *other]) == 0
    assert (out / "study.json").read_text() == before
    assert main([*arguments, "--", "--config.model.mlp_dim=8"]) == 2


def test_a_run_by_hand_of_another_config_is_refused(fake, capsys):
    arguments, _, _, out = fake
    key = "rates/learning_rate=0.001,attention=laser"
    (out / key / "checkpoints" / "500").mkdir(parents=True)
    (out / "study.json").write_text(
        json.dumps({"study": arguments[0].partition("=")[2], "flags": []})
    )
    plan = run.Plan(arguments[0].partition("=")[2])
    _write_run(out / key, plan, key, learning_rate=0.002)
    for asked in (["--report"], ["--commands"], []):
        assert main([*arguments, *asked]) == 2
        told = capsys.readouterr().err
        assert "another config (optimizer.learning_rate: 0.002 -> 0.001)" in told
        assert key in told
        assert not (out / key / "result.json").exists()
    _write_run(out / key, plan, key)
    assert main([*arguments, "--report"]) == 0
    assert main(arguments) == 0


def test_numbers_of_another_measure_are_not_mixed(fake, tmp_path, capsys):
    arguments, _, _, _ = fake
    assert main(arguments) == 0
    file = tmp_path / "mine.py"
    file.write_text(STUDY.replace('sizes=("main",)', 'measure="eval/error"'))
    capsys.readouterr()
    assert main([*arguments, "--report"]) == 2
    assert "measure: eval/loss -> eval/error" in capsys.readouterr().err


def test_a_mistake_that_a_run_finds_ends_the_study(fake, capsys):
    arguments, started, codes, _ = fake
    codes["rates/learning_rate=0.001,attention=standard"] = (2, "train.py: error: no store")
    assert main(arguments) == 2
    assert "no store" in capsys.readouterr().err
    assert len(started) == 1


def test_results_of_another_config_are_refused(fake, tmp_path, capsys):
    arguments, _, _, out = fake
    assert main(arguments) == 0
    file = tmp_path / "mine.py"
    changed = STUDY.replace("return quick", "config = quick")
    changed = changed.replace(
        "(arguments)\n\n", "(arguments)\n    config.model.mlp_dim = 8\n    return config\n\n"
    )
    file.write_text(changed)
    before = sorted(out.rglob("*"))
    assert main(arguments) == 2
    assert "model.mlp_dim: 1024 -> 8" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_runs_that_were_trained_elsewhere_are_collected(fake, capsys):
    arguments, started, _, out = fake
    assert main([*arguments, "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # those of `main` wait for the rates
    plan = run.Plan(arguments[0].partition("=")[2])

    def train(line):
        folder = Path(shlex.split(line)[-1].partition("=")[2])
        (folder / "checkpoints" / "500").mkdir(parents=True)
        _write_run(folder, plan, folder.relative_to(out).as_posix())

    diverging = Path(shlex.split(lines[0])[-1].partition("=")[2])
    assert diverging == out / "rates" / "learning_rate=0.001,attention=standard"
    diverging.mkdir(parents=True)
    _write_config(diverging, plan, diverging.relative_to(out).as_posix())
    limit = base.get_config().training.max_skipped_steps
    skipped = [
        {"step": step, "row_ids": [], "loss": "nan", "gradient_norm": "1.0"}
        for step in (3, *range(20, 20 + limit))
    ]
    _write_lines(diverging / "skipped.jsonl", skipped[:-1])
    for line in lines[1:]:
        train(line)
    assert main([*arguments, "--commands"]) == 0
    begun = [f"# begun: {lines[0]}"]  # and it may still get out of it
    assert capsys.readouterr().out.splitlines() == begun
    large = {**skipped[-1], "loss": "3.0", "gradient_norm": "99.0"}
    _write_lines(diverging / "skipped.jsonl", [*skipped[:-1], large])
    assert main([*arguments, "--commands"]) == 0
    assert capsys.readouterr().out.splitlines() == begun
    _write_lines(diverging / "skipped.jsonl", skipped)
    assert main([*arguments, "--commands"]) == 0
    rest = capsys.readouterr().out.splitlines()
    assert len(rest) == 6
    train(rest[0])
    assert main([*arguments, "--report"]) == 0
    assert started == []
    assert f"diverged: no update in steps 20 to {19 + limit}" in (out / "report.md").read_text()
    record = json.loads((out / "numbers.json").read_text())
    statuses = [run["status"] for run in record["runs"]]
    assert sorted(statuses) == ["done"] * 4 + ["failed"]
    assert main(arguments) == 0
    assert len(started) == 5


def test_runs_are_adopted_from_their_numbers(fake, tmp_path, capsys):
    arguments, started, codes, out = fake
    codes["main/seed=2,attention=laser,learning_rate=0.003"] = (3, "diverged")
    assert main(arguments) == 0
    report = (out / "report.md").read_text()
    numbers = out / "numbers.json"
    count = len(started)
    arguments = [arguments[0], f"--output={tmp_path / 'other'}"]
    capsys.readouterr()
    assert main([*arguments, f"--adopt={numbers}", "--estimate"]) == 0
    left = {line.split()[0]: line.split()[2] for line in capsys.readouterr().out.splitlines()[1:-1]}
    assert left == {"rates": "0", "main": "1"}
    assert not (tmp_path / "other").exists()
    assert main([*arguments, f"--adopt={numbers}"]) == 0
    assert "9 of 10 runs adopted" in capsys.readouterr().err  # what failed is trained again
    assert started[count:] == ["main/seed=2,attention=laser,learning_rate=0.003"]
    assert (tmp_path / "other" / "report.md").read_text() == report
    assert main([*arguments, "--report"]) == 0
    elsewhere = tmp_path / "elsewhere"
    assert main([arguments[0], f"--output={elsewhere}", f"--adopt={numbers}", "--report"]) == 0
    assert main([arguments[0], f"--output={elsewhere}", "--report"]) == 0  # it is a study's folder

    # A field that came after the runs is as good as its default; the tables are as before.
    record = json.loads(numbers.read_text())
    del record["config"]["model.matmul_precision"]
    (tmp_path / "older.json").write_text(json.dumps(seal(record)))
    count = len(started)
    older = f"--adopt={tmp_path / 'older.json'}"
    assert main([arguments[0], f"--output={tmp_path / 'later'}", older]) == 0
    assert "9 of 10 runs adopted" in capsys.readouterr().err

    # Of another config nothing is taken over, and damaged numbers end the command at once.
    file = tmp_path / "mine.py"
    changed = STUDY.replace("return quick", "config = quick").replace(
        "(arguments)\n\n", "(arguments)\n    config.model.mlp_dim = 8\n    return config\n\n"
    )
    file.write_text(changed)
    count = len(started)
    assert main([arguments[0], f"--output={tmp_path / 'third'}", f"--adopt={numbers}"]) == 0
    assert "0 of 10 runs adopted" in capsys.readouterr().err
    assert len(started) == count + 10
    absent = f"--adopt={tmp_path / 'nowhere.json'}"
    assert main([arguments[0], f"--output={tmp_path / 'fourth'}", absent]) == 2
    assert "nowhere.json: No such file" in capsys.readouterr().err
    numbers.write_bytes(numbers.read_bytes().replace(b"3.0", b"2.0", 1))
    assert main([arguments[0], f"--output={tmp_path / 'fourth'}", f"--adopt={numbers}"]) == 2
    assert "its checksum differs" in capsys.readouterr().err
    assert not (tmp_path / "fourth").exists()


def test_runs_of_other_data_are_not_mixed(fake, capsys):
    arguments, _, _, out = fake
    assert main(arguments) == 0
    path = out / "main" / "seed=1,attention=laser,learning_rate=0.003" / "result.json"
    path.write_text(json.dumps(seal({**json.loads(path.read_text()), "data": "another"})))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "seed=1,attention=laser" in error
    assert "other data" in error
