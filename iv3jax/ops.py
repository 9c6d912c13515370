"""The one door between models and kernels_pallas: each operation on the ambient mesh, by the chosen version.

The kernels of M²LA see one device's part of everything (`sharding.split`). Where the sequence is split over
the mesh's context axis, devices exchange latents, r+e numbers a token, never keys and values; where a cache
is, each device looks at its own slots and the results are merged by their log-sum-exps.
"""

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

from iv3jax.errors import UserError
from iv3jax.sharding import axes_over, split
from iv3jax.typing import Array
from kernels_pallas.cached_attention import cached_attention
from kernels_pallas.choice import IMPLEMENTATIONS, ImplementationError, chip, log_line, taken
from kernels_pallas.latent_attention import ops as latent_attention_ops
from kernels_pallas.latent_compress import ops as latent_compress_ops
from kernels_pallas.latent_compress.ops import Affine
from kernels_pallas.latent_compress.xla import write_factors
from kernels_pallas.latent_decode import ops as latent_decode_ops
from kernels_pallas.latent_prefill import ops as latent_prefill_ops
from kernels_pallas.latents import Latents
from kernels_pallas.mask import AttentionMask, masked_softmax
from kernels_pallas.merge import merge
from kernels_pallas.product import product
from kernels_pallas.query_blocks import in_query_blocks

__all__ = [
    "IMPLEMENTATIONS",
    "Affine",
    "AttentionMask",
    "attention",
    "attention_over_cache",
    "few_queries",
    "latent_attention",
    "latent_compress",
    "latent_compress_into",
    "latent_decode",
    "latent_prefill",
    "log_line",
    "logit_scale_into",
    "product",
    "taken",
]

EXPANDED_BYTES = 1 << 30
"""Keys and values expanded from latents at one time; more are made for some heads after the others."""

Operation = TypeVar("Operation", bound=Callable[..., Any])


def _for_people(operation: Operation) -> Operation:
    """The operation, whose refusals are UserErrors."""

    @wraps(operation)
    def called(*args: Any, **named: Any) -> Any:
        try:
            return operation(*args, **named)
        except ImplementationError as error:
            raise UserError(str(error)) from error

    return cast(Operation, called)


_HIDDEN = ("batch", "sequence", None)
_HEADS = ("batch", "sequence", "act_heads", None)
_CACHE = (
    ("layers", "batch", "slots", None),
    ("layers", "batch", None, "slots"),
    ("layers", "batch", "slots", None),
)
"""The logical axes of Latents."""
_AFFINE = ((None, None, None), (None, None))
_FACTORS = ("layers", "batch", "act_heads", "slots")
"""Those of a cache's logit_scale."""


FEW_QUERIES = 64
"""Up to this many new tokens a row M²LA is absorbed over a cache, and GQA looks at all slots at once.

Absorbing costs r+e+r multiplications a query, key and head against n+e+v, expanding r·(n+v) a key and head:
at the 8B's sizes they meet at 149 queries, and absorbing needs no expanded keys in memory.
"""

_QUERY_ROWS = 512
"""Queries times heads of a row of the batch that a chip keeps beside the tiles of the cache."""


