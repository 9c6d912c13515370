"""Low-rank additions to linear layers (LoRA, arXiv 2106.09685): y = x·Wᵀ + alpha/rank · (x·Aᵀ)·Bᵀ.

Which layers and how large is here, and B·A; the parameters are `layers.Linear`'s, beside its kernel:

    lora_a   fp32 (rank, *in_shape), normal with 1/sqrt(inputs) as its standard deviation
    lora_b   fp32 (*out_shape, rank), zeros, so that a new addition changes nothing

They are fp32 whatever the kernel is stored in, so that small steps are not rounded away, and are cast like a
kernel. Patterns, files and merging are in `checkpoint/patterns.py` and `checkpoint/lora.py`.

Own code rather than qwix 0.1.8, because it finds weights by replacing jax.lax.dot_general and einsum while a
model runs, where it sees none of ours: they come to products cast and reshaped, M²LA's inside Pallas kernels.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from iv3jax.errors import UserError
from iv3jax.typing import Array

LEAVES = ("lora_a", "lora_b")
"""The names of the parameters."""


@dataclass(frozen=True)
class Lora:
    """What is added to a model (`Execution.lora`).

    Attributes:
        rank: of each addition; 0 adds none.
        alpha: additions are multiplied with alpha / rank.
        targets: the linear layers that get one, by their paths (`language_model/layers/mlp/up_proj`).
            Patterns of the checkpoint's names, such as `q_proj` or `model.language_model.*.mlp.*`, become
            paths by `checkpoint.patterns.resolve`, which `load` does.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank {self.rank} is negative; 0 adds nothing")
        if self.rank and not self.targets:
            raise UserError("lora.targets is empty; name linear layers, such as q_proj, or * for all")

    @property
    def scale(self) -> float:
        """The factor of each product."""
        return self.alpha / self.rank


def addition(a: Array, b: Array, scale: float) -> Array:
    """scale·B·A: (rank, *in) and (*out, rank) → (*out, *in) fp32."""
    product = jnp.tensordot(b, a, 1, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return scale * product
