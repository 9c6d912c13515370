#!/usr/bin/env bash
# The same on Google Kubernetes Engine with xpk (pip install xpk): a cluster with TPU slices, and a run in it that
# Kubernetes starts again.
#
#   CLUSTER=mine ZONE=us-east5-a PROJECT=p TYPE=v5p-128 bash launch/tpu/xpk.sh cluster [xpk's options]
#   … bash launch/tpu/xpk.sh storage                    once: a Filestore disk that every run sees as /runs
#   … NAME=short bash launch/tpu/xpk.sh train --config sft:short --out /runs/short [key=value …]
#   … NAME=short bash launch/tpu/xpk.sh stop
#   … bash launch/tpu/xpk.sh --dry-run …                prints the commands only
#
# How chips are paid for is one of xpk's options, after `cluster`: --spot, --on-demand or --reservation=….

CLUSTER=${CLUSTER:?the name of the cluster}
ZONE=${ZONE:?a zone that has the chips}
PROJECT=${PROJECT:?the project that pays}
TYPE=${TYPE:-v5p-128}
SLICES=${SLICES:-1}
RESTARTS=${RESTARTS:-100}

set -euo pipefail
cd "$(dirname "$0")/../.."

dry_run=''
[ "${1:-}" != --dry-run ] || { dry_run=1; shift; }
action=${1:-}
[ $# -eq 0 ] || shift

run() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

place=(--cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT")
slices=(--tpu-type="$TYPE" --num-slices="$SLICES")
case $action in
  cluster) run xpk cluster create "${place[@]}" "${slices[@]}" "$@" ;;
  storage)
    run xpk storage create iv3-runs "${place[@]}" --type=gcpfilestore --auto-mount=true --mount-point=/runs \
      --readonly=false --size="${GIGABYTES:-2560}" --tier=BASIC_SSD --access-mode=ReadWriteMany --vol=default
    ;;
  train)
    # What is committed, without the folders that lie beside it here, becomes a layer over Python's image.
    source=build/xpk
    run rm -rf "$source"
    run mkdir -p "$source"
    run git archive --output="$source/source.tar" HEAD
    # exec: the shell in front of it passes on SIGTERM to this process alone. 75: saved, start again.
    run xpk workload create "${place[@]}" "${slices[@]}" --workload="${NAME:?what the run is called}" \
      --base-docker-image=python:3.11 --script-dir="$source" --max-restarts="$RESTARTS" \
      --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
      --command="tar -xf source.tar && bash launch/setup_env.sh tpu && bash launch/setup_env.sh gcs && \
exec .venv/bin/iv3 train $(printf '%q ' "$@")"
    ;;
  stop) run xpk workload delete "${place[@]}" --workload="${NAME:?what the run is called}" ;;
  *)
    echo "usage: CLUSTER=… ZONE=… PROJECT=… bash launch/tpu/xpk.sh [--dry-run] cluster|storage|train|stop" >&2
    exit 2
    ;;
esac
