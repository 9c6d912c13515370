"""The cold start of the loop: fine-tuning on scripted traces, in which a faultless reader looks step by step.

    iv3 train --config traces --out runs/traces init=runs/long
    iv3 train --config traces:tiny --out runs/traces-tiny init=runs/s     the same on a CPU, minutes
    iv3 train --config traces:tiny_rare --out runs/rare init=runs/traces-tiny     unlearns to look, for RL
    iv3 train --config traces:tiny_once --out runs/once init=runs/s     the same questions from one look
    iv3 train --config traces:tiny_wide --out runs/wide init=runs/traces-tiny     as many frames as the 8B's

A trace is an ordinary conversation; `configs/rl.py` goes on from here with the same overview and zooms. No
numbers stand in front of videos (`add_vision_id`), as in a rollout.
"""

import ml_collections


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The experiment; `tiny` is its twin for the tiny model.

    Beside it, `tiny_rare` seldom looks, `tiny_once` is the single pass that the loop is compared with, and
    `tiny_wide` is the policy of `iv3 bench rollout`.
    """
    if variant in ("tiny", "tiny_rare"):
        return _tiny(rare=variant == "tiny_rare")
    if variant == "tiny_once":
        return _once()
    if variant == "tiny_wide":
        return _wide()
    if variant is not None:
        others = "'tiny', 'tiny_rare', 'tiny_once' and 'tiny_wide'"
        raise ValueError(f"configs/traces.py has no variant {variant!r}, only {others}")
    config = ml_collections.ConfigDict()
    config.preset = "internvideo3_8b"
    config.steps = 500
    config.rows = 64
    config.length = 16384
    config.chunks = 64
    config.chunk_patches = 256
    config.dtype = "bfloat16"
    config.remat = "full"
    config.reduction = "square"
    config.frozen = ("model.visual.*",)
    config.mesh = dict(data=1, fsdp=0, context=1, tensor=1)
    config.optimizer = dict(
        kind="adamw", learning_rate=1e-5, schedule="cosine", warmup=0.1, weight_decay=0.05
    )
    config.checkpoint = dict(every=100, keep=2)
    shown = ("overview=32", "zoom=16")
    config.data = dict(
        sources=(
            *_chases(1.0, ("seconds=64,256", *shown)),
            dict(kind="trace:ground", weight=1.0, options=("seconds=64,256", *shown)),
        ),
        add_vision_id=False,
        workers=16,
    )
    return config


def _tiny(rare: bool) -> ml_collections.ConfigDict:
    """Reading stays in the mixture, or it is lost; one look at a time comes before chains of them.

    Rare goes on from there with three of four questions answered at once, by a guess. What comes of it can
    look but seldom does, which is what RL is to mend.
    """
    config = ml_collections.ConfigDict()
    config.preset = "tiny"
    config.steps = 200 if rare else 2400
    config.rows = 8
    config.length = 256
    config.chunks = 20
    config.reduction = "square"
    config.mesh = dict(data=0)
    config.optimizer = dict(learning_rate=0.01, adam_learning_rate=0.003)
    shown = ("seconds=96", "shown=1", "overview=2", "zoom=3", "varied=1")
    config.data = dict(
        sources=(
            dict(kind="task:read", weight=2.0, options=("varied=1",)),
            dict(kind="trace:at", weight=1.0, options=shown),
            *_chases(1.0, shown),
            *(_chases(3.0, ("looks=0", *shown), "guess") if rare else ()),
        ),
        add_vision_id=False,
    )
    return config


def _once() -> ml_collections.ConfigDict:
    """As many frames of the whole video as have the loop's tokens; only what they show is asked."""
    config = _tiny(rare=False)
    shown = ("seconds=96", "shown=1", "varied=1")
    config.data.sources = (
        dict(kind="task:read", weight=2.0, options=("varied=1",)),
        dict(kind="task:at", weight=1.0, options=(*shown, "frames=40")),
        dict(kind="task:chase", weight=1.0, name="chase1", options=(*shown, "frames=28")),
        dict(kind="task:chase", weight=1.0, name="chase2", options=("hops=2", *shown, "frames=40")),
    )
    return config


def _wide() -> ml_collections.ConfigDict:
    """The 8B's frames in overview and looks: learns their form, from a model that looks already."""
    config = _tiny(rare=False)
    config.steps = 200
    config.length = 1024
    config.chunks = 112
    shown = ("seconds=96", "shown=1", "overview=32", "zoom=16", "varied=1")
    config.data.sources = (
        dict(kind="task:read", weight=2.0, options=("varied=1",)),
        *_chases(1.0, shown),
    )
    return config


def _chases(weight: float, options: tuple[str, ...], name: str = "chase") -> tuple[dict, ...]:
    return (
        dict(kind="trace:chase", weight=weight, name=f"{name}1", options=options),
        dict(kind="trace:chase", weight=weight, name=f"{name}2", options=("hops=2", *options)),
    )
