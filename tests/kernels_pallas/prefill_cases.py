"""Generated caches and chunks of queries that every version of latent_prefill is tested on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.latents import Latents, quantize, scale_rows

LAYERS, LAYER = 3, 1


@dataclass(frozen=True)
class Case:
    """Sizes as in kernels_pallas/latent_prefill/ops.py.

    Rows in turn: a chunk at the start of the context, one that ends at the capacity, one whose last tokens
    find no room (their slots lie past the capacity), padding only, a chunk followed by padding.
    """

    tokens: int
    slots: int
    rank: int
    rows: int = 5
    heads: int = 2
    n: int = 8
    e: int = 4
    v: int = 6
    groups: int = 0
    stored: str = "float32"

    def __str__(self) -> str:
        sizes = f"T{self.tokens}-S{self.slots}-B{self.rows}-H{self.heads}-r{self.rank}"
        return f"{self.stored}-{sizes}" + (f"-G{self.groups}" if self.groups else "")


CASES = (
    Case(tokens=33, slots=70, rank=130, groups=2, heads=4),
    Case(tokens=21, slots=40, rank=256, stored="int8", groups=1),
    Case(tokens=1, slots=1, rank=128),
    Case(tokens=20, slots=53, rank=1024, v=16),
    Case(tokens=9, slots=37, rank=24, heads=64, n=4, v=4),
    Case(tokens=40, slots=64, rank=200, stored="float8_e4m3fn"),
    Case(tokens=17, slots=48, rank=896, stored="int8", n=16),
)

LARGE = Case(tokens=65, slots=300, rank=256, rows=5, n=128, e=128, v=128, stored="bfloat16")


def arguments_of(case: Case, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple:
    """(query, latents, layer, kernel, query_slots, logit_scale); other layers of a plain cache are NaN."""
    rng = np.random.default_rng(case.tokens)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    shape = (LAYERS, case.rows, case.slots)
    values = normal(*shape, case.rank + case.e)
    if case.stored in ("float32", "bfloat16"):
        others = (jnp.arange(LAYERS) != LAYER)[:, None, None, None]
        latents = Latents(jnp.where(others, jnp.nan, values).astype(case.stored))
    else:
        codes, scale = quantize(values[..., : case.rank], case.stored)
        scale = jnp.pad(scale, [(0, 0)] * 3 + [(0, scale_rows(case.rank) - scale.shape[-1])])
        latents = Latents(codes, jnp.swapaxes(scale, -1, -2), values[..., case.rank :].astype(dtype))
    kernel = (normal(case.heads, case.n + case.v, case.rank) / case.rank**0.5).astype(dtype)
    logit_scale = None
    if case.groups:
        uniform = rng.uniform(0.3, 2.0, (LAYERS, case.rows, case.groups, case.slots))
        logit_scale = jnp.asarray(uniform, jnp.float32)
    query = normal(case.rows, case.tokens, case.heads, case.n + case.e).astype(dtype)
    return query, latents, jnp.int32(LAYER), kernel, jnp.asarray(_slots(case)), logit_scale


def _slots(case: Case) -> np.ndarray:
    slots = np.arange(case.tokens)[None].repeat(case.rows, axis=0)
    starts = (0, case.slots - case.tokens, case.slots - case.tokens // 2, 0, case.slots // 3)
    for row, start in enumerate(starts[: case.rows]):
        slots[row] += start
    slots = np.minimum(slots, case.slots)
    if case.rows == len(starts):
        slots[3] = -1
        slots[4, case.tokens // 2 :] = -1
    return slots.astype(np.int32)
