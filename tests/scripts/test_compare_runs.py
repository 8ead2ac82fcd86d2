"""compare_runs.py on two small made-up runs, and on folders that are no runs."""

import json

import pytest

from configs import base
from scripts.compare_runs import main


def _make_run(folder, offset=0.0, fingerprint="f", **changes):
    config = base.get_config().to_dict()
    for path, value in changes.items():
        section, _, key = path.partition("__")
        config[section][key] = value
    folder.mkdir()
    saved = {"config": config, "data": {"fingerprint": fingerprint}}
    (folder / "config.json").write_text(json.dumps(saved))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, 1001, 10):
            line = {
                "step": step,
                "loss": 4 - step / 1000 + offset if step != 1000 else None,
                "gradient_norm": 1.0,
                "tokens_per_second": 1e6 if step == 10 else 2000.0,
                "mfu": 0.25,
            }
            file.write(json.dumps(line) + "\n")
        for step, loss in ((500, 3.25), (750, 3.125), (1000, 3.1875)):
            line = {"step": step, "eval/loss": loss + offset, "eval/bits_per_byte": loss / 3}
            file.write(json.dumps(line) + "\n")
    return str(folder)


def _row(text, name):
    return next(line for line in text.splitlines() if line.startswith(name)).split()


def test_two_runs_side_by_side(tmp_path, capsys):
    a = _make_run(tmp_path / "a", attention__kind="standard")
    b = _make_run(tmp_path / "b", offset=-0.0625)
    assert main([a, b]) == 0
    text = capsys.readouterr().out
    assert "attention.kind: standard -> laser" in text
    assert "rows: the same" in text
    assert _row(text, "last step")[-3:] == ["1,000", "of", "160,000"]
    assert _row(text, "train loss, smoothed")[-2:] == ["3.0300", "2.9675"]
    assert _row(text, "eval loss, last")[-2:] == ["3.1875", "3.1250"]
    assert _row(text, "eval loss, best")[-2:] == ["3.1250", "3.0625"]
    assert _row(text, "eval bits per byte, last")[-2:] == ["1.0625", "1.0625"]
    assert _row(text, "tokens/s, median")[-2:] == ["2,000", "2,000"]
    assert _row(text, "MFU, median")[-2:] == ["25.0%", "25.0%"]
    differences = [line.split()[-1] for line in text.splitlines() if "  step " in line]
    assert len(differences) == 3 + 8
    assert set(differences) == {"-0.0625"}
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "g"}, "rows: differ by the data"),
        ({"data__shuffle_seed": 1}, "rows: differ by data.shuffle_seed"),
        ({"training__batch_size": 8}, "rows: differ by training.batch_size"),
        ({"data__seq_len": 8}, "rows: differ by data.seq_len"),
    ],
)
def test_other_rows_are_said(tmp_path, capsys, changes, words):
    a = _make_run(tmp_path / "a")
    b = _make_run(tmp_path / "b", **changes)
    assert main([a, b, f"--png={tmp_path / 'deeper' / 'x.png'}"]) == 0
    assert words in capsys.readouterr().out
    assert (tmp_path / "deeper" / "x.png").is_file()


def test_single_runs_are_said_to_be_single(tmp_path, capsys):
    words = "may be chance: train each config again with --config.training.seed=1"
    a = _make_run(tmp_path / "a")
    b = _make_run(tmp_path / "b", attention__kind="standard")
    again = _make_run(tmp_path / "again", training__seed=1)
    assert main([a, b]) == 0
    assert words in capsys.readouterr().out
    assert main([a, b, again]) == 0
    assert words not in capsys.readouterr().out
    assert main([a]) == 0
    assert words not in capsys.readouterr().out


def test_a_run_alone_and_one_that_never_evaluated(tmp_path, capsys):
    a = _make_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n')
    assert main([a]) == 0
    text = capsys.readouterr().out
    assert _row(text, "train loss, smoothed")[-1] == "2.5000"
    assert _row(text, "eval loss, last")[-1] == "-"


def test_what_is_no_run(tmp_path, capsys):
    a = _make_run(tmp_path / "a")
    assert main([a, str(tmp_path / "b")]) == 2
    assert "b: no such run" in capsys.readouterr().err

    (tmp_path / "a" / "metrics.jsonl").write_text("")
    assert main([a]) == 2
    assert "metrics.jsonl: has no metrics yet" in capsys.readouterr().err

    (tmp_path / "a" / "config.json").write_text("{}")
    assert main([a]) == 2
    assert "config.json: not written by train.py" in capsys.readouterr().err

    (tmp_path / "a" / "config.json").unlink()
    assert main([a]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_equal_runs_are_asserted(tmp_path, capsys):
    a, b = _make_run(tmp_path / "a"), _make_run(tmp_path / "b")
    assert main([a, b, "--assert_equal"]) == 0
    assert "102 losses are equal to the bit" in capsys.readouterr().out
    assert main([a, b, "--assert_equal=1e-5"]) == 0
    assert "102 losses are equal to 1e-05 of them" in capsys.readouterr().out


def _change(folder, step, name, value):
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["step"] == step and name in line:
            line[name] = value
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_the_first_step_that_differs_is_named(tmp_path, capsys):
    a, b, c = (_make_run(tmp_path / name) for name in "abc")
    _change(tmp_path / "b", 700, "loss", 3.3 + 1e-7)
    _change(tmp_path / "b", 500, "eval/loss", 3.25 + 1e-7)
    _change(tmp_path / "c", 30, "loss", None)
    assert main([a, b, "--assert_equal"]) == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"{b} is not equal to {a}: step 500: eval/loss 3.2500001, not 3.25"
    assert main([a, b, "--assert_equal=1e-6"]) == 0
    capsys.readouterr()
    assert main([a, b, c, "--assert_equal=1e-6"]) == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"{c} is not equal to {a}: step 30: only {a} has a finite loss"
    assert main([a, b]) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--assert_equal=-1", "a", "b"], "'-1' is no tolerance"),
        (["--assert_equal", "a", "b"], "'a' is no tolerance: write --assert_equal=1e-5, or"),
        (["a", "--assert_equal"], "--assert_equal: give two runs or more"),
    ],
)
def test_a_wrong_tolerance_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert words in capsys.readouterr().err
