"""Programs with flags and no config: how they explain themselves, and how they end."""

import pytest
from absl import flags

from laser.training.console import run_program
from scripts import prepare_data, prepare_speech, train_tokenizer


def _program(run, *arguments, advice=""):
    values = flags.FlagValues()
    flags.DEFINE_integer("size", None, "of it", flag_values=values, required=True)
    argv = ["scripts/program.py", *arguments]
    return run_program(values, "\nWhat it does.\n", argv, lambda: run(values.size), advice)


def test_a_program_runs_with_its_flags():
    seen = []
    assert _program(seen.append, "--size=3") == 0
    assert seen == [3]


def test_help_is_what_the_program_says_of_itself(capsys):
    for word in ("--help", "-help", "-h"):
        assert _program(None, word) == 0
        assert capsys.readouterr().out.startswith("What it does.\n\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size=3"], "no such size"),
        (["--size=3", "4"], "unexpected argument '4': write --flag=value"),
        (["--size=many"], "many"),
        (["--sizes=3"], "sizes"),
        ([], "--size"),
    ],
)
def test_a_mistake_ends_a_program_with_2_and_a_line(arguments, words, capsys):
    def run(size):
        raise ValueError("no such size")

    with pytest.raises(SystemExit) as left:
        _program(run, *arguments)
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("program.py: error: ")
    assert words in told


@pytest.mark.parametrize("error", [OSError("the disk is full"), RuntimeError("a worker died")])
def test_what_is_no_mistake_ends_it_with_1_and_advice(error, capsys):
    def run(size):
        raise error

    assert _program(run, "--size=3") == 1
    assert capsys.readouterr().err == f"program.py: {error}\n"
    assert _program(run, "--size=3", advice="start it again") == 1
    assert capsys.readouterr().err == f"program.py: {error}; start it again\n"


@pytest.mark.parametrize("script", [prepare_data, prepare_speech, train_tokenizer])
def test_programs_explain_themselves_and_refuse_arguments(script, capsys):
    assert script.main(["x.py", "--help"]) == 0
    assert "--output" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        script.main(["x.py", "--outputs=x"])
    assert left.value.code == 2
    assert "x.py: error: Unknown command line flag 'outputs'" in capsys.readouterr().err
