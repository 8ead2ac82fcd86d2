"""The launcher against a stand-in for gcloud whose workers are folders on this machine.

What the workers are sent is run for real there, by scripts/tpu_worker.sh; only make, git and the
train.py of the copy are played.
"""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.check_launch import chips_of, plan_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts" / "launch_tpu.sh")
OPTIONS = ["--name=laser", "--zone=us-west4-a", "--type=v5litepod-16"]
TRAIN = ["--", "--config=configs/c4.py:size=2p2b,attention=laser", "--workdir=bucket/runs/it's a"]

# $CLOUD/state holds the queued resource's state, $CLOUD/NODE-WORKER is a worker's home folder.
GCLOUD = r"""#!/usr/bin/env bash
set -eu
[ "$*" != "config get-value project" ] || { [ -f "$CLOUD/projectless" ] || echo mine; exit 0; }
echo "$*" >>"$CLOUD/calls"
shift 2
for argument; do
  case $argument in
    --worker=*) worker=${argument#*=} ;;
    --command=*) command=${argument#*=} ;;
    --node-count=*) count=${argument#*=} ;;
  esac
done
case "$1 $2" in
  "queued-resources describe")
    [ -f "$CLOUD/state" ] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    cat "$CLOUD/state" ;;
  "queued-resources create")
    [ ! -f "$CLOUD/full" ] || { echo "ERROR: quota exceeded" >&2; exit 1; }
    echo ACTIVE >"$CLOUD/state"
    [ ! -f "$CLOUD/never" ] || echo FAILED >"$CLOUD/state"
    for node in $([ ${count:-1} = 1 ] && echo laser || seq -f laser-%g 0 $((count - 1))); do
      mkdir -p "$CLOUD/$node-0" "$CLOUD/$node-1"
    done ;;
  "queued-resources delete") rm -r "$CLOUD/state" "$CLOUD"/laser*-[0-9] ;;
  "tpu-vm scp") for home in "$CLOUD/${4%%:*}"-[01]; do cp "$3" "$home/${4#*:}"; done ;;
  "tpu-vm ssh")
    [ "$worker" = all ] && worker="[01]"
    for home in "$CLOUD/$3"-$worker; do (cd "$home" && HOME=$home bash -c "$command"); done ;;
  *) exit 9 ;;
esac
"""

GIT = f"""#!/usr/bin/env bash
for argument; do case $argument in --output=*) output=${{argument#*=}} ;; esac; done
[ -z "${{output:-}}" ] || tar czf "$output" -C {ROOT} scripts/tpu_worker.sh
"""

# Stands for `make tpu`: train.py of this installation does what the next line of the play says.
MAKE = r"""#!/usr/bin/env bash
mkdir -p .venv/bin
cat >.venv/bin/python <<'END'
#!/bin/bash
case $PWD in *-0/laser) ;; *) exit 0 ;; esac  # the first worker speaks
case $PWD in */laser-1-0/*) exit 0 ;; esac
echo "$@" >>"$CLOUD/started"
printf '%s\0' "$@" >"$CLOUD/arguments"
number=$(wc -l <"$CLOUD/started")
echo "log of start $number"
eval "$(sed -n "${number}p" "$CLOUD/play")"
END
chmod +x .venv/bin/python
"""


class Cloud:
    """A folder in which the stand-ins live and leave what happened."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in {"gcloud": GCLOUD, "git": GIT, "make": MAKE}.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def launch(self, *arguments, play=()):
        (self.folder / "play").write_text("".join(line + "\n" for line in play))
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CLOUD": str(self.folder),
            "LAUNCH_TPU_WAIT": "0.2",
        }
        return subprocess.run(
            [SCRIPT, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=60,
            check=False,
        )

    def calls(self):
        """What gcloud was asked for: "create", "scp" and so on, without the looks at the state."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.split()[3] for line in lines if " describe " not in line]

    def started(self):
        return (self.folder / "started").read_text().splitlines()


