"""The cold start of the loop: fine-tuning on scripted traces, in which a faultless reader looks step by step.

    iv3 train --config traces --out runs/traces init=runs/long
    iv3 train --config traces:tiny --out runs/traces-tiny init=runs/s     the same on a CPU, minutes

A trace is an ordinary conversation; `configs/rl.py` goes on from here with the same overview and zooms. No
numbers stand in front of videos (`add_vision_id`), as in a rollout.
"""

import ml_collections


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The experiment; `tiny` is its twin for the tiny model."""
    if variant == "tiny":
        return _tiny()
    if variant is not None:
        raise ValueError(f"configs/traces.py has no variant {variant!r}, only 'tiny'")
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
            dict(kind="trace:chase", weight=1.0, name="chase1", options=("seconds=64,256", *shown)),
            dict(kind="trace:chase", weight=1.0, name="chase2", options=("seconds=64,256", "hops=2", *shown)),
            dict(kind="trace:ground", weight=1.0, options=("seconds=64,256", *shown)),
        ),
        add_vision_id=False,
        workers=16,
    )
    return config


def _tiny() -> ml_collections.ConfigDict:
    """Reading stays in the mixture, or it is lost; one look at a time comes before chains of them."""
    config = ml_collections.ConfigDict()
    config.preset = "tiny"
    config.steps = 800
    config.rows = 8
    config.length = 320
    config.chunks = 24
    config.reduction = "square"
    config.mesh = dict(data=0)
    config.optimizer = dict(learning_rate=0.01, adam_learning_rate=0.003)
    shown = ("seconds=96", "shown=1", "overview=4", "zoom=4")
    config.data = dict(
        sources=(
            dict(kind="task:read", weight=2.0),
            dict(kind="trace:at", weight=1.0, options=shown),
            dict(kind="trace:chase", weight=1.0, name="chase1", options=shown),
            dict(kind="trace:chase", weight=1.0, name="chase2", options=("hops=2", *shown)),
        ),
        add_vision_id=False,
    )
    return config
