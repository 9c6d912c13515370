#!/usr/bin/env bash
# From nothing to an answer about a long video, the whole way at tiny scale on real frames: a model with
# grouped keys → conversion → stages 1 and 2 → cold start of the loop → RL → distillation → an answer, with
# its steps. Needs no root and no accelerator.
#
#   bash launch/demo.sh               eight minutes on 2 cores; steps 1 and 3 start from small models that --full
#                                     made and the repository holds, and say so
#   bash launch/demo.sh --full        everything from nothing, the figures on 1000 videos; 40 minutes
#   bash launch/demo.sh --retrain     throws away what earlier ones made (may stand before --full)
#
# Stopped in the middle, the same command goes on.

set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup_env.sh demo

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
out=runs/demo full=
for argument; do
  case $argument in
    --retrain) rm -rf "$out" runs/demo-full runs/bench_stages ;;
    --full) full=yes out=runs/demo-full ;;
    *) echo "unknown argument $argument; there are --full and --retrain" >&2; exit 2 ;;
  esac
done
say() { printf '\n[demo] %s\n' "$*"; }
iv3() { "$PYTHON" -m iv3jax.cli "$@"; }
train() { # NAME EXPERIMENT [key=value …]: OUT/NAME/model, or goes on with it
  [ -d "$out/$1/model" ] || iv3 train --config "$2" --out "$out/$1" checkpoint.every=100 "${@:3}"
}

if [ "$full" ]; then
  say "1/7 training a tiny model with grouped keys on real clips with handwritten numbers in them"
  train source digits preset=tiny_gqa
  source=$out/source/model videos=1000 asked=100 parts=()
else
  say "1/7 a tiny model with grouped keys that reads numbers: launch/models/source, made by --full"
  source=launch/models/source videos=100 asked=30 parts=(--part whole)
fi

say "2/7 conversion to latent attention at half the cache, continued pretraining, short and long videos"
iv3 bench stages --model "$source" --samples "$asked" "${parts[@]}"
start=$(iv3 bench stages --model "$source" --samples "$asked" --part whole --json |
  "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["rows"][-1]["model"])')

say "3/7 cold start of the loop: scripted traces show how to look step by step"
if [ "$full" ]; then
  train teacher traces:tiny init="$start"
  teacher=$out/teacher/model distill=()
else
  echo "the model after 1200 steps of them (--full now takes 2400): launch/models/teacher"
  teacher=launch/models/teacher distill=(steps=40)
fi
echo "from there, mostly questions that are answered at once: it can look, but seldom does"
train cold traces:tiny_rare init="$teacher"

say "4/7 reinforcement learning on its own looks at long videos"
train rl rl:tiny init="$out/cold/model"

say "5/7 distillation on its own looks, from the model of step 3"
train opd opd:tiny init="$out/rl/model" distill.teacher="$teacher" distill.frames=0 distill.room=0 "${distill[@]}"

say "6/7 what each stage taught it, on clips and handwriting that training never saw"
iv3 bench tasks --samples "$videos" --model \
  "cold start=$out/cold/model,+ RL=$out/rl/model,+ distillation=$out/opd/model,teacher=$teacher"

say "7/7 a new video, and a question that one look cannot answer"
[ -d "$out/model" ] || cp -r "$out/opd/model" "$out/model"
shown=$("$PYTHON" -m iv3jax.data.tasks chase "$out/video.mp4" seconds=96 shown=1 hops=2)
echo "$out/video.mp4 shows, handwritten:"
tail -n +2 <<<"$shown"
IFS=$'\n' read -r first _ <<<"$shown"
question=${first% *}
echo "\$ iv3 ask $out/video.mp4 \"$question\" --model $out/model --loop rl:tiny"
iv3 ask "$out/video.mp4" "$question" --model "$out/model" --loop rl:tiny
echo "true answer: ${first##* }"

cat <<'TEXT'

[demo] What this model is: 1.1 million parameters, trained for minutes on one kind of task. It follows times
that are shown in a video of a minute and a half to the number that they lead to.
What it is not: it knows no other object, no speech and no other question, and it will answer those anyway,
wrongly. The same code runs the 8B shape; its weights are not part of this repository.
TEXT