@pytest.fixture(autouse=True)
def without_a_check(monkeypatch):
    """Takes a second of Python each time; one test has it."""
    monkeypatch.setenv("LAUNCH_TPU_PYTHON", "true")


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def dry_run(*arguments):
    result = subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_dry_run_prints_the_commands():
    where = "laser --zone=us-west4-a"
    connection = "-- -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
    ssh = f"gcloud compute tpus tpu-vm ssh {where}"
    worker = "laser/scripts/tpu_worker.sh"
    assert dry_run(
        "run", *OPTIONS, "--spot", "--bucket=gs://mine", "--delete", "--dry-run", *TRAIN
    ) == [
        f"gcloud compute tpus queued-resources create {where} --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --node-id=laser --spot",
        f"git -C {ROOT} archive --format=tar.gz --output=laser.tar.gz HEAD",
        "gcloud compute tpus tpu-vm scp laser.tar.gz laser:laser.tar.gz --zone=us-west4-a "
        "--worker=all",
        f"{ssh} --worker=all '--command=mkdir -p laser && tar xzf laser.tar.gz -C laser && "
        f"{worker} install mine' {connection}",
        f"{ssh} --worker=all '--command={worker} start "
        "--config=configs/c4.py:size=2p2b,attention=laser "
        r"'\''--workdir=bucket/runs/it'\''\'\'''\''s a'\''' " + connection,
        f"{ssh} --worker=0 '--command={worker} follow' {connection}",
        f"gcloud compute tpus queued-resources delete {where} --force --quiet",
    ]


