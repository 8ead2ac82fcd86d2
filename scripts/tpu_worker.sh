#!/usr/bin/env bash
# What scripts/launch_tpu.sh has every worker of a slice do, in the folder that it copied there.
#
#   install BUCKET EXTRAS...   Python packages, and the bucket, if not '', mounted as the folder `bucket`
#   start ARGUMENTS...         train.py in the background, in a session of its own that outlives the caller;
#                              refused where it runs
#   restart ARGUMENTS...       the same, after an end to what still runs
#   state                      whether it runs, has ended, has been stopped by `stop`, or was never there
#   follow                     its log from the beginning until it ends, then its exit code
#   last                       the end of its log, with this host's name
#   stop                       SIGTERM: it saves and leaves, and nobody is to start it again
#   execute COMMAND...         with the .venv of this folder first in PATH
#   alone COMMAND...           the same; the chips of this host are a slice of their own
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A new machine updates itself at first, and holds apt's locks for minutes; `update` waits for none.
packages() {
  local tries=30
  until sudo apt-get -q update; do
    ((--tries)) || return 1
    sleep 20
  done
  sudo apt-get -qy -o DPkg::Lock::Timeout=600 install "$@"
}

install() {
  if ! command -v python3.11 >/dev/null; then packages python3.11 python3.11-venv; fi
  make -s tpu WITH="${*:2}"
  [[ $1 ]] || return 0
  if ! command -v gcsfuse >/dev/null; then
    local keys=/usr/share/keyrings/gcsfuse.asc packages=https://packages.cloud.google.com/apt
    curl -fsS $packages/doc/apt-key.gpg | sudo tee $keys >/dev/null
    echo "deb [signed-by=$keys] $packages gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    packages gcsfuse
  fi
  mkdir -p bucket
  if mountpoint -q bucket; then
    local mounted
    mounted=$(findmnt -no SOURCE bucket)
    [[ $mounted == "$1" ]] && return
    echo "the folder bucket is $mounted here, not $1: delete this slice, or unmount it" >&2
    return 1
  fi
  gcsfuse --implicit-dirs "$1" bucket
}

start() {
  if [[ $(state) == *running ]]; then
    echo "train.py runs on $(hostname): follow it, or stop it first" >&2
    return 1
  fi
  restart "$@"
}

restart() {
  if [[ -f train.pid ]]; then kill -KILL -- "-$(cat train.pid)" 2>/dev/null || true; fi
  rm -f train.pid train.exit train.stopped
  if [[ -f train.log ]]; then mv train.log train.previous.log; fi
  # The shell's number is that of the session. It writes the exit code when train.py has ended.
  # shellcheck disable=SC2016
  setsid nohup bash -c '
    echo $$ >train.pid
    .venv/bin/python train.py "$@" >train.log 2>&1
    echo $? >train.exit
  ' train "$@" </dev/null >/dev/null 2>&1 &
  until [[ -s train.pid ]]; do sleep 0.1; done  # else `state` could say that there is none
}

state() {
  local word=none
  if [[ -f train.pid && ! -f train.exit ]] && kill -0 "$(cat train.pid)" 2>/dev/null; then word=running
  elif [[ -f train.stopped ]]; then word=stopped
  elif [[ -f train.pid ]]; then word=ended; fi
  echo "train.py: $word"
}

follow() {
  until [[ -s train.pid ]]; do sleep 0.2; done
  tail -s 0.2 -n +1 --pid="$(cat train.pid)" -F train.log 2>/dev/null
  echo "train.py: exit code $(cat train.exit 2>/dev/null || echo unknown)"
}

last() { tail -n 60 train.log 2>&1 | sed "s/^/$(hostname): /"; }

stop() {
  touch train.stopped
  if [[ $(state) != *running ]]; then echo "train.py does not run on $(hostname)" >&2; return 1; fi
  pkill -TERM -s "$(cat train.pid)" python
}

execute() {
  PATH=$PWD/.venv/bin:$PATH
  exec "$@"
}

# What libtpu takes for one process with all chips of its host, as jax's own tests of several processes set it and
# https://gist.github.com/skye/f82ba45d2445bb19d53545538754f9a3 explains. Each host of a slice of several has 4 chips,
# two by two; a slice of one host needs nothing. It never ran on a TPU.
alone() {
  local hosts metadata=http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1
  hosts=$(curl -fsS -H "Metadata-Flavor: Google" "$metadata/instance/attributes/worker-network-endpoints")
  if [[ $hosts == *,* ]]; then
    export TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_VISIBLE_CHIPS=0,1,2,3 CLOUD_TPU_TASK_ID=0
  fi
  execute "$@"
}

"$@"
