"""A first model from nothing: reads handwritten two-digit numbers in video and says when they are shown.

    iv3 train --config digits --out runs/digits
    iv3 train --config digits --out runs/more init=runs/digits/model     goes on from there

The recipe that learns this in minutes: Muon on the matrices; short videos of one number first, and some of
them kept in the mixture after, or reading is lost again; then longer videos with questions about when.
"""

import ml_collections


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The experiment; `smoke` is the same for a few steps, to see that it runs."""
    config = ml_collections.ConfigDict()
    config.preset = "tiny"
    config.steps = 1250
    config.rows = 8
    config.length = 240
    config.chunks = 20
    config.optimizer = dict(learning_rate=0.01, adam_learning_rate=0.003)
    if variant == "smoke":
        config.steps = 4
    elif variant is not None:
        raise ValueError(f"configs/digits.py has no variant {variant!r}, only 'smoke'")
    return config
