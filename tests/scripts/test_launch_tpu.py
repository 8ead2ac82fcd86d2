"""The launcher against a stand-in for gcloud whose workers are folders on this machine.

What the workers are sent is run for real there, by scripts/tpu_worker.sh; only make, git and the
train.py of the copy are played.
"""

import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts" / "launch_tpu.sh")
OPTIONS = ["--name=laser", "--zone=us-west4-a", "--type=v5litepod-16"]
ONE_SLICE = ["create", "ssh", "scp", "ssh", "ssh", "ssh"]  # calls until train.py has ended
TRAIN = ["--", "--config=configs/c4.py:size=2p2b,attention=laser", "--workdir=bucket/runs/it's a"]

# $CLOUD/state holds the queued resource's state, $CLOUD/NODE-WORKER is a worker's home folder. The
# next $CLOUD/failing connections whose command has the words of $CLOUD/failing-words fail, and with
# the last of them happens what $CLOUD/failed says. With $CLOUD/together two slices are started
# together or not at all.
GCLOUD = r"""#!/usr/bin/env bash
set -eu
[ "$*" != "config get-value project" ] || { [ -f "$CLOUD/projectless" ] || echo mine; exit 0; }
echo "$*" >>"$CLOUD/calls"
[ "$1" != alpha ] || shift
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
  "tpu-vm scp")
    [ "$worker" = all ] && worker="[01]"
    for home in "$CLOUD/${4%%:*}"-$worker; do cp "$3" "$home/${4#*:}"; done ;;
  "tpu-vm ssh")
    left=$(cat "$CLOUD/failing" 2>/dev/null || echo 0)
    case $command in *"$(cat "$CLOUD/failing-words" 2>/dev/null)"*)
      if [ "$left" -gt 0 ]; then
        echo $((left - 1)) >"$CLOUD/failing"
        [ "$left" -gt 1 ] || [ ! -f "$CLOUD/failed" ] || . "$CLOUD/failed"
        echo "no route to host" >&2
        exit 255
      fi ;;
    esac
    case $command in *tpu_worker.sh\ *start\ *)
      touch "$CLOUD/at-$3"
      [ ! -f "$CLOUD/together" ] ||
        timeout 30 bash -c \
          'until [ -f $CLOUD/at-laser-0 -a -f $CLOUD/at-laser-1 ]; do sleep 0.1; done' ;;
    esac
    [ "$worker" = all ] && worker="[01]"
    for home in "$CLOUD/$3"-$worker; do (cd "$home" && HOME=$home bash -c "$command"); done ;;
  *) exit 9 ;;
esac
"""

GIT = f"""#!/usr/bin/env bash
for argument; do case $argument in --output=*) output=${{argument#*=}} ;; esac; done
[ -z "${{output:-}}" ] || tar czf "$output" -C {ROOT} scripts/tpu_worker.sh
"""

# Stands for `make tpu`: train.py of this installation does what the next line of the play says, and
# that of all workers but the first what $CLOUD/others says.
MAKE = r"""#!/usr/bin/env bash
echo "$@" >>"$CLOUD/made"
mkdir -p .venv/bin
cat >.venv/bin/python <<'END'
#!/bin/bash
case $PWD in
  */laser-1-0/* | *-1/laser) [[ ! -f $CLOUD/others ]] || . "$CLOUD/others"; exit 0 ;;
esac
echo "$@" >>"$CLOUD/started"
printf '%s\0' "$@" >"$CLOUD/arguments"
number=$(wc -l <"$CLOUD/started")
echo "log of start $number"
eval "$(sed -n "${number}p" "$CLOUD/play")"
END
chmod +x .venv/bin/python
"""


# The metadata server: what it knows of the hosts of a slice.
CURL = """#!/usr/bin/env bash
[[ "$*" == *" http://metadata.google.internal/"*/worker-network-endpoints ]] &&
  cat "$CLOUD/endpoints"
"""