def few_queries(heads: int, rank: int | None = None, expanded: int = 0) -> int:
    """FEW_QUERIES, or as many as a TPU's or GPU's decoding kernel takes with so many heads.

    Args:
        rank, expanded: r and n+v of M²LA. Where absorbing takes no more multiplications however many queries
            there are, a CPU takes four times as many.
    """
    if chip().platform != "cpu":
        return max(1, min(FEW_QUERIES, _QUERY_ROWS // heads))
    return FEW_QUERIES * (4 if rank is not None and 2 * rank <= expanded else 1)


def attention(query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
    """Grouped-query attention, scaled by head_dim^-½: the GQA decoder's and the vision tower's.

    Args:
        query: (B, T, H, head_dim). key, value: (B, S, G, head_dim), H a multiple of G.

    Returns:
        (B, T, H, head_dim) in value's dtype; softmax in fp32. Rows that see nothing are 0.
    """

    def block(mask: AttentionMask, query: Array) -> Array:
        rows, tokens, heads, dim = query.shape
        grouped = query.reshape(rows, tokens, key.shape[2], heads // key.shape[2], dim)
        logits = jnp.einsum("btgqk,bsgk->bgqts", grouped, key, preferred_element_type=jnp.float32)
        weights = masked_softmax(logits * dim**-0.5, mask.dense(key.shape[1])[:, None, None])
        out = jnp.einsum("bgqts,bsgk->btgqk", weights.astype(value.dtype), value)
        return out.reshape(rows, tokens, heads, dim)

    return in_query_blocks(block, mask, query)


def attention_over_cache(query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
    """Grouped-query attention of new tokens over a cache, scaled by head_dim^-½.

    Args:
        query: (B, T, H, head_dim). key, value: (B, G, S, head_dim), H a multiple of G.

    Returns:
        (B, T, H, head_dim) in query's dtype; softmax in fp32. Rows that see nothing are 0.
    """
    rows, tokens, heads, dim = query.shape
    groups, capacity = key.shape[1:3]
    if tokens > few_queries(heads):

        def block(start: Array, size: int) -> tuple[Array, Array]:
            cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=2)
            return cut(key).astype(query.dtype), cut(value).astype(query.dtype)

        return cached_attention(query, block, mask, capacity, dim, dim**-0.5)[0]
    grouped = query.reshape(rows, tokens, groups, -1, dim).swapaxes(1, 2).reshape(rows, groups, -1, dim)
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    logits = jnp.einsum("bgtk,bgsk->bgts", grouped, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(rows, groups, tokens, -1, capacity)
    weights = masked_softmax(logits * dim**-0.5, mask.dense(capacity)[:, None, :, None])
    weights = weights.astype(value.dtype).reshape(rows, groups, -1, capacity)
    out = jnp.einsum("bgts,bgsk->bgtk", weights, value)
    return out.reshape(rows, groups, tokens, -1, dim).swapaxes(1, 2).reshape(rows, tokens, heads, dim)


@_for_people
def latent_compress(
    x: Array,
    kernel: Array,
    bias: Array | None,
    cos: Array,
    sin: Array,
    *,
    affine: Affine | None = None,
    modality: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """Hidden states → [c ‖ rotated k_rope] (B, T, r+e); see kernels_pallas.latent_compress.ops."""

    def local(
        x: Array,
        kernel: Array,
        bias: Array | None,
        cos: Array,
        sin: Array,
        matrix: Array | None,
        shift: Array | None,
        modality: Array | None,
    ) -> Array:
        return latent_compress_ops.latent_compress(
            x,
            kernel,
            bias,
            cos,
            sin,
            affine=_affine(matrix, shift),
            modality=modality,
            implementation=implementation,
        )

    inputs = [_HIDDEN, (None, None), (None,), _HIDDEN, _HIDDEN, *_AFFINE, ("batch", "sequence")]
    return split(local, inputs, [_HIDDEN], x, kernel, bias, cos, sin, *(affine or (None, None)), modality)


def _affine(matrix: Array | None, shift: Array | None) -> Affine | None:
    return None if matrix is None or shift is None else Affine(matrix, shift)


@_for_people
def latent_compress_into(
    latents: Latents,
    layer: Array,
    offsets: Array,
    counts: Array,
    x: Array,
    kernel: Array,
    bias: Array | None,
    cos: Array,
    sin: Array,
    *,
    affine: Affine | None = None,
    modality: Array | None = None,
    implementation: str | None = None,
) -> Latents:
    """The cache with the rows' first `counts` tokens written from slot `offsets` on; see the kernel's ops."""
    across = axes_over("slots", latents.capacity)

    def local(
        values: Array,
        scale: Array | None,
        k_rope: Array | None,
        layer: Array,
        offsets: Array,
        matrix: Array | None,
        shift: Array | None,
        modality: Array | None,
        *rest: Any,
    ) -> tuple:
        here = Latents(values, scale, k_rope)
        offsets = offsets - _first_slot(across, here.capacity)
        written, _ = latent_compress_ops.latent_compress_into(
            here,
            layer,
            offsets,
            *rest,
            affine=_affine(matrix, shift),
            modality=modality,
            implementation=implementation,
        )
        return tuple(x for x in written if x is not None)

    tokens = ("batch", None, None)
    adapting = [*_AFFINE, ("batch", None)]
    inputs = [*_CACHE, (), ("batch",), *adapting, ("batch",), tokens, (None, None), (None,), tokens, tokens]
    outputs = _CACHE if latents.quantized else _CACHE[:1]
    maps = (*(affine or (None, None)), modality)
    out = split(local, inputs, outputs, *latents, layer, offsets, *maps, counts, x, kernel, bias, cos, sin)
    return Latents(*out) if isinstance(out, tuple) else Latents(out)


def logit_scale_into(entry: Array, layer: Array, offsets: Array, counts: Array, factors: Array) -> Array:
    """A cache's logit_scale (L, B, G, S) with the tokens' factors (B, T, G) in the slots of their latents."""
    across = axes_over("slots", entry.shape[-1])

    def local(entry: Array, layer: Array, offsets: Array, counts: Array, factors: Array) -> Array:
        offsets = offsets - _first_slot(across, entry.shape[-1])
        return write_factors(entry, layer, offsets, counts, factors)

    inputs = [_FACTORS, (), ("batch",), ("batch",), ("batch", None, "act_heads")]
    out: Array = split(local, inputs, [_FACTORS], entry, layer, offsets, counts, factors)
    return out


@_for_people
def latent_attention(
    query: Array,
    latent: Array,
    kernel: Array,
    mask: AttentionMask,
    implementation: str | None = None,
    logit_scale: Array | None = None,
) -> Array:
    """M²LA of whole sequences, keys and values expanded from the latents (SPEC §2).

    Args:
        query: (B, T, H, n+e), [q_nope ‖ rotated q_rope].
        latent: (B, T, r+e), [c ‖ rotated k_rope].
        kernel: (H, n+v, r), from a latent to each head's [k_nope ‖ value].
        mask: of tokens among themselves; `key_segments` and `query_slots` are needed.
        logit_scale: (B, T, G) fp32 or None; multiplies the logits of a key and the heads of group g.

    Returns:
        (B, T, H, v) in query's dtype.
    """
    across = axes_over("sequence", query.shape[1])

    def local(
        query: Array,
        latent: Array,
        kernel: Array,
        logit_scale: Array | None,
        segments: Array,
        slots: Array,
        key_slots: Array | None,
    ) -> Array:
        key_segments = segments
        if across:
            gather = partial(jax.lax.all_gather, axis_name=across, axis=1, tiled=True)
            key_slots = gather(slots)
            latent, key_segments = gather(latent), gather(segments)
            logit_scale = None if logit_scale is None else gather(logit_scale)
        seen = AttentionMask(segments, key_segments, slots, key_slots)
        factors = None if logit_scale is None else logit_scale.swapaxes(1, 2)
        return _expanded(query, latent, kernel, seen, factors, implementation)

    assert mask.query_slots is not None
    tokens = ("batch", "sequence")
    groups = ("batch", "sequence", "act_heads")
    inputs = [_HEADS, _HIDDEN, ("act_heads", None, None), groups, tokens, tokens, tokens]
    given = (query, latent, kernel, logit_scale, mask.query_segments, mask.query_slots, mask.key_slots)
    return split(local, inputs, [_HEADS], *given)


def _expanded(
    query: Array,
    latent: Array,
    kernel: Array,
    mask: AttentionMask,
    logit_scale: Array | None,
    implementation: str | None,
) -> Array:
    """Attention with keys and values expanded for as many heads at a time as EXPANDED_BYTES allow.

    logit_scale is (B, G, S) here.
    """
    heads, both, rank = kernel.shape
    c, k_rope = latent[..., :rank], latent[..., rank:]

    def attend(query: Array, kernel: Array, logit_scale: Array | None) -> Array:
        kv = jnp.einsum("bsr,hkr->bshk", c, kernel)
        return latent_attention_ops.latent_attention(
            query, kv, k_rope, mask, logit_scale=logit_scale, implementation=implementation
        )

    one_head = math.prod(c.shape[:2]) * both * c.dtype.itemsize
    groups = next(
        g
        for g in range(1, heads + 1)
        if heads % g == 0 and one_head * heads <= g * max(EXPANDED_BYTES, one_head)
    )
    if groups == 1:
        return attend(query, kernel, logit_scale)
    size = heads // groups
    # Backwards keys and values are expanded again, but attention itself is not computed again.
    kept = jax.checkpoint_policies.save_only_these_names(*latent_attention_ops.RESIDUALS)

    @partial(jax.checkpoint, policy=kept)
    def one(first: Array) -> Array:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
        factors = None
        if logit_scale is not None:
            # The heads may be some of a group's, or of several: each has a row of its own here.
            group = (first + jnp.arange(size)) // (heads // logit_scale.shape[1])
            factors = jnp.take(logit_scale, group, axis=1)
        return attend(cut(query, axis=2), cut(kernel, axis=0), factors)

    out = jax.lax.map(one, jnp.arange(groups) * size)
    return jnp.moveaxis(out, 0, 2).reshape(*query.shape[:3], -1)


@_for_people
def latent_prefill(
    query: Array,
    latents: Latents,
    layer: Array,
    kernel: Array,
    slots: Array,
    implementation: str | None = None,
    logit_scale: Array | None = None,
) -> Array:
    """M²LA of many new tokens over a cache (B, T, H, v); see latent_prefill.ops there."""

    def attend(
        latents: Latents, layer: Array, slots: Array, logit_scale: Array | None, query: Array, kernel: Array
    ) -> tuple[Array, Array]:
        return latent_prefill_ops.latent_prefill(
            query, latents, layer, kernel, slots, logit_scale=logit_scale, implementation=implementation
        )

    inputs = [("batch", None, "act_heads", None), ("act_heads", None, None)]
    return _over_cache(attend, latents, layer, slots, logit_scale, inputs, query, kernel).astype(query.dtype)


@_for_people
def latent_decode(
    q_latent: Array,
    q_rope: Array,
    latents: Latents,
    layer: Array,
    slots: Array,
    scale: float,
    implementation: str | None = None,
    logit_scale: Array | None = None,
) -> Array:
    """Absorbed M²LA of a few new tokens over a cache (B, T, H, r) fp32; see latent_decode.ops there."""

    def attend(
        latents: Latents,
        layer: Array,
        slots: Array,
        logit_scale: Array | None,
        q_latent: Array,
        q_rope: Array,
    ) -> tuple[Array, Array]:
        return latent_decode_ops.latent_decode(
            q_latent,
            q_rope,
            latents,
            layer,
            slots,
            scale,
            logit_scale=logit_scale,
            implementation=implementation,
        )

    heads = ("batch", None, "act_heads", None)
    return _over_cache(attend, latents, layer, slots, logit_scale, [heads, heads], q_latent, q_rope)


def _over_cache(
    attend: Any,
    latents: Latents,
    layer: Array,
    slots: Array,
    logit_scale: Array | None,
    inputs: list,
    *queries: Array,
) -> Array:
    """attend(latents, layer, slots, logit_scale, *queries) → (out, lse), on each device's slots, merged."""
    across = axes_over("slots", latents.capacity)

    def local(
        values: Array,
        scale: Array | None,
        k_rope: Array | None,
        layer: Array,
        slots: Array,
        logit_scale: Array | None,
        *queries: Array,
    ) -> Array:
        here = Latents(values, scale, k_rope)
        # Below zero, none of the slots here are seen.
        slots = jnp.minimum(slots - _first_slot(across, here.capacity), here.capacity - 1)
        out, lse = attend(here, layer, slots, logit_scale, *queries)
        if not across:
            return out
        return merge(*(jax.lax.all_gather(x.astype(jnp.float32), across) for x in (out, lse)))[0]

    specs = [*_CACHE, (), ("batch", None), _FACTORS, *inputs]
    given = (*latents, layer, slots, logit_scale, *queries)
    return split(local, specs, [("batch", None, "act_heads", None)], *given)


def _first_slot(across: tuple[str, ...], capacity: int) -> Array | int:
    """The slot of the whole cache that this device's part, of so many slots, begins with."""
    return jax.lax.axis_index(across) * capacity if across else 0
