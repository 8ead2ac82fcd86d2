#!/usr/bin/env bash
# Runs train.py on a TPU slice of Google Cloud, or on several: see usage() or --help.
set -uo pipefail
shopt -s extglob

usage() {
  cat <<'END'
Runs train.py on a TPU slice of Google Cloud, or on several, until the run is done.

    scripts/launch_tpu.sh run --name=laser --zone=us-west4-a --type=v5litepod-256 --spot \
        --bucket=my-bucket -- --config=configs/c4.py:size=2p2b,attention=laser,slice=v5e-256 \
        --config.data.store=bucket/c4 --workdir=bucket/runs/laser

Commands
  run      all of the following but delete: creates, installs, starts, follows the log, and starts again
           after a preemption, on a new slice if the old one is gone. Called again it goes on following.
  create   asks for a queued resource and waits until it is there
  install  copies the committed files of this repository to all workers, and installs
           requirements-tpu.txt there
  start    starts train.py on all workers, where it goes on without this terminal; what follows `--`
           are its arguments, --config and --workdir at least
  follow   shows the log of a worker until train.py ends; leaves with its exit code
  stop     sends SIGTERM to one worker: all workers save the same step and end with exit code 75
  status   prints the state of the queued resource
  delete   deletes it with all that is on its disks

Options
  --name=NAME      of the queued resource and its slices
  --zone=ZONE      where
  --type=TYPE      of accelerator, such as v5litepod-256, also called v5e-256; the number in v5p-512
                   counts cores, 2 a chip
  --version=V      runtime version; by default the one of the type
  --project=ID     default: gcloud's own
  --slices=N       so many slices of that type, which train as one [1]
  --spot           cheaper, and may be taken away at any time
  --bucket=NAME    mounted by gcsfuse as the folder `bucket` of the repository, on all workers
  --restarts=N     how often to start again after a failure that is no preemption [3]
  --slice=I --worker=N    whose log to follow [0 and 0, which speaks for all; the others tell of errors]
  --delete         delete the queued resource when the run has ended, also where it failed
  --dry-run        print the commands and run none

All workers must see one workdir and one store: put both in a bucket in the region of the TPUs, and name
them by gs:// addresses (docs/buckets.md). Or have it mounted by --bucket; then give it a hierarchical
namespace, where renaming a folder is one operation.

`run` and `start` check the config first, as train.py does, and `run` that it fits the slices; where
docs/plans.md has a plan of it, they say whether it fits in memory. That needs `.venv` here, as any command of make makes it.

Exit codes: 0 done; 2 mistake in the arguments or in the config; 3 diverged; 1 anything else. `follow` alone leaves
with the code of train.py.
END
}

# What train.py would say of its arguments, and whether they fit the slices, before there are any.
check_config() {
  local root python said
  root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
  python=${LAUNCH_TPU_PYTHON:-$root/.venv/bin/python}
  [[ $type && -x $(command -v "$python") ]] || { say "the config was not checked here"; return; }
  if ! said=$(cd "$root" && "$python" scripts/check_launch.py "$type" "$slices" "${train[@]}" 2>&1); then
    fail "${said##*error: }"
  fi
  [[ ! $said ]] || say "$said"
}

fail() { echo "launch_tpu.sh: error: $*" >&2; exit 2; }
say() { echo "launch_tpu.sh: $*" >&2; }

WORKER="laser/scripts/tpu_worker.sh"  # of the copy on every worker
MARK="'" QUOTE="'\\''"  # a quote, and how it is written inside of quotes
WAIT=${LAUNCH_TPU_WAIT:-30}  # seconds between two looks at the state
command=${1:-}
case $command in
  -h | --help | "") usage; exit 0 ;;
  run | create | install | start | follow | stop | status | delete) shift ;;
  *) fail "unknown command '$command'; see --help" ;;
esac

