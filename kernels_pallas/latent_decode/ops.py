"""latent_decode: absorbed M²LA attention of a few query tokens over the latent cache.

Here the arguments are checked and an implementation is chosen.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.choice import Version, no_float16, run
from kernels_pallas.latent_decode import gpu, tpu, xla
from kernels_pallas.latents import LARGEST, Latents, groups_of
from kernels_pallas.merge import merge

_FLOATS = ("float32", "bfloat16", "float16")


def latent_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latents: Latents,
    layer: jax.Array | int,
    query_slots: jax.Array,
    scale: float,
    *,
    logit_scale: jax.Array | None = None,
    page_table: jax.Array | None = None,
    splits: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax((q_latent·c + q_rope·k_rope) · scale) · c, the cache read once (SPEC §2, absorbed form).

    Products are taken in the wider of the queries' and the cache's dtype, in the queries' where the cache is
    quantised, and summed in fp32. Not differentiable: a cache is for inference.

    Args:
        q_latent: (B, T, H, r), the content query carried into latent space; T is one to a few.
        q_rope: (B, T, H, e), rotated.
        latents: the cache, stacked over layers; with a page table its second axis counts pages. Slots that
            nothing sees must hold finite numbers. Scales past the last group are not used: a TPU wants a
            multiple of 8 of them, or XLA copies the scales of a program's argument.
        layer: () int32, which layer of the stack. A layer outside of it is not looked for: the caller's scan
            counts them.
        query_slots: (B, T) int32. Query t of row b sees slots 0 … query_slots[b, t]; −1 sees nothing.
        scale: 1/sqrt(n+e); n cannot be seen from these shapes.
        logit_scale: (L, B, G, S) fp32, (L, pages, G, S) with a page table; H is a multiple of G. Multiplies
            the logits of head h at each slot, in group h // (H // G).
        page_table: (B, P) int32. Slot s of row b lies in page page_table[b, s // S] at s % S. Entries past
            the last slot that is seen are not used.
        splits: parts of the context that are worked on independently; None lets the chip decide.
        implementation: None, "xla", "tpu" or "gpu".

    Returns:
        out (B, T, H, r) fp32, and the natural log-sum-exp of the scaled logits (B, T, H) fp32. Where nothing
        is seen they are 0 and −inf.

    Raises:
        ValueError: an argument's shape or dtype does not fit, or the implementation named does not take it.
    """
    _check(q_latent, q_rope, latents, layer, query_slots, logit_scale, page_table, splits)
    slots = latents.capacity * (1 if page_table is None else page_table.shape[1])
    dtype = jnp.promote_types(q_latent.dtype, q_rope.dtype)
    if not latents.quantized:
        dtype = jnp.promote_types(dtype, latents.values.dtype)
    rows, tokens, heads, _ = q_latent.shape
    narrow = no_float16("q_latent", q_latent) or no_float16("latents.values", latents.values)
    limits = (latents, q_rope.shape[-1], (rows, tokens, heads), page_table)
    versions = {
        "xla": Version(partial(xla.latent_decode, scale=scale)),
        "tpu": Version(
            partial(tpu.latent_decode, scale=scale, splits=splits), narrow or tpu.refusal(*limits)
        ),
        "gpu": Version(
            partial(gpu.latent_decode, scale=scale, splits=splits), narrow or gpu.refusal(*limits)
        ),
    }
    outs, lses = run(
        "latent_decode",
        implementation,
        versions,
        q_latent.astype(dtype),
        q_rope.astype(dtype),
        latents,
        jnp.asarray(layer, jnp.int32),
        jnp.minimum(query_slots, slots - 1),
        logit_scale,
        page_table,
    )
    return merge(outs, lses)


def _check(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latents: Latents,
    layer: jax.Array | int,
    query_slots: jax.Array,
    logit_scale: jax.Array | None,
    page_table: jax.Array | None,
    splits: int | None,
) -> None:
    """Raises ValueError, naming the argument and what is accepted."""

    def wrong(name: str, got: object, accepted: object) -> ValueError:
        return ValueError(f"latent_decode: {name} is {got}; accepted is {accepted}")

    def described(x: jax.Array) -> str:
        return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"

    def expect(name: str, x: jax.Array, shape: tuple[int | str, ...], *dtypes: str) -> None:
        sizes = zip(x.shape, shape, strict=False)
        fits = x.ndim == len(shape) and all(isinstance(n, str) or m == n for m, n in sizes)
        if not fits or jnp.dtype(x.dtype).name not in dtypes:
            inner = ", ".join(map(str, shape))
            raise wrong(name, described(x), f"({inner}) of {' or '.join(dtypes)}")

    expect("q_latent", q_latent, ("B", "T", "H", "r"), *_FLOATS)
    rows, tokens, heads, rank = q_latent.shape
    if 0 in q_latent.shape:
        raise wrong("q_latent", described(q_latent), "no empty axis")
    expect("q_rope", q_rope, (rows, tokens, heads, "e"), *_FLOATS)
    rope_dim = q_rope.shape[-1]
    values, scale, k_rope = latents
    if (scale is None) != (k_rope is None):
        raise wrong("latents", "one of scale and k_rope", "both (quantised) or neither")
    owners: int | str = rows if page_table is None else "pages"
    if scale is None or k_rope is None:
        expect("latents.values", values, ("L", owners, "S", rank + rope_dim), *_FLOATS)
    else:
        expect("latents.values", values, ("L", owners, "S", rank), *LARGEST)
        stack, owned, capacity = values.shape[:3]
        expect("latents.scale", scale, (stack, owned, "groups", capacity), "float32")
        if scale.shape[2] < groups_of(rank):
            raise wrong("latents.scale", f"of {scale.shape[2]} groups", f"at least {groups_of(rank)}")
        expect("latents.k_rope", k_rope, (stack, owned, capacity, rope_dim), "bfloat16", "float32")
    if values.shape[2] == 0:
        raise wrong("latents.values", described(values), "at least one slot")
    if not jnp.issubdtype(jnp.result_type(layer), jnp.integer) or jnp.ndim(layer) != 0:
        raise wrong("layer", f"{jnp.result_type(layer)}{list(jnp.shape(layer))}", "one integer")
    expect("query_slots", query_slots, (rows, tokens), "int32")
    if logit_scale is not None:
        stack, owned, capacity = values.shape[:3]
        expect("logit_scale", logit_scale, (stack, owned, "G", capacity), "float32")
        if logit_scale.shape[2] == 0 or heads % logit_scale.shape[2]:
            raise wrong("logit_scale", f"of {logit_scale.shape[2]} groups", f"a divisor of {heads} heads")
    if page_table is not None:
        expect("page_table", page_table, (rows, "P"), "int32")
        if page_table.shape[1] == 0:
            raise wrong("page_table", described(page_table), "at least one page a row")
    if splits is not None and splits < 1:
        raise wrong("splits", splits, "None or at least 1")