class Cloud:
    """A folder in which the stand-ins live and leave what happened."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in {"gcloud": GCLOUD, "git": GIT, "make": MAKE, "curl": CURL}.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def launch(self, *arguments, play=(), **variables):
        process = self.begin(*arguments, play=play, **variables)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def begin(self, *arguments, play=(), **variables):
        (self.folder / "play").write_text("".join(line + "\n" for line in play))
        environment = {
            **os.environ,
            "HOME": str(self.folder),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CLOUD": str(self.folder),
            "LAUNCH_TPU_WAIT": "0.05",
            **variables,
        }
        return subprocess.Popen(
            [SCRIPT, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def fail(self, times, words="", then=""):
        """The next connections whose command has the words."""
        (self.folder / "failing").write_text(str(times))
        (self.folder / "failing-words").write_text(words)
        (self.folder / "failed").write_text(then)

    def wait_for(self, name):
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, name
            time.sleep(0.05)

    def logs(self):
        """Text of the files in which `run` left the logs of workers, by name."""
        return {path.name: path.read_text() for path in sorted(self.folder.glob("laser*.log"))}

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
    connection = "-- -o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
    ssh = f"gcloud compute tpus tpu-vm ssh {where}"
    worker = "laser/scripts/tpu_worker.sh"
    assert dry_run(
        "run", *OPTIONS, "--spot", "--bucket=gs://mine", "--delete", "--dry-run", *TRAIN
    ) == [
        f"gcloud compute tpus queued-resources create {where} --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --node-id=laser --spot",
        f"git -C {ROOT} archive --format=tar.gz --output=laser.tar.gz HEAD",
        f"{ssh} --worker=all --command=true {connection}",
        "gcloud compute tpus tpu-vm scp laser.tar.gz laser:laser.tar.gz --zone=us-west4-a "
        "--worker=all",
        f"{ssh} --worker=all '--command=mkdir -p laser && tar xzf laser.tar.gz -C laser && "
        f"{worker} install mine' {connection}",
        f"{ssh} --worker=all '--command={worker} restart "
        "--config=configs/c4.py:size=2p2b,attention=laser "
        r"'\''--workdir=bucket/runs/it'\''\'\'''\''s a'\''' " + connection,
        f"{ssh} --worker=0 '--command={worker} follow' {connection}",
        f"gcloud compute tpus queued-resources delete {where} --force --quiet",
    ]


def test_flags_for_gcloud_are_passed_on():
    flags = ["--create-flag=--reserved", "--create-flag=--labels=a=b c", "--ssh-flag=--internal-ip"]
    lines = dry_run("run", *OPTIONS, *flags, "--dry-run", *TRAIN)
    assert lines[0].endswith("--node-id=laser --reserved '--labels=a=b c'")
    connections = [line for line in lines if " tpu-vm " in line]
    assert len(connections) == 5
    assert all(" --zone=us-west4-a --internal-ip --worker=" in line for line in connections)
    assert not any("--internal-ip" in line for line in lines if line not in connections)
    # gcloud's own ssh to TPUs does not know this one.
    tunnelled = dry_run("stop", *OPTIONS, "--ssh-flag=--tunnel-through-iap", "--dry-run")
    assert tunnelled[0].startswith("gcloud alpha compute tpus tpu-vm ssh laser ")


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
        ("--config.data.store=stores/c4", "v5e-256", 2, "workers do not see this folder"),
    ],
)  # fmt: skip
def test_the_config_is_checked_before_a_slice_is_asked_for(
    monkeypatch, field, slice_type, code, said
):
    monkeypatch.setenv("LAUNCH_TPU_PYTHON", sys.executable)
    config = "--config=configs/c4.py:size=2p2b,attention=laser,slice=v5e-256"
    done = subprocess.run(
        [SCRIPT, "run", *OPTIONS[:2], f"--type={slice_type}", "--bucket=mine", "--dry-run", "--",
         config, "--config.data.store=bucket/c4", "--config.optimizer.warmup_steps=1", field,
         "--workdir=bucket/a"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert ("queued-resources create" in done.stdout) == (code == 0)


def test_the_short_name_of_a_type_is_taken_for_the_long_one():
    short = [*OPTIONS[:2], "--type=v5e-16"]
    assert dry_run("create", *short, "--dry-run") == dry_run("create", *OPTIONS, "--dry-run")


def test_dry_run_of_several_slices_reaches_each():
    lines = dry_run("run", *OPTIONS, "--slices=2", "--project=p", "--dry-run", *TRAIN)
    assert "--project=p" in lines[0]
    assert lines[0].endswith("--node-count=2 --node-prefix=laser")
    for what in ("=true", " scp ", " install", " restart "):
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
        ["bash", str(repository / "scripts" / "tpu_worker.sh"), "install", "mine", "wandb"],
        env={"PATH": f"{commands}:{os.environ['PATH']}", "MOUNTED": mounted},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == (mounted == "another"), done.stderr
    assert done.stdout == ("" if mounted else "mounts mine\n")
    assert ("bucket is another here, not mine" in done.stderr) == (mounted == "another")


def test_a_worker_waits_for_the_locks_of_apt(tmp_path):
    """A new machine updates itself, and `apt-get update` fails meanwhile."""
    repository, commands = tmp_path / "laser", tmp_path / "bin"
    (repository / "scripts").mkdir(parents=True)
    commands.mkdir()
    shutil.copy(ROOT / "scripts" / "tpu_worker.sh", repository / "scripts")
    stand_ins = {
        "sudo": 'echo "$*" >>../calls; [[ $1 != tee ]] || cat >/dev/null; [[ $* != *install* ]] || '
        "touch ../bin/gcsfuse; [[ $* != *update || $(grep -c update ../calls) == 3 ]]",
        "sleep": "true", "make": "true", "python3.11": "true", "curl": "true",
        "lsb_release": "echo jammy", "mountpoint": "false", "gcsfuse": "true",
    }  # fmt: skip
    for name, words in stand_ins.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{words}\n")
        (commands / name).chmod(0o755)
    (commands / "gcsfuse").rename(commands / "not-there-yet")
    script = (commands / "sudo").read_text().replace("touch", "cp ../bin/not-there-yet")
    (commands / "sudo").write_text(script)
    done = subprocess.run(
        ["bash", str(repository / "scripts" / "tpu_worker.sh"), "install", "mine"],
        env={"PATH": f"{commands}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-1] == "apt-get -qy -o DPkg::Lock::Timeout=600 install gcsfuse"
    assert calls.count("apt-get -q update") == 3


def test_every_shell_word_of_train_arrives_whole(cloud):
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert cloud.started() == [f"train.py {TRAIN[1]} {TRAIN[2]}"]
    assert "log of start 1" in done.stdout
    assert cloud.calls() == ONE_SLICE
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
             "restarts", "extras"]
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
    assert "saved on SIGTERM" in done.stderr
    assert done.stdout.splitlines() == ["log of start 1", "log of start 2"]
    assert cloud.calls() == [*ONE_SLICE, "delete", *ONE_SLICE, "delete"]
    assert cloud.logs() == {}  # the slice was gone


@pytest.mark.parametrize(
    ("code", "said"), [(3, "the run has diverged"), (4, "the run needs more memory than there is")]
)
def test_a_run_that_cannot_go_on_is_not_started_again_and_gives_its_slice_back(cloud, code, said):
    done = cloud.launch("run", *OPTIONS, "--delete", *TRAIN, play=[f"exit {code}", "exit 0"])
    assert done.returncode == code
    assert said in done.stderr
    assert len(cloud.started()) == 1
    assert cloud.calls()[-2:] == ["ssh", "delete"]
    (log,) = cloud.logs().values()
    assert "log of start 1" in log


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
    assert "train.py left with exit code 1" in done.stderr
    assert cloud.calls().count("create") == 2


def test_a_run_whose_connection_is_lost_is_followed_to_its_end(cloud):
    """Also where it ended meanwhile: its exit code is there."""
    cloud.fail(1, "follow", then="sleep 1")
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert "the connection or the slice is lost" in done.stderr
    assert done.stdout == "log of start 1\n"
    assert len(cloud.started()) == 1


def test_saved_run_goes_on_where_the_slice_is_still_there(cloud):
    done = cloud.launch("run", *OPTIONS, "--slices=2", *TRAIN, play=["exit 75", "exit 0"])
    assert done.returncode == 0, done.stderr
    assert cloud.calls().count("create") == 1
    assert len(cloud.started()) == 2


def started(cloud, play, **variables):
    """Starts a run that goes on."""
    for command in (["create", *OPTIONS], ["install", *OPTIONS[:2]]):
        assert cloud.launch(*command).returncode == 0
    done = cloud.launch("start", *OPTIONS[:2], *TRAIN, play=play, **variables)
    assert done.returncode == 0, done.stderr
    cloud.wait_for("started")


UNTIL_END = "until [ -f $CLOUD/end ]; do sleep 0.1; done; exit 0"


@pytest.mark.parametrize("silent", [0, 3])
def test_called_again_it_follows_the_run_that_is_there(cloud, silent):
    """Also where worker 0 does not answer at first: that says nothing of the run."""
    started(cloud, [UNTIL_END])
    cloud.fail(silent, "state")
    follower = cloud.begin("run", *OPTIONS, *TRAIN, play=[UNTIL_END])
    said = ""
    while "is running: following it" not in said:
        line = follower.stderr.readline()
        assert line, said
        said += line
    (cloud.folder / "end").touch()
    follower.communicate(timeout=120)
    assert follower.returncode == 0
    assert ("waiting until workers can be reached: no route to host" in said) == (silent > 0)
    assert len(cloud.started()) == 1


def test_a_run_that_never_answers_is_left_alone(cloud):
    started(cloud, [UNTIL_END])
    cloud.fail(99, "state")
    done = cloud.launch(
        "run", *OPTIONS, "--delete", *TRAIN, play=[UNTIL_END], LAUNCH_TPU_PATIENCE="0"
    )
    (cloud.folder / "end").touch()
    assert done.returncode == 1
    assert "it may be training: nothing was changed" in done.stderr
    assert len(cloud.started()) == 1
    assert "delete" not in cloud.calls()


def test_start_ends_nothing_that_runs(cloud):
    play = [UNTIL_END, "exit 0"]
    started(cloud, play)
    refused = cloud.launch("start", *OPTIONS[:2], *TRAIN, play=play)
    assert refused.returncode == 1
    assert "follow it, or stop it first" in refused.stderr
    (cloud.folder / "end").touch()
    assert cloud.launch("follow", *OPTIONS[:2], play=play).returncode == 0
    assert len(cloud.started()) == 1
    assert cloud.launch("start", *OPTIONS[:2], *TRAIN, play=play).returncode == 0
    assert "log of start 2" in cloud.launch("follow", *OPTIONS[:2], play=play).stdout


def test_workers_that_hang_after_a_failure_are_ended_before_the_next_start(cloud):
    (cloud.folder / "others").write_text(
        "[ -f $CLOUD/hanging ] || "
        "{ echo $$ >$CLOUD/number; mv $CLOUD/number $CLOUD/hanging; exec sleep 300; }\n"
    )
    fails = "until [ -f $CLOUD/hanging ]; do sleep 0.1; done; exit 1"
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=[fails, "exit 0"])
    assert done.returncode == 0, done.stderr
    words = Path("/proc") / (cloud.folder / "hanging").read_text().strip() / "cmdline"
    deadline = time.monotonic() + 30
    while words.exists() and b"sleep" in words.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_workers_that_cannot_be_reached_yet_cost_no_restart(cloud):
    cloud.fail(3)
    done = cloud.launch("run", *OPTIONS, "--restarts=0", *TRAIN, play=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("waiting until workers can be reached: no route to host") == 1
    assert cloud.calls() == ["create", *["ssh"] * 3, *ONE_SLICE[1:]]


def test_a_slice_that_goes_before_its_workers_were_reached_is_made_again(cloud):
    cloud.fail(2, then="echo FAILED >$CLOUD/state")
    done = cloud.launch("run", *OPTIONS, "--restarts=0", *TRAIN, play=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == ["create", "ssh", "ssh", "delete", *ONE_SLICE]


def test_workers_that_are_never_reached_end_the_run(cloud):
    cloud.fail(99)
    done = cloud.launch(
        "run", *OPTIONS, "--restarts=0", *TRAIN, play=["exit 0"], LAUNCH_TPU_PATIENCE="0"
    )
    assert done.returncode == 1
    assert "they could not be reached for 0 seconds: no route to host" in done.stderr
    assert "could not install or start" in done.stderr


def test_slices_are_started_at_once(cloud):
    """Their hosts wait for each other."""
    (cloud.folder / "together").touch()
    done = cloud.launch("run", *OPTIONS, "--slices=2", "--restarts=0", *TRAIN, play=["exit 0"])
    assert done.returncode == 0, done.stderr


def test_logs_of_all_workers_are_kept_before_the_next_start(cloud):
    (cloud.folder / "others").write_text("echo words of ${PWD%/laser}\n")
    play = ["seq 100; sleep 1; exit 1", "exit 0"]
    done = cloud.launch("run", *OPTIONS, "--slices=2", *TRAIN, play=play)
    assert done.returncode == 0, done.stderr
    (first, of_first), (second, of_second) = cloud.logs().items()
    assert (first[:8], second[:8]) == ("laser-0-", "laser-1-")
    host = platform.node()
    numbers = [f"{host}: {i}" for i in range(41, 101)]
    assert of_first.splitlines() == [*numbers, f"{host}: words of {cloud.folder}/laser-0-1"]
    workers = [f"{host}: words of {cloud.folder}/laser-1-{i}" for i in (0, 1)]
    assert of_second.splitlines() == workers
    assert f"the last lines of all logs of laser-0: {cloud.folder}/{first}\n" in done.stderr


def test_logs_that_cannot_be_fetched_stop_nothing(cloud):
    cloud.fail(1, "tpu_worker.sh last")
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=["exit 1", "exit 0"])
    assert done.returncode == 0, done.stderr
    assert "not all logs of laser could be fetched: see " in done.stderr
    assert list(cloud.logs().values()) == ["no route to host\n"]


def test_a_run_that_failed_unseen_leaves_its_logs_when_run_is_called_again(cloud):
    play = ["exit 1", "exit 0"]
    started(cloud, play)
    assert cloud.launch("follow", *OPTIONS[:2], play=play).returncode == 1
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=play)
    assert done.returncode == 0, done.stderr
    (log,) = cloud.logs().values()
    assert "log of start 1" in log


def test_mistake_in_the_config_ends_at_once(cloud):
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=["echo 'unknown field'; exit 2"])
    assert done.returncode == 2
    assert "unknown field" in done.stdout
    assert len(cloud.started()) == 1


def test_what_was_accepted_once_is_no_mistake_in_the_config(cloud):
    """A bucket that does not answer at a start may look like one."""
    play = ["exit 75", "exit 2", "exit 0"]
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=play)
    assert done.returncode == 0, done.stderr
    assert "train.py left with exit code 2" in done.stderr
    assert len(cloud.started()) == 3


def test_failures_are_tried_again_so_often_and_no_more(cloud):
    done = cloud.launch("run", *OPTIONS, "--restarts=2", *TRAIN, play=["exit 1"] * 9)
    assert done.returncode == 1
    assert "failed 3 times, last with exit code 1" in done.stderr
    assert len(cloud.started()) == 3


def test_failures_are_counted_anew_once_train_has_run_for_long(cloud):
    play = ["sleep 1.2; exit 1"] * 2 + ["exit 0"]
    done = cloud.launch("run", *OPTIONS, "--restarts=1", *TRAIN, play=play, LAUNCH_TPU_LONG="0")
    assert done.returncode == 0, done.stderr
    assert len(cloud.started()) == 3


def test_log_of_any_worker_can_be_followed(cloud):
    done = cloud.launch("run", *OPTIONS, "--slices=2", *TRAIN, play=["exit 0"])
    assert done.returncode == 0, done.stderr
    log = cloud.folder / "laser-1-1" / "laser" / "train.log"
    log.write_text("what worker 1 of slice 1 had to say\n")
    shown = cloud.launch("follow", *OPTIONS, "--slices=2", "--slice=1", "--worker=1")
    assert (shown.returncode, shown.stdout) == (0, log.read_text())


UNTIL_STOPPED = (
    "trap 'exit 75' TERM; touch $CLOUD/ready; until [ -f $CLOUD/ended ]; do sleep 0.1; done; exit 9"
)


def test_stop_reaches_train_alone(cloud):
    """SIGTERM to the program and not to the shell that writes down its exit code."""
    play = [UNTIL_STOPPED]
    started(cloud, play)
    cloud.wait_for("ready")
    stopped = cloud.launch("stop", *OPTIONS[:2], play=play)
    assert stopped.returncode == 0, stopped.stderr
    assert cloud.launch("follow", *OPTIONS[:2], play=play).returncode == 75
    again = cloud.launch("stop", *OPTIONS[:2], play=play)
    assert again.returncode != 0
    assert "train.py does not run on" in again.stderr


def test_stop_ends_the_run_that_follows_and_run_goes_on(cloud):
    play = [UNTIL_STOPPED, "exit 0"]
    follower = cloud.begin("run", *OPTIONS, *TRAIN, play=play)
    cloud.wait_for("ready")
    assert cloud.launch("stop", *OPTIONS[:2], play=play).returncode == 0
    _, said = follower.communicate(timeout=120)
    assert follower.returncode == 75, said
    assert "stopped by 'launch_tpu.sh stop'" in said
    assert len(cloud.started()) == 1
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=play)
    assert done.returncode == 0, done.stderr
    assert len(cloud.started()) == 2


def test_stop_between_two_starts_is_heard(cloud):
    play = ["exit 1"] * 9
    follower = cloud.begin("run", *OPTIONS, *TRAIN, play=play, LAUNCH_TPU_WAIT="3")
    cloud.wait_for("laser-0/laser/train.exit")
    cloud.launch("stop", *OPTIONS[:2], play=play)
    _, said = follower.communicate(timeout=120)
    assert follower.returncode == 75, said
    assert len(cloud.started()) == 1


CHIPS = "$TPU_PROCESS_BOUNDS $TPU_CHIPS_PER_PROCESS_BOUNDS"
TELL = f'echo "$PWD ${{PATH%%:*}} {CHIPS} $SECRET $1"; exit 7'


@pytest.mark.parametrize("endpoints", ["a:b:c", "a:b:c,d:e:f"])
def test_a_command_runs_in_the_installed_folder_with_the_chips_of_one_host(cloud, endpoints):
    (cloud.folder / "endpoints").write_text(endpoints)
    for command in (["create", *OPTIONS], ["install", *OPTIONS[:2]]):
        assert cloud.launch(*command).returncode == 0
    command = [*OPTIONS[:2], "--worker=1", "--env=SECRET", "--", "bash", "-c", TELL, "tell", "a 'b"]
    done = cloud.launch("exec", *command, SECRET="s3cret")
    assert done.returncode == 7, done.stderr
    folder = cloud.folder / "laser-1" / "laser"
    chips = " 1,1,1 2,2,1" if "," in endpoints else "  "
    assert done.stdout == f"{folder} {folder}/.venv/bin{chips} s3cret a 'b\n"
    assert not list(cloud.folder.rglob("laser.env"))
    assert "s3cret" not in (cloud.folder / "calls").read_text()


def test_a_command_runs_on_all_hosts_of_all_slices(cloud):
    """Which then are one, as for train.py."""
    (cloud.folder / "endpoints").write_text("a:b:c,d:e:f")
    slices = [*OPTIONS[:2], "--slices=2"]
    for command in (["create", *OPTIONS, "--slices=2"], ["install", *slices]):
        assert cloud.launch(*command).returncode == 0
    command = ["--worker=all", "--env=SECRET=x", "--", "bash", "-c", TELL.partition(";")[0]]
    done = cloud.launch("exec", *slices, *command)
    assert done.returncode == 0, done.stderr
    folders = [cloud.folder / f"laser-{i}-{j}" / "laser" for i in (0, 1) for j in (0, 1)]
    assert sorted(done.stdout.splitlines()) == [f"{f} {f}/.venv/bin   x " for f in folders]
    assert not list(cloud.folder.rglob("laser.env"))


def test_extras_are_installed_on_all_workers(cloud):
    done = cloud.launch("run", *OPTIONS, "--extras=wandb,images", *TRAIN, play=["exit 0"])
    assert done.returncode == 0, done.stderr
    assert (cloud.folder / "made").read_text() == "-s tpu WITH=wandb images\n" * 2


def test_make_installs_the_lists_that_it_is_given():
    done = subprocess.run(
        ["make", "-n", "tpu", "WITH=wandb images"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("tpu", "wandb", "images"):
        assert f"-r requirements-{name}.txt" in done.stdout or (ROOT / f".venv/.{name}").exists()


def test_variables_arrive_as_they_are(cloud):
    """One from the command line, and one from the environment, which stands nowhere else."""
    argument = "a 'b' $(touch X) `touch X` \"c\" \\\n d;touch X"
    options = ["--slices=2", f"--env=LIBTPU_INIT_ARGS={argument}", "--env=SECRET", "--env=EMPTY="]
    print_all = 'printf \'%s|%s|%s\' "$LIBTPU_INIT_ARGS" "$SECRET" "${EMPTY-unset}"'
    (cloud.folder / "others").write_text(f"{print_all} >$CLOUD/other\n")
    play = [f"{print_all} >$CLOUD/variables; exit 0"]
    done = cloud.launch("run", *OPTIONS, *options, *TRAIN, play=play, SECRET="it's s3cret")
    assert done.returncode == 0, done.stderr
    assert (cloud.folder / "variables").read_text() == f"{argument}|it's s3cret|"
    cloud.wait_for("other")
    assert not list(cloud.folder.rglob("X"))
    assert not list(cloud.folder.rglob("laser.env"))
    assert "s3cret" not in (cloud.folder / "calls").read_text()
    again = cloud.launch("start", *OPTIONS[:2], "--slices=2", *TRAIN, play=[play[0]] * 2)
    assert again.returncode == 0, again.stderr
    assert cloud.launch("follow", *OPTIONS[:2], "--slices=2").returncode == 0
    assert (cloud.folder / "variables").read_text() == "||unset"


def test_a_dry_run_shows_no_secret(cloud):
    done = cloud.launch("start", *OPTIONS, "--env=SECRET", "--dry-run", *TRAIN, SECRET="its value")
    assert done.returncode == 0, done.stderr
    assert "its value" not in done.stdout + done.stderr
    copied, command = done.stdout.splitlines()
    assert " scp laser.env laser:laser.env " in copied
    assert (
        "'--command=. ./laser.env && rm laser.env && laser/scripts/tpu_worker.sh start " in command
    )


@pytest.mark.parametrize(
    ("held", "code"), [("256 SHA256:other a (RSA)", 2), ("256 SHA256:mine+/ b (RSA)", 0), ("", 0)]
)
def test_an_agent_without_gcloud_s_key_is_told_before_a_slice_is_asked_for(cloud, held, code):
    for name, words in {
        "ssh-add": f"echo '{held}'; [[ '{held}' ]]",
        "ssh-keygen": "echo '3072 SHA256:mine+/ someone@here (RSA)'",
    }.items():
        (cloud.folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{words}\n")
        (cloud.folder / "bin" / name).chmod(0o755)
    key = cloud.folder / ".ssh" / "google_compute_engine"
    key.parent.mkdir()
    key.touch()
    done = cloud.launch("run", *OPTIONS, *TRAIN, play=["exit 0"])
    assert done.returncode == code, done.stderr
    assert (f"type 'ssh-add {key}'" in done.stderr) == (code == 2)
    assert (cloud.folder / "calls").exists() == (code == 0)
    assert cloud.launch("run", *OPTIONS, "--dry-run", *TRAIN).returncode == 0


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
        (["follow", *OPTIONS, "--worker=all"], "--worker=all: must be a number"),
        (["exec", *OPTIONS], "exec needs a command after --"),
        (["follow", *OPTIONS, "--slice=1"], "--slice=1: must be below --slices=1"),
        (["run", *OPTIONS, "--slices=two", *TRAIN], "--slices=two: must be a number"),
        (["run", *OPTIONS, "--bucket=gs://a/b", *TRAIN], "--bucket=a/b: the name"),
        (["run", *OPTIONS, "--bucket", "a", *TRAIN], "--bucket: write --bucket=VALUE"),
        (["run", *OPTIONS, "--workdir=x"], "unknown option '--workdir=x'"),
        (["run", *OPTIONS, "--create-flag=reserved", *TRAIN], "the flag must start with --"),
        (["run", *OPTIONS, "--ssh-flag=-v", *TRAIN], "the flag must start with --"),
        (["run", *OPTIONS, "--extras=wand", *TRAIN], "there is no requirements-wand.txt"),
        (["run", *OPTIONS, "--env=NEVER_SET_X", *TRAIN], "--env=NEVER_SET_X: is not set here"),
        (["run", *OPTIONS, "--env=a;touch X=b", *TRAIN], "--env=a;touch X: no name of a variable"),
    ],
)
def test_mistakes_are_named_before_anything_runs(cloud, arguments, message):
    refused = cloud.launch(*arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not (cloud.folder / "calls").exists()


def test_help_names_every_option():
    text = "\n".join(dry_run("--help"))
    reads = Path(SCRIPT).read_text().partition("while (($#))")[2].partition("\ndone")[0]
    options = {*re.findall(r"--[a-z][a-z-]+", reads)} - {"--help"}
    assert {"--spot", "--env", "--ssh-flag", "--extras"} <= options
    for option in options:
        assert option in text
