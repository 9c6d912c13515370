"""Stage 1, continued pretraining of a converted 8B: all weights get used to the latent attention (SPEC §6).

    iv3 train --config cpt --out runs/cpt init=FOLDER        FOLDER: what `iv3 convert` wrote
    iv3 plan --config cpt --topology v5p-128                 whether it fits, before it costs anything
    iv3 train --config cpt:tiny --out runs/cpt-tiny          the same stage on a CPU, minutes

A batch is 128 packs of 65 536 tokens. On 64 chips they are two rows a chip, one after the other; on more,
`context` takes what is left and splits each row. A chunk of the tower holds 8192 patches, a frame of
1920×1080, so a picture is scaled down to that and not to the authors' 64 times as many pixels, and a row
holds the patches of 65 536 vision tokens. 1600 steps are the paper's 13.5 B tokens once.
"""

import ml_collections

SHORT = ("seconds=5,16", "shown=1.5,5", "frames=32", "events=1", "varied=1")
"""Of the tiny twins: one number, shown for a while in a short video."""

TINY_PRETRAINING = (
    dict(kind="task:read", weight=1.0, options=("varied=1",)),
    dict(kind="task:at", weight=2.0, options=SHORT),
    dict(kind="task:when", weight=2.0, options=SHORT),
)


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The experiment; `tiny` is its twin for the tiny model."""
    if variant == "tiny":
        return _tiny()
    if variant is not None:
        raise ValueError(f"configs/cpt.py has no variant {variant!r}, only 'tiny'")
    config = ml_collections.ConfigDict()
    config.preset = "internvideo3_8b"
    config.steps = 1600
    config.rows = 64
    config.accumulate = 2
    config.length = 65536
    config.chunks = 32
    config.chunk_patches = 8192
    config.dtype = "bfloat16"
    config.remat = "full"
    config.reduction = "square"
    config.mesh = dict(data=1, fsdp=64, context=0, tensor=1)
    config.optimizer = dict(
        kind="adamw",
        learning_rate=2e-5,
        final_learning_rate=1e-6,
        schedule="cosine",
        warmup=0.03,
        weight_decay=0.05,
    )
    config.checkpoint = dict(every=100, keep=2)
    config.data = dict(
        sources=(dict(kind="internvideo3_meta", path="data/cpt.json"),),
        fps=2.0,
        max_frames=768,
        image_pixels=(4 * 1024, 8192 * 256),
        workers=16,
    )
    return config


def _tiny() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.preset = "tiny"
    config.steps = 300
    config.rows = 8
    config.length = 240
    config.chunks = 20
    config.mesh = dict(data=0)
    config.optimizer = dict(learning_rate=0.01, adam_learning_rate=0.003)
    # As `ask` writes prompts, and the digits' experiment.
    config.data = dict(sources=TINY_PRETRAINING, add_vision_id=False)
    return config
