"""Stage 2, fine-tuning an 8B on questions about short, then long videos (SPEC §6).

    iv3 train --config sft:short --out runs/short init=runs/cpt       packs of 65 536 tokens, 128 of them
    iv3 train --config sft:long --out runs/long init=runs/short       packs of 262 144 tokens, 8 of them
    iv3 plan --config sft:long --topology v5p-128     whether it fits, before it costs anything
    iv3 train --config sft:tiny_short --out runs/s                    the same stages on a CPU, minutes
    iv3 train --config sft:tiny_long --out runs/l init=runs/s

The long stage has fewer rows than chips: `fsdp` splits its 8 packs and `context` takes what is left, 8 chips
a pack on 64, where the authors had 4. Its videos have up to 2048 frames, at 4 a second, and four times the
pixels. The paper does not say how many tokens its sets hold: set `steps` to an epoch of yours.
"""

import ml_collections

from configs.cpt import SHORT

VARIANTS = ("short", "long", "tiny_short", "tiny_long")

TINY_SHORT = (
    dict(kind="task:read", weight=1.0, options=("varied=1",)),
    dict(kind="task:at", weight=1.0, options=SHORT),
    dict(kind="task:when", weight=2.0, options=SHORT),
    dict(kind="task:order", weight=1.0, options=("frames=16", "questions=3", "varied=1")),
)
LONG = ("seconds=16,64", "shown=2,7", "frames=128", "events=1", "varied=1")
TINY_LONG = (
    *(entry | dict(name=f"short {entry['kind']}") for entry in TINY_SHORT[:3]),
    dict(kind="task:at", weight=3.0, options=LONG),
    dict(kind="task:when", weight=3.0, options=LONG),
    dict(kind="task:count", weight=1.0, options=("frames=128", "varied=1")),
)


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The stage named by the variant, `short` unless one is; `tiny_short` and `tiny_long` are their twins."""
    variant = variant or "short"
    if variant not in VARIANTS:
        raise ValueError(f"configs/sft.py has no variant {variant!r}, only {', '.join(map(repr, VARIANTS))}")
    if variant.startswith("tiny_"):
        return _tiny(variant == "tiny_long")
    config = ml_collections.ConfigDict()
    config.preset = "internvideo3_8b"
    config.dtype = "bfloat16"
    config.remat = "full"
    config.reduction = "square"
    config.chunk_patches = 8192
    config.optimizer = dict(
        kind="adamw", learning_rate=3e-5, schedule="cosine", warmup=0.1, weight_decay=0.05
    )
    config.data = dict(
        sources=(dict(kind="internvideo3_meta", path="data/sft_short.json"),),
        fps=2.0,
        max_frames=768,
        image_pixels=(4 * 1024, 8192 * 256),
        workers=16,
    )
    config.checkpoint = dict(every=100, keep=2)
    if variant == "short":
        config.steps = 10000
        config.rows = 64
        config.accumulate = 2
        config.length = 65536
        config.chunks = 32
        config.mesh = dict(data=1, fsdp=64, context=0, tensor=1)
    else:
        config.steps = 20000
        config.rows = 8
        config.length = 262144
        config.chunks = 128
        config.mesh = dict(data=1, fsdp=8, context=0, tensor=1)
        config.optimizer.learning_rate = 1e-5
        config.data.update(
            sources=(dict(kind="internvideo3_meta", path="data/sft_long.json"),),
            fps=4.0,
            max_frames=2048,
            video_pixels=(4 * 4 * 1024, 4 * 32768 * 4 * 1024),
        )
    return config


def _tiny(long: bool) -> ml_collections.ConfigDict:
    """The short stage's rows are as pretraining's, the long one's row is eight times as long."""
    config = ml_collections.ConfigDict()
    config.preset = "tiny"
    config.steps = 100 if long else 200
    config.rows = 1 if long else 8
    config.length = 1920 if long else 240
    config.chunks = 160 if long else 20
    config.reduction = "square"
    config.mesh = dict(data=0)
    config.optimizer = dict(
        learning_rate=0.003 if long else 0.01, adam_learning_rate=0.001 if long else 0.003
    )
    # As `ask` writes prompts, and the digits' experiment.
    config.data = dict(sources=TINY_LONG if long else TINY_SHORT, add_vision_id=False)
    return config
