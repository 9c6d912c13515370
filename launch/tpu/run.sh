#!/usr/bin/env bash
# Trains on a pod that create.sh made: the same command on every host of every slice, which find each other by
# the cloud's metadata.
#
#   NAME=short ZONE=us-east5-a SHARE=10.0.0.2:/runs bash launch/tpu/run.sh install     this commit, its packages
#   … bash launch/tpu/run.sh train --config sft:short --out runs/short [key=value …]
#   … bash launch/tpu/run.sh log                                                       follows the first host
#   … bash launch/tpu/run.sh stop                                                      every host saves and stops
#   … bash launch/tpu/run.sh --dry-run …                                               prints the commands only
#
# SHARE is a network disk (a Filestore instance, or another NFS) that every host mounts as the checkout's runs/:
# all of them write a run's checkpoints into one folder. After a stop, a failure, or a pod taken away and made
# again (then: install first), the same train line goes on at the next batch.

NAME=${NAME:?what the pod is called}
ZONE=${ZONE:?the zone it is in}

set -euo pipefail
cd "$(dirname "$0")/../.."

dry_run=''
[ "${1:-}" != --dry-run ] || { dry_run=1; shift; }
action=${1:-}
[ $# -eq 0 ] || shift

run() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

# on WORKER NODE COMMAND: runs it there.
on() {
  run gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" --worker="$1" --node="$2" --command="$3"
}

case $action in
  install)
    share=${SHARE:?a network disk for runs/, HOST:/PATH}
    run mkdir -p build
    run git archive --output=build/iv3jax.tar.gz HEAD
    run gcloud compute tpus queued-resources scp build/iv3jax.tar.gz "$NAME:" --zone="$ZONE" --worker=all --node=all
    # The images' own Python is too old; uv brings one, and the environment stays setup_env.sh's.
    on all all "mkdir -p iv3jax/runs && tar -xzf iv3jax.tar.gz -C iv3jax && cd iv3jax && \
{ mountpoint -q runs || { sudo apt-get install -y -q nfs-common && sudo mount -t nfs '$share' runs && \
sudo chmod a+rwx runs; }; } && \
python3 -m pip install --user --quiet uv && \
{ [ -e .venv ] || python3 -m uv venv --seed --python 3.11 .venv; } && \
bash launch/setup_env.sh tpu && bash launch/setup_env.sh gcs"
    ;;
  train)
    words=$(printf '%q ' "$@")
    on all all "cd iv3jax || exit; \
if [ -s train.pid ] && kill -0 \$(cat train.pid); then echo 'it is running; stop it first' >&2; exit 1; fi; \
export JAX_COMPILATION_CACHE_DIR=\$PWD/.cache/jax; \
nohup .venv/bin/iv3 train $words>>train.log 2>&1 </dev/null & echo \$! >train.pid"
    ;;
  log) on 0 0 "tail -n 100 -F iv3jax/train.log" ;;
  stop) on all all "kill -TERM \$(cat iv3jax/train.pid)" ;;
  *)
    echo "usage: NAME=… ZONE=… bash launch/tpu/run.sh [--dry-run] install|train|log|stop" >&2
    exit 2
    ;;
esac
