#!/usr/bin/env bash
# Runs train.py on a TPU slice of Google Cloud, or on several: see usage() or --help.
set -uo pipefail
shopt -s extglob

usage() {
  cat <<'END'
Runs train.py on a TPU slice of Google Cloud, or on several, until the run is done.

    scripts/launch_tpu.sh run --name=laser --zone=us-west4-a --type=v5litepod-256 --spot \
        -- --config=configs/c4.py:size=2p2b,attention=laser,slice=v5e-256 \
        --config.data.store=gs://my-bucket/stores/c4 --workdir=gs://my-bucket/runs/laser

Commands
  run      all of the following but delete: creates, installs, starts, follows the log, and starts again
           after a preemption, on a new slice if the old one is gone. Called again it goes on following.
  create   asks for a queued resource and waits until it is there
  install  waits until all workers can be reached, copies the committed files of this repository there,
           and installs requirements-tpu.txt
  start    starts train.py on all workers, where it goes on without this terminal; what follows `--` are its
           arguments, --config and --workdir at least. Refused where it runs
  follow   shows the log of a worker until train.py ends; leaves with its exit code
  exec     runs the command that follows `--` in the installed repository, whose .venv comes first in PATH, and
           leaves with its exit code. With --worker=N, 0 by default, it has the chips of that host alone, as
           check_attention.py, evaluate.py and generate.py want it; with --worker=all it runs on all
  stop     sends SIGTERM to one worker: all workers save the same step and end with exit code 75, and so does
           a `run` that follows them; `run` called again goes on
  status   prints the state of the queued resource
  delete   deletes it with all that is on its disks; a `run` that goes on would ask for it again

Options
  --name=NAME      of the queued resource and its slices
  --zone=ZONE      where
  --type=TYPE      of accelerator, such as v5litepod-256, also called v5e-256; the number in v5p-512
                   counts cores, 2 a chip
  --version=V      runtime version; by default the one of the type
  --project=ID     default: gcloud's own
  --slices=N       so many slices of that type, which train as one [1]
  --spot           cheaper, and may be taken away at any time
  --create-flag=FLAG, --ssh-flag=FLAG   for `queued-resources create` and for `tpu-vm ssh` and `scp` of gcloud,
                   such as --create-flag=--reserved, --ssh-flag=--internal-ip or --ssh-flag=--tunnel-through-iap,
                   which takes `gcloud alpha`; any number of them
  --bucket=NAME    mounted by gcsfuse as the folder `bucket` of the repository, on all workers
  --extras=A,B     installs requirements-A.txt and requirements-B.txt, too, such as wandb,images
  --env=NAME=VALUE   in the environment of train.py, or of the command of `exec`; --env=NAME takes the value from the
                   environment here, so that a secret stands in no history of commands; any number of them
  --restarts=N     how often to start again after a failure that is no preemption [3]; counted anew once
                   train.py has run for an hour
  --slice=I --worker=N    whose log to follow, or where to run a command [0 and 0, which speaks for all in its log;
                   the others tell of errors]
  --delete         delete the queued resource when the run has ended, also where it failed or was stopped
  --dry-run        print the commands and run none

All workers must see one workdir and one store: put both in a bucket in the region of the TPUs, and name them by
gs:// addresses (docs/buckets.md). Or have it mounted by --bucket, and name folders in `bucket/`; then give it a
hierarchical namespace, where renaming a folder is one operation.

`run` and `start` check the config first, as train.py does, that it fits the slices, and that workers see workdir
and store; where docs/plans.md has a plan of it, they say whether it fits in memory. That needs --type, and `.venv`
here, as any command of make makes it.

When train.py has failed, `run` leaves the last lines of all workers' logs here, in files NAME-TIME.log.

Exit codes: 0 done; 2 mistake in the arguments or in the config; 3 diverged; 4 no memory for the first step;
75 saved after `stop`; 1 anything else.
`follow` alone leaves with the code of train.py.
END
}

# What train.py would say of its arguments, and whether they fit the slices, before there are any.
check_config() {
  local python said
  python=${LAUNCH_TPU_PYTHON:-$root/.venv/bin/python}
  [[ $type && -x $(command -v "$python") ]] || { say "the config was not checked here"; return; }
  said=$(cd "$root" && "$python" scripts/check_launch.py "$type" "$slices" "$bucket" "$extras" "${train[@]}" 2>&1) ||
    fail "${said##*error: }"
  [[ ! $said ]] || say "${said##*$'\n'}"
}