@pytest.mark.parametrize(
    ("field", "slice_type", "code", "said"),
    [
        ("--config.training.steps=9", "v5e-256", 0, "by docs/plans.md the recipe fits"),
        ("--config.training.steps=9", "v5litepod-256", 0, "by docs/plans.md the recipe fits"),
        ("--config.training.steps=9", "v5e-64", 0, "slice=v5e-256 is the layout of other slices"),
        ("--config.training.stepps=9", "v5e-256", 2, "did you mean 'training.steps'?"),
        ("--config.training.steps=x", "v5e-256", 2, "error: training.steps='x': expected int"),
        ("--config.mesh.fsdp=64", "v5p-256", 2, "mesh of 64 devices, but there are 128"),
        ("--config.init_from=bucket/runs/a", "v5e-256", 0, "not checked: bucket/runs/a is not"),
        ("--config.init_from=nofs://runs/a", "v5e-256", 0, "not checked: nofs://runs/a is not"),
    ],
)  # fmt: skip
def test_the_config_is_checked_before_a_slice_is_asked_for(
    monkeypatch, field, slice_type, code, said
):
    monkeypatch.setenv("LAUNCH_TPU_PYTHON", sys.executable)
    config = "--config=configs/c4.py:size=2p2b,attention=laser,slice=v5e-256"
    done = subprocess.run(
        [SCRIPT, "run", *OPTIONS[:2], f"--type={slice_type}", "--dry-run", "--", config,
         "--config.optimizer.warmup_steps=1", field, "--workdir=bucket/a"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert ("queued-resources create" in done.stdout) == (code == 0)


@pytest.mark.parametrize(
    ("recipe", "known"),
    [
        ("configs/c4.py:attention=laser,slice=v5e-256,size=2p2b", True),
        ("configs/llama.py:slice=v5e-64,attention=laser", True),
        ("configs/mine.py:attention=laser,slice=v5e-256,size=2p2b", False),
    ],
)
def test_a_plan_is_of_one_config_file(recipe, known):
    plans = json.loads((ROOT / "docs/plans.json").read_text())
    slice_type = "v5e-64" if "v5e-64" in recipe else "v5e-256"
    said = plan_of(plans, ["--workdir=a", f"--config={recipe}"], slice_type)
    assert said.startswith("by docs/plans.md the recipe fits" if known else "no plan of it")


def test_a_plan_is_of_one_kind_and_number_of_chips():
    """Recipes without an argument for the slice have a plan for each of several."""
    plans = json.loads((ROOT / "docs/plans.json").read_text())
    for key, plan in plans.items():
        if not key.startswith("model=bert"):
            continue
        recipe = "configs/bert.py:" + key.removeprefix("model=bert,").rpartition(",slice=")[0]
        of_slice = key.rpartition("slice=")[2]
        arguments = [f"--config={recipe}"]
        said = plan_of(plans, arguments, of_slice.replace("v5e", "v5litepod"))
        assert f"fits: {plan['peak_gib']:.1f} of {plan['capacity_gib']:.1f} GiB" in said
        assert plan_of(plans, arguments, of_slice, slices=2).startswith("no plan of it")
        for other in ("v5litepod-16", "v5litepod-1", "v6e-256"):
            assert plan_of(plans, arguments, other).startswith("no plan of it")


def test_chips_are_counted_as_jax_counts_its_devices():
    types = {"v5litepod-16": 16, "v5e-16": 16, "v6e-16": 16, "v5p-16": 8, "v4-8": 4, "v3-8": 8}
    assert {name: chips_of(name) for name in types} == types


def test_the_short_name_of_a_type_is_taken_for_the_long_one():
    short = [*OPTIONS[:2], "--type=v5e-16"]
    assert dry_run("create", *short, "--dry-run") == dry_run("create", *OPTIONS, "--dry-run")


def test_dry_run_of_several_slices_reaches_each():
    lines = dry_run("run", *OPTIONS, "--slices=2", "--project=p", "--dry-run", *TRAIN)
    assert "--project=p" in lines[0]
    assert lines[0].endswith("--node-count=2 --node-prefix=laser")
    for what in (" scp ", " install", " start "):
        assert [f"laser-{i}" in line for line in lines for i in (0, 1) if what in line] == [
            True, False, False, True,
        ]  # fmt: skip
    assert "laser-0 " in lines[-1]
    assert lines[-1].count("follow") == 1


@pytest.mark.parametrize("mounted", ["", "mine", "another"])
def test_a_worker_trains_in_the_bucket_that_was_named(tmp_path, mounted):
    repository, commands = tmp_path / "laser", tmp_path / "bin"
    (repository / "scripts").mkdir(parents=True)
    commands.mkdir()
    shutil.copy(ROOT / "scripts" / "tpu_worker.sh", repository / "scripts")
    stand_ins = {
        "mountpoint": "[[ $MOUNTED ]]", "findmnt": "echo $MOUNTED", "make": "true",
        "python3.11": "true", "gcsfuse": "echo mounts $2",
    }  # fmt: skip
    for name, words in stand_ins.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{words}\n")
        (commands / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(repository / "scripts" / "tpu_worker.sh"), "install", "mine"],
        env={"PATH": f"{commands}:{os.environ['PATH']}", "MOUNTED": mounted},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == (mounted == "another"), done.stderr
    assert done.stdout == ("" if mounted else "mounts mine\n")
    assert ("bucket is another here, not mine" in done.stderr) == (mounted == "another")


def test_every_shell_word_of_train_arrives_whole(cloud):
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert cloud.started() == [f"train.py {TRAIN[1]} {TRAIN[2]}"]
    assert "log of start 1" in done.stdout
    assert cloud.calls() == ["create", "scp", "ssh", "ssh", "ssh"]
    assert cloud.launch("status", *OPTIONS).stdout == "READY\n"


HOSTILE = [
    "a;touch X", "$(touch X)", "`touch X`", "a b", "a'b", "a'$(touch X)'", 'a"b', "-rf",
    "a\ntouch X", "*", "~", "a&touch X", "a|touch X", ">X", "a\\", "a\tb", "{a,b}", "a#b", "!x",
]  # fmt: skip


def test_hostile_arguments_of_train_arrive_as_they_are(cloud):
    hostile = [
        *TRAIN,
        *HOSTILE,
        "",
        "--config.init_from=$HOME",
        "--x='",
        *(f"--x={h}" for h in HOSTILE),
    ]
    done = cloud.launch("run", *OPTIONS, *hostile, play=["exit 0"])
    assert done.returncode == 0, done.stderr
    arguments = (cloud.folder / "arguments").read_text().split("\0")[:-1]
    assert arguments == ["train.py", *hostile[1:]]
    assert not list(cloud.folder.rglob("X"))
    # What a dry run prints is the same when it is typed.
    line = "\n".join(dry_run("start", *OPTIONS, "--dry-run", *hostile))
    (command,) = [w for w in shlex.split(line) if w.startswith("--command=")]
    assert shlex.split(command.removeprefix("--command="))[2:] == hostile[1:]


@pytest.mark.parametrize(
    "flag", ["name", "zone", "type", "version", "project", "bucket", "slices", "slice", "worker",
             "restarts"]
)  # fmt: skip
def test_hostile_values_of_options_are_refused(cloud, flag):
    for value in (*HOSTILE, "a[$(touch X)]", "1+1", "08", "9" * 30):
        if flag in ("zone", "project", "bucket", "version") and value in ("08", "9" * 30):
            continue
        refused = cloud.launch("run", *OPTIONS, f"--{flag}={value}", *TRAIN)
        assert refused.returncode == 2
        assert f"error: --{flag}=" in refused.stderr
        assert refused.stderr.count("\n") == 1 + value.count("\n")
    assert not (cloud.folder / "calls").exists()
    assert not list(cloud.folder.rglob("X"))


def test_a_line_of_the_log_is_no_exit_code(cloud):
    play = ["echo 'train.py: exit code a[$(touch X)]'; echo 'train.py: exit code 7 or so'; exit 0"]
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=play)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exit code") == 2
    assert not list(cloud.folder.rglob("X"))


def test_preempted_run_goes_on_on_a_new_slice(cloud):
    play = ["echo SUSPENDED >$CLOUD/state; exit 75", "exit 0"]
    done = cloud.launch("run", *OPTIONS, "--spot", "--delete", *TRAIN, play=play)
    assert done.returncode == 0, done.stderr
    assert "saved on preemption" in done.stderr
    assert done.stdout.splitlines() == ["log of start 1", "log of start 2"]
    one_slice = ["create", "scp", "ssh", "ssh", "ssh"]
    assert cloud.calls() == [*one_slice, "delete", *one_slice, "delete"]


def test_a_run_that_cannot_go_on_is_not_started_again_and_gives_its_slice_back(cloud):
    done = cloud.launch("run", *OPTIONS, "--delete", *TRAIN, play=["exit 3", "exit 0"])
    assert done.returncode == 3
    assert "the run has diverged" in done.stderr
    assert len(cloud.started()) == 1
    assert cloud.calls()[-1] == "delete"


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_failed_gives_its_slice_back(cloud, code):
    options = ["--restarts=1", "--delete"]
    done = cloud.launch("run", *OPTIONS, *options, *TRAIN, play=[f"exit {code}"] * 2)
    assert done.returncode == code
    assert cloud.calls().count("delete") == 1
    assert not (cloud.folder / "state").exists()


def test_a_slice_that_never_comes_is_not_asked_for_without_end(cloud):
    (cloud.folder / "never").touch()
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=["exit 0"])
    assert done.returncode == 1
    assert "asked for 5 times, and it never came" in done.stderr
    assert cloud.calls().count("create") == 5


