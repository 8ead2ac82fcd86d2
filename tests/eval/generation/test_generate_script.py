"""scripts/generate.py on a small run: text as it comes, files of prompts, mistakes."""

import errno
import json
import os

import pytest

from eval.run import open_model
from scripts import generate

PROMPTS = ["And God said", "", "“Let there be”"]
SETTINGS = {"max_new_tokens": 9, "temperature": 1.0, "top_k": 50, "seed": 3}


@pytest.fixture(scope="module")
def expected(trained_run):
    model = open_model(trained_run)
    return model.generator.generate(model.params, PROMPTS, stop=["zzz"], **SETTINGS)


def run(workdir, *arguments):
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    return generate.main([f"--workdir={workdir}", "--stop=zzz", *settings, *arguments])


def test_a_prompt_is_printed_with_its_continuation(trained_run, expected, capsys):
    assert run(trained_run, f"--prompt={PROMPTS[0]}") == 0
    assert capsys.readouterr().out == f"{PROMPTS[0]}{expected[0]}\n"


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_file_of_prompts_becomes_a_file_of_continuations(trained_run, expected, suffix, tmp_path):
    prompts, output = tmp_path / f"prompts.{suffix}", tmp_path / "out.jsonl"
    lines = PROMPTS if suffix == "txt" else [json.dumps({"prompt": p}) for p in PROMPTS]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert run(trained_run, f"--prompts={prompts}", f"--output={output}") == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["continuation"] for row in rows] == expected


def test_where_nothing_can_be_written_is_said_before_the_model_is_read(
    trained_run, tmp_path, capsys, monkeypatch
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    monkeypatch.setattr(generate, "open_model", lambda *_: pytest.fail("the model was read"))
    for output, message in [
        (tmp_path, "a folder; name a file"),
        (tmp_path / "x" / "out.jsonl", "no folder"),
        (tmp_path / f"{'x' * 300}.jsonl", "File name too long"),
    ]:
        assert run(trained_run, f"--prompts={prompts}", f"--output={output}") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"generate.py: error: output={output}: {message}")
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [prompts]


def test_a_disk_that_is_full_ends_in_one_line(trained_run, tmp_path, capsys, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("a\n")
    monkeypatch.setattr(generate, "write_atomically", full)
    assert run(trained_run, f"--prompts={prompts}", f"--output={output}") == 2
    error = capsys.readouterr().err
    assert error == f"generate.py: error: output={output}: No space left on device\n"


def test_mistakes_end_in_one_line(trained_run, tmp_path, capsys):
    good, bad, none = (tmp_path / name for name in ("good.txt", "bad.jsonl", "none.txt"))
    good.write_text("a\n")
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    none.write_text("")
    out = f"--output={tmp_path / 'out.jsonl'}"
    for arguments, message in [
        ([f"--prompts={good}"], "--prompts and --output go together"),
        ([f"--prompts={tmp_path / 'x.txt'}", out], "no such file"),
        ([f"--prompts={bad}", out], 'line 2: expected {"prompt": text}'),
        ([f"--prompts={none}", out], "the file has no prompts"),
        ([f"--prompts={good}", f"--output={tmp_path}/x/out.jsonl"], "no folder"),
        (["--prompt=a", "--step=3"], "no checkpoint 3"),
        (["--prompt=a", "--max_new_tokens=1000"], "the model's length is 128"),
        (["--prompt=a", "--top_p=2"], "top_p=2.0"),
        (["--prompt=", "--max_new_tokens=129"], "prompt 0 has 1 tokens with its EOS"),
        (["--prompt=", "--max_new_tokens=129"], "so at most 128 fit"),
    ]:
        assert run(trained_run, *arguments) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert error.startswith("generate.py: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert run(tmp_path, "--prompt=a") == 2
    assert "no run here" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