# gcloud copies nothing to several workers while an agent holds keys without its own, which it says only then.
check_agent() {
  local key=~/.ssh/google_compute_engine held print
  [[ ! $dry && -f $key ]] && held=$(ssh-add -l 2>/dev/null) && print=$(ssh-keygen -lf "$key" 2>/dev/null) || return 0
  print=${print#* }  # behind the length
  [[ $held == *"${print%% *}"* ]] || fail "ssh-agent holds other keys, but not gcloud's: type 'ssh-add $key'"
}

fail() { echo "launch_tpu.sh: error: $*" >&2; exit 2; }
say() { echo "launch_tpu.sh: $*" >&2; }

# Its arguments as a shell reads them, in quotes where they need any.
quoted() {
  local argument space=""
  for argument in "$@"; do
    [[ $argument =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]] || argument="'${argument//$MARK/$QUOTE}'"
    printf '%s%s' "$space" "$argument"
    space=" "
  done
}

# set_variable NAME=VALUE, or NAME alone: for train.py or a command.
set_variable() {
  local variable=${1%%=*} value=${1#*=}
  [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "--env=$variable: no name of a variable"
  if [[ $1 != *=* ]]; then value=$(printenv "$variable") || fail "--env=$variable: is not set here"; fi
  environment+="export $(quoted "$variable=$value")"$'\n'
}

WORKER="laser/scripts/tpu_worker.sh"  # of the copy on every worker
MARK="'" QUOTE="'\\''"  # a quote, and how it is written inside of quotes
WAIT=${LAUNCH_TPU_WAIT:-30}  # seconds between two looks at the state
PATIENCE=${LAUNCH_TPU_PATIENCE:-3600}  # seconds for which workers of a slice that is there may be out of reach
# Seconds of train.py after which failures are counted anew: above training.step_timeout_seconds and a start, so
# that a run that hangs each time ends.
LONG=${LAUNCH_TPU_LONG:-3600}
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
command=${1:-}
case $command in
  -h | --help | "") usage; exit 0 ;;
  run | create | install | start | follow | exec | stop | status | delete) shift ;;
  *) fail "unknown command '$command'; see --help" ;;
esac

name="" zone="" type="" version="" project="" bucket="" extras="" spot="" delete="" dry=""
slices=1 slice=0 worker=0 restarts=3 create_flags=() ssh_flags=() environment=""
while (($#)); do
  case $1 in
    --name=* | --zone=* | --type=* | --version=* | --project=* | --slices=* | --slice=* | --worker=* | --bucket=* | \
      --extras=* | --restarts=*)
      flag=${1%%=*}
      printf -v "${flag#--}" %s "${1#*=}" ;;
    --env=*) set_variable "${1#*=}" ;;
    --create-flag=--[a-z]*) create_flags+=("${1#*=}") ;;
    --ssh-flag=--[a-z]*) ssh_flags+=("${1#*=}") ;;
    --create-flag=* | --ssh-flag=*) fail "$1: the flag must start with --, as in ${1%%=*}=--internal-ip" ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --name | --zone | --type | --version | --project | --slices | --bucket | --restarts | --extras | --env | \
      --create-flag | --ssh-flag)
      fail "$1: write $1=VALUE" ;;
    *) fail "unknown option '$1'; options of train.py come after --" ;;
  esac
  shift
done
train=("$@")