def test_slice_that_vanishes_without_a_word_is_made_again(cloud):
    """train.py and its shell are killed with the machine: no exit code is left."""
    play = ["echo FAILED >$CLOUD/state; kill -KILL $PPID $$", "exit 0"]
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=play)
    assert done.returncode == 0, done.stderr
    assert "the connection or the slice is lost" in done.stderr
    assert cloud.calls().count("create") == 2


def test_saved_run_goes_on_where_the_slice_is_still_there(cloud):
    done = cloud.launch("run", *OPTIONS, "--slices=2", *TRAIN, play=["exit 75", "exit 0"])
    assert done.returncode == 0, done.stderr
    assert cloud.calls().count("create") == 1
    assert len(cloud.started()) == 2


def test_called_again_it_follows_the_run_that_is_there(cloud):
    assert cloud.launch("create", *OPTIONS).returncode == 0
    assert cloud.launch("install", *OPTIONS[:2]).returncode == 0
    play = ["sleep 6; exit 0"]
    assert cloud.launch("start", *OPTIONS[:2], *TRAIN, play=play).returncode == 0
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=play)
    assert done.returncode == 0, done.stderr
    assert "is running: following it" in done.stderr
    assert len(cloud.started()) == 1


def test_mistake_in_the_config_ends_at_once(cloud):
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=["echo 'unknown field'; exit 2"])
    assert done.returncode == 2
    assert "unknown field" in done.stdout
    assert len(cloud.started()) == 1