name="" zone="" type="" version="" project="" bucket="" spot="" delete="" dry=""
slices=1 slice=0 worker=0 restarts=3
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --slice=*) slice=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    --name | --zone | --type | --version | --project | --slices | --bucket | --restarts)
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
[[ $worker =~ $NUMBER ]] || fail "--worker=$worker: must be a number"
[[ $restarts =~ $NUMBER ]] || fail "--restarts=$restarts: must be a number"
bucket=${bucket#gs://}
[[ $bucket != */* ]] || fail "--bucket=$bucket: the name of the bucket alone, without a folder"
# What a name of Google Cloud may be made of. What passes needs no quotes, and gets them all the same.
for flag in zone type version project bucket; do
  [[ ! ${!flag} || ${!flag} =~ ^[A-Za-z0-9][-A-Za-z0-9._:]*$ ]] ||
    fail "--$flag=${!flag}: letters, digits, '-', '_', '.' and ':' alone"
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
    [[ " ${train[*]-}" =~ \ --?$flag[=\ ] ]] ||
      fail "--$flag is missing among the arguments of train.py, after --"
  done
  check_config
  [[ $bucket || ! $spot || "${train[*]-}" == *workdir?gs://* ]] ||
    say "no --bucket: what train.py writes on the slice goes with it"
fi

if [[ ($command == run || $command == create) && ! $project && ! $dry ]]; then
  [[ $(gcloud config get-value project 2>/dev/null) ]] ||
    fail "gcloud has no project: give --project=ID, or 'gcloud config set project ID' once"
fi
where=(--zone="$zone")
[[ ! $project ]] || where+=(--project="$project")
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# Prints a command as it could be typed, or runs it.
run() {
  if [[ $dry ]]; then quoted "$@"; echo; else "$@"; fi
}

# Its arguments as a shell reads them, in quotes where they need any.
quoted() {
  local argument space=""
  for argument in "$@"; do
    [[ $argument =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]] || argument="'${argument//$MARK/$QUOTE}'"
    printf '%s%s' "$space" "$argument"
    space=" "
  done
}

# remote NODE WORKER COMMAND: runs a line of shell in the home folder of a worker, or of all.
remote() {
  run gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" --worker="$2" --command="$3" \
    -- -o ServerAliveInterval=15 -o ServerAliveCountMax=4
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
  if ((slices > 1)); then
    request+=(--node-count="$slices" --node-prefix="$name")
  else
    request+=(--node-id="$name")
  fi
  [[ ! $spot ]] || request+=(--spot)
  run "${request[@]}"
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
  local root folder archive=laser.tar.gz failed=0 jobs=() job node
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ ! $dry ]]; then
    folder=$(mktemp -d)
    archive=$folder/laser.tar.gz
    [[ ! $(git -C "$root" status --porcelain -uno) ]] || say "changes that are not committed stay here"
  fi
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD || return 1
  for node in "${nodes[@]}"; do
    if [[ $dry ]]; then install_one "$node" "$archive"; else
      install_one "$node" "$archive" & jobs+=($!)
    fi
  done
  for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || failed=1; done
  [[ $dry ]] || rm -r "$folder"
  return $failed
}

install_one() {
  local unpack="mkdir -p laser && tar xzf laser.tar.gz -C laser"
  run gcloud compute tpus tpu-vm scp "$2" "$1:laser.tar.gz" "${where[@]}" --worker=all &&
    remote "$1" all "$unpack && $WORKER install${bucket:+ $(quoted "$bucket")}"
}

start_all() {
  local node
  for node in "${nodes[@]}"; do
    remote "$node" all "$WORKER start $(quoted "${train[@]}")" || return 1
  done
}

# Shows the log and leaves with the code of train.py; 255 where the connection ended first.
follow() {
  if [[ $dry ]]; then remote "${nodes[slice]}" "$worker" "$WORKER follow"; return 0; fi
  local line code=255
  while IFS= read -r line; do
    case $line in
      "train.py: exit code unknown") ;;
      "train.py: exit code "+([0-9])) code=${line##* } ;;
      *) printf '%s\n' "$line" ;;
    esac
  done < <(remote "${nodes[slice]}" "$worker" "$WORKER follow" </dev/null)
  return "$code"
}

stop() { remote "${nodes[slice]}" "$worker" "$WORKER stop"; }

running() { remote "${nodes[0]}" 0 "$WORKER running" </dev/null >/dev/null 2>&1; }

# Of the run, as it should or not: returns the code, without the slice if --delete says so.
ended() {
  [[ ! $delete ]] || delete_all
  return "$1"
}

run_until_done() {
  local code started="" failures=0
  if [[ $dry ]]; then create; install_all; start_all; follow; ended 0; return; fi
  while true; do
    ensure; code=$?
    ((code == 0 || code == 3)) || { say "no slice: see the message of gcloud above"; return 1; }
    if ((code == 0)) && running; then
      say "train.py is running: following it"
    else
      say "${started:+starting again: }installing on ${#nodes[@]} slice(s)"
      if install_all && start_all; then started=1; else
        ((failures++ < restarts)) || { say "could not install or start"; ended 1; return; }
        sleep "$WAIT"
        continue
      fi
    fi
    follow; code=$?
    case $code in
      0)
        say "the run is done"
        ended 0; return ;;
      2) say "train.py refused its arguments or config: see above"; ended 2; return ;;
      3) say "the run has diverged: see above"; ended 3; return ;;
      75) say "saved on preemption" ;;
      255) say "the connection or the slice is lost" ;;
      *)
        sleep "$WAIT"  # a slice that is taken away without notice may show it late
        if [[ $(state) == READY ]]; then
          if ((failures++ >= restarts)); then
            say "train.py failed $failures times, last with exit code $code"
            ended 1; return
          fi
        fi
        say "train.py left with exit code $code" ;;
    esac
    started=1
    sleep "$WAIT"
  done
}

case $command in
  run) run_until_done ;;
  create) if [[ $dry ]]; then create; else ensure; code=$?; ((code == 0 || code == 3)); fi ;;
  install) install_all ;;
  start) start_all ;;
  follow) follow ;;
  stop) stop ;;
  status) if [[ $dry ]]; then run "${describe[@]}"; else state; fi ;;
  delete) delete_all ;;
esac
