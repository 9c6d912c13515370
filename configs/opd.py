"""Stage 4, on-policy distillation: the model answers in its own words, a teacher says how likely they are.

    iv3 train --config opd --out runs/opd init=runs/rl distill.teacher=FOLDER
    iv3 train --config opd:tiny --out runs/opd-tiny init=runs/rl-tiny     the same stage on a CPU, minutes

The reverse KL on the student's own rollouts, mean over tokens (SPEC §6). The paper's teacher is a
Qwen3-235B; here it is any checkpoint with the student's vocabulary, larger ones and ones with grouped keys
too, given as `distill.teacher`. Without one it is the model itself as the run began, which sees more frames
of the video than the student (four times as many, `tiny` twice) before it reads the answer. The tower is
frozen: a rollout looks at videos that were encoded before.

    iv3 data choose --config opd --out questions.jsonl init=runs/rl       questions of the paper's gap filter
"""

import ml_collections

from configs import rl


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The experiment; `tiny` is its twin for the tiny model."""
    if variant not in (None, "tiny"):
        raise ValueError(f"configs/opd.py has no variant {variant!r}, only 'tiny'")
    config = rl.get_config(variant)
    config.stage = "distill"
    config.collect.attempts = 1
    if variant == "tiny":
        config.optimizer.learning_rate = 1e-3
        config.collect.update(prompts=32, group=1)
        config.distill = dict(kind="exact", frames=16, room=144, trust=0.05)
    else:
        config.steps = 200
        config.accumulate = 1
        config.collect.update(prompts=64, group=1)
        config.rollout.slots = 64
        # The teacher is not in the step, only its most likely tokens are.
        config.distill = dict(kind="top_k", top=64, frames=128, room=12288)
    return config
