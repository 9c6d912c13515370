"""Latent compression: hidden states → [c ‖ rotated k_rope] (SPEC §2), for training or into the cache."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.choice import Version, no_float16, run
from kernels_pallas.latent_compress import gpu, tpu, xla
from kernels_pallas.latent_compress.reference import Affine
from kernels_pallas.latents import LARGEST, Latents, groups_of

__all__ = ["Affine", "latent_compress", "latent_compress_into"]

_FLOATS = ("float32", "bfloat16", "float16")

_Arguments = tuple[
    jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array, Affine | None, jax.Array | None
]


def latent_compress(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    affine: Affine | None = None,
    modality: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """[c ‖ k_rope] = kernel · x + bias, then c ← A_m·c + a_m by modality, and k_rope turned (SPEC §2).

    Differentiable in x, kernel, bias and affine. The gradients need no kernel of their own: the turn is
    undone, and what is left are plain products (dx = dz·kernel, dkernel = dzᵀ·x), which XLA does at the
    machine's rate. Nothing is kept but the arguments, and nothing is computed again.

    Args:
        x: (B, T, D) float32 or bfloat16; float16 in XLA only.
        kernel: (r+e, D) in x's dtype, output first; its last e rows in the checkpoint's order, pair i at
            (2i, 2i+1).
        bias: (r+e,) or None.
        cos, sin: (B, T, e/2) fp32 of each pair's angle.
        affine: a map of c for text and one for vision tokens, or None.
        modality: (B, T) int32, 0 text, 1 vision; with `affine` only.
        implementation: None, "xla", "tpu" or "gpu", see `choice.run`.

    Returns:
        (B, T, r+e) in x's dtype, k_rope in half order. Products are accumulated and the rest is done in fp32.

    Raises:
        ValueError: arguments that do not fit each other, or an implementation that does not take them.
    """
    _check("latent_compress", x, kernel, bias, cos, sin, affine, modality)
    return _compress(implementation, x, kernel, bias, cos, sin, affine, modality)


def latent_compress_into(
    latents: Latents,
    layer: jax.Array | int,
    offsets: jax.Array,
    counts: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    affine: Affine | None = None,
    modality: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[Latents, jax.Array]:
    """`latent_compress` into a layer of the cache, in place where the cache is donated or a loop's state.

    Token t of row b goes to slot offsets[b] + t if t < counts[b] and that slot is one of 0 … S−1. Everything
    else in all arrays stays as it is, bit for bit. Not differentiable.

    Args:
        latents: the cache of all layers; floats are cast, int8 and float8_e4m3fn quantised as
            `latents.quantize`.
        layer: () int32.
        offsets: (B,) int32, the slot of each row's first new token; may be negative, or S and more.
        counts: (B,) int32, how many of each row's T tokens, the first ones, are real.
        x, kernel, bias, cos, sin, affine, modality, implementation: as in `latent_compress`.

    Returns:
        The cache, and (B,) bool: whether a real token's slot was past the end, so that it was not written.

    Raises:
        ValueError: as `latent_compress`.
    """
    op = "latent_compress_into"
    arguments = _check(op, x, kernel, bias, cos, sin, affine, modality)
    _check_cache(op, latents, offsets, counts, x.shape[0], kernel.shape[0], 2 * cos.shape[-1])
    layer = jnp.asarray(layer, jnp.int32)
    counts = jnp.clip(counts, 0, x.shape[1])

    def plain(*arguments: Any) -> Latents:
        return xla.write(latents, layer, offsets, counts, xla.latent_compress(*arguments))

    narrow = no_float16("x", x)
    versions = {
        "xla": Version(plain),
        "tpu": Version(
            partial(tpu.latent_compress_into, latents, layer, offsets, counts),
            narrow or tpu.refusal(x, kernel, cos, affine, latents),
        ),
        "gpu": Version(
            partial(gpu.latent_compress_into, latents, layer, offsets, counts),
            narrow or gpu.refusal(latents),
        ),
    }
    written: Latents = run(op, implementation, versions, *arguments)
    return written, (counts > 0) & (offsets + counts > latents.capacity)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compress(
    implementation: str | None,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    affine: Affine | None,
    modality: jax.Array | None,
) -> jax.Array:
    def plain(*arguments: Any) -> jax.Array:
        return xla.latent_compress(*arguments).astype(x.dtype)

    narrow = no_float16("x", x)
    versions = {
        "xla": Version(plain),
        "tpu": Version(tpu.latent_compress, narrow or tpu.refusal(x, kernel, cos, affine)),
        "gpu": Version(gpu.latent_compress, narrow),
    }
    out: jax.Array = run(
        "latent_compress", implementation, versions, x, kernel, bias, cos, sin, affine, modality
    )
    return out


def _forward(implementation: str | None, *arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _compress(implementation, *arguments), arguments


def _backward(
    implementation: str | None, arguments: _Arguments, dout: jax.Array
) -> tuple[jax.Array | Affine | None, ...]:
    x, kernel, bias, cos, sin, affine, modality = arguments
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def product(terms: str, *arrays: jax.Array) -> jax.Array:
        return jnp.einsum(terms, *arrays, precision=precision, preferred_element_type=jnp.float32)

    rank = kernel.shape[0] - 2 * cos.shape[-1]
    dc, turned = dout[..., :rank], dout[..., rank:].astype(jnp.float32)
    first, second = jnp.split(turned, 2, axis=-1)
    pairs = jnp.stack([first * cos + second * sin, second * cos - first * sin], axis=-1)
    dk_rope = pairs.reshape(turned.shape)
    daffine = None
    if affine is None or modality is None:
        dz = jnp.concatenate([dc, dk_rope.astype(x.dtype)], axis=-1)
        dkernel = product("btw,btd->wd", dz, x)
        dbias = jnp.sum(jnp.concatenate([dc.astype(jnp.float32), dk_rope], axis=-1), axis=(0, 1))
    else:
        # With C_m = Σ dcᵀ·x over a modality's tokens, both gradients are small products: of the matrix
        # C_m·kernelᵀ + Σdc·biasᵀ, of the kernel Σ matrixᵀ·C_m. So c itself is not needed.
        mine = jax.nn.one_hot(modality, 2, dtype=x.dtype)
        dc = mine[..., None] * dc[:, :, None]
        matrix = affine.matrix.astype(jnp.float32)
        moment = product("btmr,btd->mrd", dc, x)
        shift = jnp.sum(dc, axis=(0, 1), dtype=jnp.float32)
        highest = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        dmatrix = highest("mrd,sd->mrs", moment, kernel[:rank].astype(jnp.float32))
        if bias is not None:
            dmatrix += highest("mr,s->mrs", shift, bias[:rank].astype(jnp.float32))
        daffine = Affine(dmatrix.astype(affine.matrix.dtype), shift.astype(affine.bias.dtype))
        dz = product("btmr,mrs->bts", dc, affine.matrix.astype(x.dtype))
        dz = jnp.concatenate([dz, dk_rope], axis=-1).astype(x.dtype)
        dkernel = jnp.concatenate(
            [highest("mrs,mrd->sd", matrix, moment), product("bte,btd->ed", dz[..., rank:], x)]
        )
        dbias = jnp.concatenate([highest("mrs,mr->s", matrix, shift), jnp.sum(dk_rope, axis=(0, 1))])
    return (
        product("btw,wd->btd", dz, kernel).astype(x.dtype),
        dkernel.astype(kernel.dtype),
        None if bias is None else dbias.astype(bias.dtype),
        None,
        None,
        daffine,
        None,
    )


_compress.defvjp(_forward, _backward)


def _check(
    op: str,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    affine: Affine | None,
    modality: jax.Array | None,
) -> _Arguments:
    """The arguments as they are, if they fit each other."""

    def need(holds: bool, name: str, got: object, accepted: str) -> None:
        if not holds:
            raise ValueError(f"{op}: {name} is {got}; accepted is {accepted}")

    need(x.ndim == 3 and x.size > 0, "x", x.shape, "(B, T, D), none of them 0")
    need(x.dtype.name in _FLOATS, "x's dtype", x.dtype.name, " or ".join(_FLOATS))
    rows, tokens, dim = x.shape
    need(kernel.ndim == 2 and kernel.shape[1] == dim, "kernel", kernel.shape, f"(r+e, D={dim})")
    need(kernel.dtype == x.dtype, "kernel's dtype", kernel.dtype.name, f"x's, {x.dtype.name}")
    width = kernel.shape[0]
    for name, angles in (("cos", cos), ("sin", sin)):
        fits = angles.ndim == 3 and angles.shape[:2] == (rows, tokens) and 0 < 2 * angles.shape[2] < width
        need(fits, name, angles.shape, f"(B={rows}, T={tokens}, e/2) with e below r+e={width}")
        need(angles.dtype == jnp.float32, f"{name}'s dtype", angles.dtype.name, "float32")
    need(cos.shape == sin.shape, "sin", sin.shape, f"the shape of cos, {cos.shape}")
    need(
        bias is None or bias.shape == (width,), "bias", bias is None or bias.shape, f"None or (r+e={width},)"
    )
    rank = width - 2 * cos.shape[-1]
    if affine is not None:
        need(
            affine.matrix.shape == (2, rank, rank), "affine.matrix", affine.matrix.shape, f"(2, r={rank}, r)"
        )
        need(affine.bias.shape == (2, rank), "affine.bias", affine.bias.shape, f"(2, r={rank})")
    given = None if modality is None else modality.shape
    if affine is None:
        need(given is None, "modality", given, "None without affine")
    else:
        need(given == (rows, tokens), "modality", given, f"(B={rows}, T={tokens}) with affine")
    return x, kernel, bias, cos, sin, affine, modality


def _check_cache(
    op: str, latents: Latents, offsets: jax.Array, counts: jax.Array, rows: int, width: int, rope: int
) -> None:
    def need(holds: bool, name: str, got: object, accepted: str) -> None:
        if not holds:
            raise ValueError(f"{op}: {name} is {got}; accepted is {accepted}")

    values, scale, k_rope = latents
    dtype = values.dtype.name
    rank = width - rope
    quantized = dtype in LARGEST
    need(quantized or dtype in _FLOATS, "latents.values' dtype", dtype, ", ".join([*_FLOATS, *LARGEST]))
    own = rank if quantized else width
    fits = values.ndim == 4 and values.shape[1] == rows and values.shape[3] == own
    need(fits, "latents.values", values.shape, f"(L, B={rows}, S, {own})")
    given = [name for name, array in (("scale", scale), ("k_rope", k_rope)) if array is not None]
    if quantized:
        need(len(given) == 2, "latents", f"{dtype} with {given}", "both scale and k_rope where quantised")
    else:
        need(not given, "latents", f"{dtype} with {given}", "neither scale nor k_rope where not quantised")
    if scale is not None and k_rope is not None:
        layers, _, capacity, _ = values.shape
        groups = groups_of(rank)
        fits = scale.ndim == 4 and scale.shape[2] >= groups
        fits = fits and (*scale.shape[:2], scale.shape[3]) == (layers, rows, capacity)
        need(fits, "latents.scale", scale.shape, f"(L, B, {groups} or more, S) of values {values.shape}")
        need(scale.dtype == jnp.float32, "latents.scale's dtype", scale.dtype.name, "float32")
        shape = (layers, rows, capacity, rope)
        need(k_rope.shape == shape, "latents.k_rope", k_rope.shape, str(shape))
        need(k_rope.dtype.name in _FLOATS, "latents.k_rope's dtype", k_rope.dtype.name, " or ".join(_FLOATS))
    for name, numbers in (("offsets", offsets), ("counts", counts)):
        need(numbers.shape == (rows,), name, numbers.shape, f"(B={rows},)")
        need(numbers.dtype == jnp.int32, f"{name}'s dtype", numbers.dtype.name, "int32")
