"""Fine-tuning an 8B on eight H100s: only low-rank additions to the linear layers of the decoder are trained.

    iv3 train --config lora --out runs/lora init=FOLDER
    iv3 plan --config lora --topology h100x8              whether it fits, before it costs anything
    iv3 train --config lora:tiny --out runs/lora-tiny     the same on a CPU, minutes

The base stays in bf16, an eighth of it on each GPU: 2.4 GB, so it need not be quantised. `weights=nf4` stores
it in a quarter of that, for fewer or smaller GPUs. A batch is 16 packs of 32 768 tokens. The numbers of rank
and learning rate are QLoRA's (arXiv 2305.14314), the rest is that of stage 2.
"""

import ml_collections

TARGETS = (
    "model.language_model.layers.*.self_attn.*",
    "model.language_model.layers.*.mlp.*",
)


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The experiment; `tiny` is its twin for the tiny model."""
    if variant == "tiny":
        return _tiny()
    if variant is not None:
        raise ValueError(f"configs/lora.py has no variant {variant!r}, only 'tiny'")
    config = ml_collections.ConfigDict()
    config.preset = "internvideo3_8b"
    config.steps = 1000
    config.rows = 8
    config.accumulate = 2
    config.length = 32768
    config.chunks = 16
    config.chunk_patches = 8192
    config.dtype = "bfloat16"
    config.remat = "full"
    config.reduction = "square"
    config.lora = dict(rank=64, alpha=16.0, targets=TARGETS)
    config.mesh = dict(data=1, fsdp=0, context=1, tensor=1)
    config.optimizer = dict(kind="adamw", learning_rate=2e-4, schedule="cosine", warmup=0.03)
    config.checkpoint = dict(every=100, keep=2)
    config.data = dict(
        sources=(dict(kind="internvideo3", path="data/train.jsonl", media_root="data/media"),),
        fps=2.0,
        max_frames=512,
        image_pixels=(4 * 1024, 8192 * 256),
        workers=16,
    )
    return config


def _tiny() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.preset = "tiny"
    config.steps = 200
    config.rows = 8
    config.length = 240
    config.chunks = 20
    config.lora = dict(rank=8, alpha=16.0, targets=TARGETS)
    config.mesh = dict(data=0)
    config.optimizer = dict(kind="adamw", learning_rate=0.003, schedule="cosine", warmup=0.03)
    config.data = dict(
        sources=(
            dict(kind="task:read", weight=1.0),
            dict(kind="task:order", weight=1.0, options=("frames=16", "questions=3")),
        )
    )
    return config