[[ $name =~ ^[a-z][-a-z0-9]*$ ]] || fail "--name='$name': needed; lower-case letters, digits and -"
[[ $zone ]] || fail "--zone is missing, such as --zone=us-west4-a"
NUMBER='^(0|[1-9][0-9]{0,5})$'
[[ $slices =~ $NUMBER ]] && ((slices > 0)) || fail "--slices=$slices: must be a number from 1"
[[ $slice =~ $NUMBER ]] && ((slice < slices)) || fail "--slice=$slice: must be below --slices=$slices"
[[ $worker =~ $NUMBER || ($command == exec && $worker == all) ]] || fail "--worker=$worker: must be a number"
[[ $restarts =~ $NUMBER ]] || fail "--restarts=$restarts: must be a number"
bucket=${bucket#gs://}
[[ $bucket != */* ]] || fail "--bucket=$bucket: the name of the bucket alone, without a folder"
# What a name of Google Cloud may be made of. What passes needs no quotes, and gets them all the same.
for flag in zone type version project bucket; do
  [[ ! ${!flag} || ${!flag} =~ ^[A-Za-z0-9][-A-Za-z0-9._:]*$ ]] ||
    fail "--$flag=${!flag}: letters, digits, '-', '_', '.' and ':' alone"
done
[[ $extras =~ ^([a-z]+(,[a-z]+)*)?$ ]] || fail "--extras=$extras: names with commas between, such as wandb,images"
for extra in ${extras//,/ }; do
  [[ -f $root/requirements-$extra.txt ]] || fail "--extras=$extras: there is no requirements-$extra.txt"
done
if [[ $command == run || $command == create ]]; then
  [[ $type ]] || fail "--type is missing, such as --type=v5litepod-256"
  type=${type/#v5e-/v5litepod-}  # its name in gcloud
  case $type in
    v[234]-*) default=tpu-ubuntu2204-base ;;
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v6e-*) default=v2-alpha-tpuv6e ;;
    *) default="" ;;
  esac
  version=${version:-$default}
  [[ $version ]] || fail "--type=$type: not known here; say which runtime it needs by --version=V"
fi
if [[ $command == run || $command == start ]]; then
  for flag in config workdir; do
    [[ " ${train[*]-}" =~ \ --?${flag}[=\ ] ]] ||
      fail "--$flag is missing among the arguments of train.py, after --"
  done
  check_config
  [[ $bucket || ! $spot || "${train[*]-}" == *workdir?gs://* ]] ||
    say "no --bucket: what train.py writes on the slice goes with it"
fi

[[ $command != exec || ${train[*]-} ]] || fail "exec needs a command after --, such as -- tail train.log"

if [[ ($command == run || $command == create) && ! $project && ! $dry ]]; then
  [[ $(gcloud config get-value project 2>/dev/null) ]] ||
    fail "gcloud has no project: give --project=ID, or 'gcloud config set project ID' once"
fi
[[ $command != run && $command != install ]] || check_agent
where=(--zone="$zone")
[[ ! $project ]] || where+=(--project="$project")
access=("${where[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"})
tpu_vm=(gcloud compute tpus tpu-vm)
[[ " ${access[*]} " != *" --tunnel-through-iap "* ]] || tpu_vm=(gcloud alpha compute tpus tpu-vm)  # there alone
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# Prints a command as it could be typed, or runs it.
run() {
  if [[ $dry ]]; then quoted "$@"; echo; else "$@"; fi
}

# remote NODE WORKER COMMAND: runs a line of shell in the home folder of a worker, or of all.
remote() {
  run "${tpu_vm[@]}" ssh "$1" "${access[@]}" --worker="$2" --command="$3" \
    -- -o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=4
}

# copy NODE FILE [WORKER]: into the home folder of all workers, or of one.
copy() { run "${tpu_vm[@]}" scp "${folder:+$folder/}$2" "$1:$2" "${access[@]}" --worker="${3:-all}"; }

# on_all FUNCTION ARGUMENTS...: calls it for every slice, all at once. Fails where one fails.
on_all() {
  local node job jobs=() failed=0
  for node in "${nodes[@]}"; do
    if [[ $dry ]]; then "$1" "$node" "${@:2}"; else
      "$1" "$node" "${@:2}" & jobs+=($!)
    fi
  done
  for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || failed=1; done
  return $failed
}

# patiently COMMAND...: until it succeeds; its output is in `answer`. Fails where slices are gone, or after PATIENCE.
patiently() {
  local deadline=$((SECONDS + PATIENCE)) told=""
  if [[ $dry ]]; then "$@"; return; fi
  until answer=$("$@" 2>&1 </dev/null); do
    [[ $told ]] || say "waiting until workers can be reached: ${answer##*$'\n'}"
    told=1
    [[ $(state) == READY ]] || return 1
    ((SECONDS < deadline)) || { say "they could not be reached for $PATIENCE seconds: $answer"; return 1; }
    sleep "$WAIT"
  done
}

describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}"
  --format="value(state.state)")

# READY, WAITING (not yet), GONE (preempted or failed), MISSING (never there), UNKNOWN (no answer)
state() {
  local answer
  if ! answer=$("${describe[@]}" 2>&1); then
    if [[ $answer == *NOT_FOUND* ]]; then echo MISSING; else say "$answer"; echo UNKNOWN; fi
    return
  fi
  case ${answer##*$'\n'} in
    ACTIVE) echo READY ;;
    ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) echo WAITING ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) echo GONE ;;
    *) say "state: $answer"; echo UNKNOWN ;;
  esac
}

create() {
  local request=(gcloud compute tpus queued-resources create "$name" "${where[@]}"
    --accelerator-type="$type" --runtime-version="$version")
  if ((slices > 1)); then request+=(--node-count="$slices" --node-prefix="$name"); else request+=(--node-id="$name"); fi
  [[ ! $spot ]] || request+=(--spot)
  run "${request[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

delete_all() { run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }

# Returns when the slices are there: 0 as they were, 3 newly made. Fails if they cannot be had.
ensure() {
  local now last="" made=0 unknown=0
  while true; do
    now=$(state)
    [[ $now == "$last" ]] || say "$name: $now"
    last=$now
    [[ $now == UNKNOWN ]] || unknown=0
    case $now in
      UNKNOWN) ((++unknown < 5)) || { say "$name: $unknown times in a row no known state"; return 1; } ;;
      READY) return $((made ? 3 : 0)) ;;
      MISSING)
        ((made++ < 5)) || { say "$name: asked for $((made - 1)) times, and it never came"; return 1; }
        create || return 1 ;;
      GONE) delete_all || return 1; continue ;;
    esac
    sleep "$WAIT"
  done
}

install_all() {
  local archive=${folder:+$folder/}laser.tar.gz
  [[ $dry || ! $(git -C "$root" status --porcelain -uno) ]] || say "changes that are not committed stay here"
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD && on_all install_one
}

install_one() {
  local answer unpack="mkdir -p laser && tar xzf laser.tar.gz -C laser"
  patiently remote "$1" all true && copy "$1" laser.tar.gz &&
    remote "$1" all "$unpack && $WORKER install $(quoted "$bucket")${extras:+ ${extras//,/ }}"
}

# start_all COMMAND: `start`, or `restart`, which ends what still runs.
start_all() { write_environment && on_all with_arguments all "$1"; }

exec_command() {
  write_environment || return 1
  if [[ $worker == all ]]; then on_all with_arguments all execute; else
    with_arguments "${nodes[slice]}" "$worker" alone
  fi
}

# The environment goes as a file: what stands in a command can be read in gcloud's logs and in lists of processes.
write_environment() {
  [[ $dry || ! $environment ]] || (umask 077 && printf %s "$environment" >"$folder/laser.env")
}

# with_arguments NODE WORKER COMMAND: of tpu_worker.sh, with those after `--`.
with_arguments() {
  local set=""
  if [[ $environment ]]; then copy "$1" laser.env "$2" || return 1; set=". ./laser.env && rm laser.env && "; fi
  remote "$1" "$2" "$set$WORKER $3 $(quoted "${train[@]}")" </dev/null
}

# Shows the log and leaves with the code of train.py; 255 where the connection ended first.
follow() {
  if [[ $dry ]]; then remote "${nodes[slice]}" "$worker" "$WORKER follow"; return 0; fi
  local line code=255
  while IFS= read -r line; do
    case $line in
      "train.py: exit code unknown") code=1 ;;  # its shell was killed, too
      "train.py: exit code "+([0-9])) code=${line##* } ;;
      *) printf '%s\n' "$line" ;;
    esac
  done < <(remote "${nodes[slice]}" "$worker" "$WORKER follow" </dev/null)
  return "$code"
}

stop() { remote "${nodes[0]}" 0 "$WORKER stop"; }

# Prints what the first worker says of train.py: running, ended, stopped (by `stop`) or none. Else fails: an answer
# that does not come says nothing.
ask() {
  local said line=$'\ntrain\\.py: (running|ended|stopped|none)\n'
  local question="if [ -e $WORKER ]; then $WORKER state; else echo train.py: none; fi"
  said=$(remote "${nodes[0]}" 0 "$question" 2>&1 </dev/null) &&
    [[ $'\n'$said$'\n' =~ $line ]] || { echo "$said"; return 1; }
  echo "${BASH_REMATCH[1]}"
}

# The end of all workers' logs, in files here: the next start replaces them, or they go with the slice.
collect_logs() {
  [[ $(state) != READY ]] || on_all collect_one "$(date +%Y%m%d-%H%M%S)"
}

collect_one() {
  local file=$PWD/$1-$2.log
  if remote "$1" all "$WORKER last" >"$file" 2>&1; then say "the last lines of all logs of $1: $file"; else
    say "not all logs of $1 could be fetched: see $file"
  fi
}

# ended CODE REASON: of the run, as it should or not. Returns the code, without the slice if --delete says so.
ended() {
  say "$2"
  (($1 == 0)) || collect_logs
  [[ ! $delete ]] || delete_all
  return "$1"
}

run_until_done() {
  local made code=0 answer began="" accepted="" failures=0 stopped="stopped by 'launch_tpu.sh stop'; 'run' goes on with it"
  if [[ $dry ]]; then create; install_all; start_all restart; follow; [[ ! $delete ]] || delete_all; return; fi
  while true; do
    ensure; made=$?
    ((made == 0 || made == 3)) || { say "no slice: see the message of gcloud above"; return 1; }
    answer=none
    if ((made == 0)) && ! patiently ask; then
      [[ $(state) != READY ]] || { say "it may be training: nothing was changed"; return 1; }
      continue
    fi
    if [[ $answer == stopped && $began ]]; then ended 75 "$stopped"; return; fi
    if [[ $answer == running ]]; then
      say "train.py is running: following it"
    elif [[ $answer != ended || $code != 255 ]]; then  # else it ended unseen, and its log says how
      [[ $answer == none || $began ]] || collect_logs
      say "${began:+starting again: }installing on ${#nodes[@]} slice(s)"
      if ! { install_all && start_all restart; }; then
        if [[ $(state) == READY ]] && ((failures++ >= restarts)); then ended 1 "could not install or start"; return; fi
        sleep "$WAIT"
        continue
      fi
      began=$SECONDS
    fi
    began=${began:-$SECONDS}
    follow; code=$?
    ((SECONDS - began <= LONG)) || failures=0
    if ((code == 2)) && [[ ! $accepted ]]; then
      ended 2 "train.py refused its arguments or config: see above"; return
    fi
    accepted=1  # from now on 2 is a store or a workdir that cannot be read, as for want of a network
    case $code in
      0) ended 0 "the run is done"; return ;;
      3) ended 3 "the run has diverged: see above"; return ;;
      4) ended 4 "the run needs more memory than there is: see above"; return ;;
      255) say "the connection or the slice is lost" ;;
      75)
        if [[ $(state) == READY && $(ask) == stopped ]]; then ended 75 "$stopped"; return; fi
        say "saved on SIGTERM, as before a preemption"
        collect_logs ;;
      *)
        say "train.py left with exit code $code"
        sleep "$WAIT"  # a slice that is taken away without notice may show it late
        if [[ $(state) == READY ]]; then
          if ((failures++ >= restarts)); then
            ended 1 "train.py failed $failures times, last with exit code $code"; return
          fi
          collect_logs
        fi ;;
    esac
    sleep "$WAIT"
  done
}

folder=""  # for what is copied to the workers
if [[ ! $dry && $command =~ ^(run|install|start|exec)$ ]]; then
  folder=$(mktemp -d)
  trap 'rm -r "$folder"' EXIT
fi
case $command in
  run) run_until_done ;;
  create) if [[ $dry ]]; then create; else ensure; code=$?; ((code == 0 || code == 3)); fi ;;
  install) install_all ;;
  start) start_all start ;;
  follow) follow ;;
  exec) exec_command ;;
  stop) stop ;;
  status) if [[ $dry ]]; then run "${describe[@]}"; else state; fi ;;
  delete) delete_all ;;
esac
