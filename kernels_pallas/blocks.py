"""Block sizes: one table per chip, a heuristic of each operation's own for what is not in it.

The table holds what was chosen for the released model's sizes; `iv3 bench tune` measures an operation's
candidates on the device at hand and prints their rows.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from kernels_pallas.choice import chip

Blocks = dict[str, int]

_V5: dict[tuple[str, str], Blocks] = {
    ("latent_compress", "dim4096 rank896 rope128 bfloat16"): {"tokens": 256},
    ("latent_compress_into", "dim4096 rank896 rope128 bfloat16 bfloat16"): {
        "window": 256,
        "scale_window": 128,
    },
    ("latent_decode", "queries32 rank896 rope128 bfloat16"): {"block": 2048, "chunk": 512},
    ("latent_decode", "queries32 rank896 rope128 int8"): {"block": 2048, "chunk": 512},
    ("latent_prefill", "heads32 rank896 tokens1024 bfloat16 bfloat16"): {"q": 2048, "k": 512, "step": 512},
    ("latent_attention_tpu", "heads32 n128 e128 v128 bfloat16"): {
        f"{kernel}_{part}": 512 if part == "compute" else 1024
        for kernel in ("forward", "dq", "dkv")
        for part in ("queries", "keys", "compute")
    },
}

TABLE: dict[str, dict[tuple[str, str], Blocks]] = {
    "v5e": _V5,
    "v5p": _V5,
    "h100": {
        ("latent_compress", "dim4096 rank896 rope128 bfloat16"): {"tokens": 64, "columns": 128, "depth": 64},
        ("latent_decode", "queries32 rank896 rope128 bfloat16"): {
            "block": 32,
            "queries": 32,
            "warps": 8,
            "stages": 3,
        },
        ("latent_decode", "queries32 rank896 rope128 int8"): {
            "block": 16,
            "queries": 32,
            "warps": 8,
            "stages": 4,
        },
        ("latent_attention_gpu", "n128 e128 v128 bfloat16"): {
            "forward_q": 128,
            "forward_k": 64,
            "dq_q": 64,
            "dq_k": 64,
            "dkv_q": 64,
            "dkv_k": 64,
        },
    },
}
"""Chip → (operation, its key for the shapes) → block sizes, of the released model's sizes.

Each compiles for its chip within its memory (the tests of compiled kernels); none has been timed yet.
"""

asked: dict[str, tuple[str, Blocks]] = {}
"""Operation → the key it last asked with and what it was given: where the tuner begins."""

_override: ContextVar[dict[str, Blocks] | None] = ContextVar("override", default=None)


def pick(op: str, key: str, heuristic: Mapping[str, int]) -> Blocks:
    """The block sizes of an operation: overridden, from the chip's table, or its heuristic's.

    Args:
        op: name of the operation.
        key: the shapes that block sizes depend on, as the operation writes them, for example
            "heads32 rank896 rope128 bfloat16".
        heuristic: every block size and what the operation would choose itself.

    Raises:
        ValueError: an override or a row of the table names a block size that the operation does not have.
    """
    chosen = TABLE.get(chip().name, {}).get((op, key), {}) | (_override.get() or {}).get(op, {})
    if unknown := set(chosen) - set(heuristic):
        raise ValueError(f"{op}: unknown block size {sorted(unknown)[0]!r}; it has {', '.join(heuristic)}")
    asked[op] = (key, dict(heuristic) | chosen)
    return asked[op][1]


@contextmanager
def override(op: str, **sizes: int) -> Iterator[None]:
    """Inside, an operation traced anew takes these block sizes: for tests and the tuner."""
    token = _override.set((_override.get() or {}) | {op: sizes})
    try:
        yield
    finally:
        _override.reset(token)
