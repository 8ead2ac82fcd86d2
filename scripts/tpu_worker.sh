#!/usr/bin/env bash
# What scripts/launch_tpu.sh has every worker of a slice do, in the folder that it copied there.
#
#   install [BUCKET]     Python packages, and the bucket mounted as the folder `bucket`
#   start ARGUMENTS...   train.py in the background, in a session of its own that outlives the caller
#   running              whether it runs
#   follow               its log from the beginning until it ends, then its exit code
#   stop                 SIGTERM: it saves and leaves
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install() {
  if ! command -v python3.11 >/dev/null; then
    sudo apt-get -q update
    sudo apt-get -qy install python3.11 python3.11-venv
  fi
  make -s tpu
  [[ ${1:-} ]] || return 0
  if ! command -v gcsfuse >/dev/null; then
    local keys=/usr/share/keyrings/gcsfuse.asc packages=https://packages.cloud.google.com/apt
    curl -fsS $packages/doc/apt-key.gpg | sudo tee $keys >/dev/null
    echo "deb [signed-by=$keys] $packages gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -q update
    sudo apt-get -qy install gcsfuse
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
  if [[ -f train.pid ]]; then kill -KILL -- "-$(cat train.pid)" 2>/dev/null || true; fi
  rm -f train.pid train.exit
  if [[ -f train.log ]]; then mv train.log train.previous.log; fi
  # The shell's number is that of the session. It writes the exit code when train.py has ended.
  # shellcheck disable=SC2016
  setsid nohup bash -c '
    echo $$ >train.pid
    .venv/bin/python train.py "$@" >train.log 2>&1
    echo $? >train.exit
  ' train "$@" </dev/null >/dev/null 2>&1 &
  until [[ -s train.pid ]]; do sleep 0.1; done  # else `running` could say no
}

running() { [[ -f train.pid && ! -f train.exit ]] && kill -0 "$(cat train.pid)" 2>/dev/null; }

follow() {
  until [[ -s train.pid ]]; do sleep 0.2; done
  tail -s 0.2 -n +1 --pid="$(cat train.pid)" -F train.log 2>/dev/null
  echo "train.py: exit code $(cat train.exit 2>/dev/null || echo unknown)"
}

stop() { pkill -TERM -s "$(cat train.pid)" python; }

"$@"
