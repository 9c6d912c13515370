#!/usr/bin/env bash
# Asks Google Cloud for a TPU pod, as a queued resource, or gives it back. run.sh then trains on it.
#
#   NAME=short ZONE=us-east5-a TYPE=v5p-128 bash launch/tpu/create.sh           waits in the cloud's queue
#   NAME=short ZONE=us-east5-a bash launch/tpu/create.sh --delete               whatever state it is in
#   … bash launch/tpu/create.sh --dry-run [--delete]                            prints the commands only
#
# Needs gcloud, logged in, with a project set.

NAME=${NAME:?what the pod is to be called}
ZONE=${ZONE:?a zone that has the chips, for example us-east5-a}
TYPE=${TYPE:-v5p-128}        # v5litepod-N and v6e-N count chips, v5p-N counts cores: v5p-128 is 64 chips
SLICES=${SLICES:-1}          # pods of that type, joined over the data center's network
SPOT=${SPOT:-}               # 1: cheaper, and taken away at any time

set -euo pipefail

dry_run='' delete=''
for word in "$@"; do
  case $word in
    --dry-run) dry_run=1 ;;
    --delete) delete=1 ;;
    *) echo "$word is neither --dry-run nor --delete" >&2; exit 2 ;;
  esac
done

run() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

if [ -n "$delete" ]; then
  run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
  exit
fi

# The operating system's image goes with the chip.
case $TYPE in
  v5p-*) version=v2-alpha-tpuv5 ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) echo "TYPE=$TYPE is none of v5p-N, v5litepod-N, v6e-N" >&2; exit 2 ;;
esac

nodes=(--node-id="$NAME")
[ "$SLICES" -eq 1 ] || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
run gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
  --runtime-version="$version" "${nodes[@]}" ${SPOT:+--spot}
run gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" "--format=value(state.state)"
