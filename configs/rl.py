"""Stage 3, rule-based reinforcement learning: the model looks, answers, and learns from its reward (SPEC §6).

    iv3 train --config rl --out runs/rl init=runs/long
    iv3 train --config rl:tiny --out runs/rl-tiny init=runs/traces-tiny     the same stage on a CPU, minutes

GSPO with the KL to the model that the run begins with. Published are the method, the rewards' kind and the
numbers of questions; group, clip, KL weight and learning rate are practice elsewhere. Questions are those of
the synthetic tasks. The tower is frozen: a rollout looks at videos that were encoded before. On 64 chips each
has one question and eight rollouts of it at a time; four steps learn from them.
"""

import ml_collections

TINY = ("seconds=96", "shown=1")
"""Of the tiny twin: so long that one look for as many tokens misses most of it."""

REWARD = dict(iou=1.0, exact=1.0, format=0.1, evidence=0.2, step=0.01)


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The experiment; `tiny` is its twin for the tiny model."""
    if variant == "tiny":
        return _tiny()
    if variant is not None:
        raise ValueError(f"configs/rl.py has no variant {variant!r}, only 'tiny'")
    config = ml_collections.ConfigDict()
    config.stage = "rl"
    config.preset = "internvideo3_8b"
    config.steps = 400
    config.rows = 64
    config.accumulate = 2
    config.length = 16384
    config.dtype = "bfloat16"
    config.remat = "full"
    config.frozen = ("model.visual.*",)
    config.mesh = dict(data=1, fsdp=0, context=1, tensor=1)
    config.optimizer = dict(kind="adamw", learning_rate=1e-6, schedule="cosine", warmup=0.03)
    config.checkpoint = dict(every=20, keep=2)
    config.collect = dict(prompts=64, group=8, attempts=3, frames=32)
    config.rollout = dict(
        steps=8,
        budget=8192,
        slots=512,
        grammar=dict(thought_tokens=128, text_tokens=32, answer_tokens=32, tools=("zoom", "crop", "answer")),
        tools=dict(frames=16),
    )
    config.reward = dict(weights=REWARD)
    config.traces = dict(every=20)
    config.data = dict(sources=_tasks("seconds=64,256"))
    return config


def _tasks(seconds: str) -> tuple[dict, ...]:
    return (
        dict(kind="task:chase", weight=1.0, name="chase1", options=(seconds,)),
        dict(kind="task:chase", weight=1.0, name="chase2", options=(seconds, "hops=2")),
        dict(kind="task:ground", weight=1.0, options=(seconds,)),
    )


def _tiny() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.stage = "rl"
    config.preset = "tiny"
    config.steps = 120
    config.rows = 32
    config.length = 320
    config.scan_layers = False
    config.frozen = ("model.visual.*",)
    config.mesh = dict(data=0)
    config.optimizer = dict(kind="adamw", learning_rate=1e-4, schedule="cosine", warmup=0.03)
    config.collect = dict(prompts=16, group=8, attempts=2, frames=2)
    config.rollout = dict(
        steps=5,
        budget=256,
        slots=16,
        patience=0.8,
        grammar=dict(thought_tokens=8, text_tokens=4, answer_tokens=4, tools=("zoom", "answer")),
        tools=dict(frames=3),
    )
    config.reward = dict(weights=REWARD)
    config.traces = dict(every=20)
    config.data = dict(
        sources=(
            dict(kind="task:chase", name="chase1", options=TINY),
            dict(kind="task:chase", name="chase2", options=("hops=2", *TINY)),
        )
    )
    return config
