"""latent_prefill: M²LA of a chunk of new tokens over the latent cache that they were written to."""

import jax
import jax.numpy as jnp

from kernels_pallas.choice import Version, no_float16, run
from kernels_pallas.latent_prefill import gpu, tpu
from kernels_pallas.latent_prefill.xla import latent_prefill_xla
from kernels_pallas.latents import LARGEST, Latents, scale_rows

_FLOATS = ("float32", "bfloat16", "float16")


def latent_prefill(
    query: jax.Array,
    latents: Latents,
    layer: jax.Array | int,
    kernel: jax.Array,
    query_slots: jax.Array,
    *,
    logit_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax((q_nope·k_nope + q_rope·k_rope) / sqrt(n+e)) · value, [k_nope ‖ value] = kernel · c (SPEC §2).

    Latents are expanded block by block when they are looked at; slots after the last one that a row sees cost
    nothing. Products are in query's dtype, sums and the softmax in fp32. Not differentiable: a cache is for
    inference.

    Args:
        query: (B, T, H, n+e), [q_nope ‖ rotated q_rope], of many new tokens.
        latents: the cache, stacked over layers, the new tokens' latents already in it.
        layer: () int32, which layer of the stack.
        kernel: (H, n+v, r), from a latent to each head's [k_nope ‖ value].
        query_slots: (B, T) int32. Query t of row b sees slots 0 … query_slots[b, t]; −1 sees nothing, and one
            past the capacity sees all.
        logit_scale: (L, B, G, S) fp32, H a multiple of G, or None. Multiplies the logits of head h at each
            slot, in group h // (H // G).
        implementation: None, "xla", "tpu" or "gpu".

    Returns:
        out (B, T, H, v) in query's dtype, and the natural log-sum-exp of the logits (B, T, H) fp32, with
        which parts of a context are merged. Where nothing is seen they are 0 and −inf.

    Raises:
        ValueError: an argument's shape or dtype does not fit, or the implementation named does not take it.
    """
    rope_dim = _check(query, latents, layer, kernel, query_slots, logit_scale)
    narrow = no_float16("query", query) or no_float16("latents.values", latents.values)
    versions = {
        "xla": Version(latent_prefill_xla),
        "tpu": Version(tpu.latent_prefill_tpu, narrow or tpu.refusal(query, latents, kernel, rope_dim)),
        "gpu": Version(gpu.latent_prefill_gpu, narrow or gpu.refusal(query, kernel, rope_dim)),
    }
    layer = jnp.asarray(layer, jnp.int32)
    return run(
        "latent_prefill", implementation, versions, query, latents, layer, kernel, query_slots, logit_scale
    )


def _check(
    query: jax.Array,
    latents: Latents,
    layer: jax.Array | int,
    kernel: jax.Array,
    query_slots: jax.Array,
    logit_scale: jax.Array | None,
) -> int:
    """e; raises ValueError naming the argument and what is accepted."""

    def require(holds: bool, name: str, x: jax.Array, accepted: str) -> None:
        if not holds:
            raise ValueError(
                f"latent_prefill: {name} is {x.dtype.name}{list(x.shape)}; accepted is {accepted}"
            )

    require(query.ndim == 4 and query.dtype.name in _FLOATS, "query", query, "(B, T, H, n+e) floats")
    rows, tokens, heads, width = query.shape
    good = kernel.ndim == 3 and kernel.shape[0] == heads and kernel.dtype.name in _FLOATS
    require(good, "kernel", kernel, f"(H, n+v, r) floats with H {heads}")
    both, rank = kernel.shape[1:]
    values, scale, k_rope = latents
    require(
        values.ndim == 4 and values.shape[1] == rows, "latents.values", values, f"(L, B, S, …) with B {rows}"
    )
    layers, _, slots, stored = values.shape
    if scale is None:
        good = values.dtype.name in _FLOATS and stored > rank
        require(good, "latents.values", values, f"(L, B, S, r+e) floats with r {rank} (the kernel's)")
        rope_dim = stored - rank
    else:
        good = values.dtype.name in LARGEST and stored == rank
        require(good, "latents.values", values, f"(L, B, S, r) {' or '.join(LARGEST)} with r {rank}")
        shape = (layers, rows, scale_rows(rank), slots)
        require(
            scale.shape == shape and scale.dtype == jnp.float32,
            "latents.scale",
            scale,
            f"float32{list(shape)}",
        )
        if k_rope is None:
            raise ValueError(
                "latent_prefill: latents.k_rope is None; a quantised cache needs (L, B, S, e) floats"
            )
        good = k_rope.shape[:3] == values.shape[:3] and k_rope.ndim == 4 and k_rope.dtype.name in _FLOATS
        require(good, "latents.k_rope", k_rope, f"{[layers, rows, slots, 'e']} floats")
        rope_dim = k_rope.shape[-1]
    n = width - rope_dim
    require(
        0 < n < both, "query", query, f"a last axis n+e with e {rope_dim} (the cache's) and n below {both}"
    )
    good = query_slots.shape == (rows, tokens) and jnp.issubdtype(query_slots.dtype, jnp.integer)
    require(good, "query_slots", query_slots, f"int32{[rows, tokens]}")
    if jnp.ndim(layer) != 0:
        raise ValueError(f"latent_prefill: layer has shape {list(jnp.shape(layer))}; accepted is a scalar")
    if logit_scale is not None:
        good = logit_scale.ndim == 4 and logit_scale.dtype == jnp.float32
        good = good and logit_scale.shape[:2] == (layers, rows) and logit_scale.shape[3] == slots
        good = good and logit_scale.shape[2] > 0 and heads % logit_scale.shape[2] == 0
        accepted = f"float32{[layers, rows, 'G', slots]} with H {heads} a multiple of G"
        require(good, "logit_scale", logit_scale, accepted)
    return rope_dim