def test_failures_are_tried_again_so_often_and_no_more(cloud):
    done = cloud.launch("run", *OPTIONS, "--restarts=2", *TRAIN, play=["exit 1"] * 9)
    assert done.returncode == 1
    assert "failed 3 times, last with exit code 1" in done.stderr
    assert len(cloud.started()) == 3


def test_log_of_any_worker_can_be_followed(cloud):
    done = cloud.launch("run", *OPTIONS, "--slices=2", *TRAIN, play=["exit 0"])
    assert done.returncode == 0, done.stderr
    log = cloud.folder / "laser-1-1" / "laser" / "train.log"
    log.write_text("what worker 1 of slice 1 had to say\n")
    shown = cloud.launch("follow", *OPTIONS, "--slices=2", "--slice=1", "--worker=1")
    assert (shown.returncode, shown.stdout) == (0, log.read_text())


def test_stop_reaches_train_alone(cloud):
    """SIGTERM to the program and not to the shell that writes down its exit code."""
    for command in (["create", *OPTIONS], ["install", *OPTIONS[:2]]):
        assert cloud.launch(*command).returncode == 0
    play = ["trap 'exit 75' TERM; while true; do sleep 0.1; done"]
    cloud.launch("start", *OPTIONS[:2], *TRAIN, play=play)
    deadline = time.monotonic() + 30
    while not (cloud.folder / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopped = cloud.launch("stop", *OPTIONS[:2], play=play)
    assert stopped.returncode == 0, stopped.stderr
    assert cloud.launch("follow", *OPTIONS[:2], play=play).returncode == 75


def test_creation_that_is_refused_ends_with_the_reason(cloud):
    (cloud.folder / "full").touch()
    done = cloud.launch("run", *OPTIONS, *TRAIN)
    assert done.returncode == 1
    assert "quota exceeded" in done.stderr


def test_without_a_project_nothing_is_asked_for(cloud):
    (cloud.folder / "projectless").touch()
    done = cloud.launch("run", *OPTIONS, *TRAIN)
    assert done.returncode == 2
    assert "gcloud has no project: give --project=ID" in done.stderr
    assert not (cloud.folder / "calls").exists()
    assert cloud.launch("create", *OPTIONS, "--project=p").returncode == 0


def test_states_that_nobody_knows_are_not_waited_for(cloud):
    (cloud.folder / "state").write_text("NEVER_HEARD_OF\n")
    done = cloud.launch("run", *OPTIONS, *TRAIN)
    assert done.returncode == 1
    assert done.stderr.count("state: NEVER_HEARD_OF") == 5
    assert "5 times in a row no known state" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["launch"], "unknown command 'launch'"),
        (["run", *OPTIONS[1:], *TRAIN], "--name='': needed"),
        (["run", OPTIONS[0], OPTIONS[2], *TRAIN], "--zone is missing"),
        (["run", *OPTIONS[:2], *TRAIN], "--type is missing"),
        (["run", *OPTIONS[:2], "--type=v9-8", *TRAIN], "--type=v9-8: not known here"),
        (["run", *OPTIONS], "--config is missing among the arguments of train.py"),
        (["start", *OPTIONS, *TRAIN[:2]], "--workdir is missing"),
        (["follow", *OPTIONS, "--slice=1"], "--slice=1: must be below --slices=1"),
        (["run", *OPTIONS, "--slices=two", *TRAIN], "--slices=two: must be a number"),
        (["run", *OPTIONS, "--bucket=gs://a/b", *TRAIN], "--bucket=a/b: the name"),
        (["run", *OPTIONS, "--bucket", "a", *TRAIN], "--bucket: write --bucket=VALUE"),
        (["run", *OPTIONS, "--workdir=x"], "unknown option '--workdir=x'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(cloud, arguments, message):
    refused = cloud.launch(*arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not (cloud.folder / "calls").exists()


def test_help_names_every_option():
    text = "\n".join(dry_run("--help"))
    for option in ("--slices", "--spot", "--bucket", "--dry-run", "--restarts", "--delete"):
        assert option in text
