"""latent_attention, the public function: expanded M²LA for training and prefill (SPEC §2).

A key is [k_nope of a head ‖ the rotated RoPE key that all heads share], n+e numbers, a value is v numbers.
The kernels are flash attention (Dao, arXiv 2307.08691): no array of logits exists in memory, and blocks of
keys that a block of queries cannot see are neither fetched nor computed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.choice import Version, no_float16, run
from kernels_pallas.latent_attention import (
    gpu,
    gpu_backward,
    tpu_backward,
    tpu_forward,
    tpu_tiles,
    xla,
)
from kernels_pallas.mask import AttentionMask


def latent_attention(
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    mask: AttentionMask,
    *,
    logit_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(logit_scale · (q_nope·k_nope + q_rope·k_rope) / sqrt(n+e)) · value, per head.

    Differentiable in everything but the mask.

    Args:
        query: (B, T, H, n+e) fp32 or bf16 (in XLA fp16 too), [q_nope ‖ rotated q_rope] as q_proj gives them.
        kv: (B, S, H, n+v), [k_nope ‖ value] as kv_b_proj gives them, in query's dtype.
        k_rope: (B, S, e), rotated, one for all heads, in query's dtype.
        mask: who sees whom, by segment and by slot; tokens may lie in any order (zig-zag).
        logit_scale: (B, G, S) fp32, H a multiple of G: the logits of head h and key s are multiplied by
            row h // (H/G) (cached key norms, SPEC §3). None is 1.
        implementation: None picks, "xla", "tpu" or "gpu" insist (kernels_pallas/choice.py).

    Returns:
        (B, T, H, v) in query's dtype; logits, softmax and sums in fp32. Rows that see nothing are 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an implementation that cannot take them.
    """
    return _run(query, kv, k_rope, mask, logit_scale, implementation)[0]


def latent_attention_with_lse(
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    mask: AttentionMask,
    *,
    logit_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`latent_attention` and the log-sum-exp of the logits, to merge attention over parts of the keys.

    Returns:
        out (B, T, H, v) in query's dtype and lse (B, T, H) fp32, both differentiable. Rows that see nothing
        are 0 and −inf, and have no gradient.

    Raises:
        ValueError: as `latent_attention`.
    """
    return _run(query, kv, k_rope, mask, logit_scale, implementation)


def _row_products(out: jax.Array, dout: jax.Array, *, interpret: bool) -> jax.Array:
    """Σ_v out·dout: (B, T, H, v) twice → (B, H, T) fp32."""
    del interpret
    products = out.astype(jnp.float32) * dout.astype(jnp.float32)
    return products.sum(axis=-1).swapaxes(1, 2)


RESIDUALS = ("latent_attention_out", "latent_attention_lse")
"""Names for a checkpoint policy that keeps what the backward pass would otherwise compute attention for."""


class _Kernels(NamedTuple):
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array | None, ...]]
    row_products: Callable[..., jax.Array]


_TPU = _Kernels(tpu_forward.forward, tpu_backward.backward, tpu_backward.row_products)
_GPU = _Kernels(gpu.forward, gpu_backward.backward, _row_products)


def _run(
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    mask: AttentionMask,
    logit_scale: jax.Array | None,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    _check(query, kv, k_rope, mask, logit_scale)
    versions = {
        "xla": Version(xla.latent_attention),
        "tpu": Version(
            partial(_with_kernels, _TPU), no_float16("query", query) or tpu_tiles.refusal(query, kv, k_rope)
        ),
        "gpu": Version(
            partial(_with_kernels, _GPU), no_float16("query", query) or gpu.refusal(query, kv, k_rope)
        ),
    }
    return run("latent_attention", implementation, versions, query, kv, k_rope, logit_scale, mask)


def _with_kernels(kernels: _Kernels, *arguments: Any, interpret: bool) -> tuple[jax.Array, jax.Array]:
    return _flash(kernels, interpret, *arguments)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(
    kernels: _Kernels,
    interpret: bool,
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    logit_scale: jax.Array | None,
    mask: AttentionMask,
) -> tuple[jax.Array, jax.Array]:
    out, lse = kernels.forward(query, kv, k_rope, logit_scale, mask, interpret=interpret)
    return out, lse.swapaxes(1, 2)


def _flash_forward(kernels: _Kernels, interpret: bool, *arguments: Any) -> tuple[Any, Any]:
    out, lse = map(checkpoint_name, kernels.forward(*arguments, interpret=interpret), RESIDUALS)
    return (out, lse.swapaxes(1, 2)), (arguments, out, lse)


def _flash_backward(kernels: _Kernels, interpret: bool, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    arguments, out, lse = saved
    dout, dlse = cotangents
    delta = kernels.row_products(out, dout, interpret=interpret)
    # An lse of −inf does not depend on anything, whatever (NaN, too) comes back to it.
    delta -= jnp.where(jnp.isneginf(lse), 0.0, dlse.swapaxes(1, 2))
    return (*kernels.backward(*arguments, lse, delta, dout, interpret=interpret), None)


_flash.defvjp(_flash_forward, _flash_backward)


def _check(
    query: jax.Array,
    kv: jax.Array,
    k_rope: jax.Array,
    mask: AttentionMask,
    logit_scale: jax.Array | None,
) -> None:
    def refuse(name: str, x: Any, accepted: str) -> None:
        raise ValueError(f"latent_attention: {name} is {x}; accepted is {accepted}")

    for name, x, letters in (("query", query, "(B, T, H, n+e)"), ("kv", kv, "(B, S, H, n+v)")):
        if x.ndim != 4 or 0 in x.shape:
            refuse(name, x.shape, f"{letters}, none of them 0")
    if k_rope.ndim != 3 or 0 in k_rope.shape:
        refuse("k_rope", k_rope.shape, "(B, S, e), none of them 0")
    (rows, tokens, heads, both), keys = query.shape, kv.shape[1]
    n = both - k_rope.shape[-1]
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        refuse("query", query.dtype, "float32, bfloat16 or float16")
    for name, x in (("kv", kv), ("k_rope", k_rope)):
        if x.dtype != query.dtype:
            refuse(name, x.dtype, f"query's dtype {query.dtype}")
    if k_rope.shape[:2] != (rows, keys):
        refuse("k_rope", k_rope.shape, f"({rows}, {keys}, e), with query's rows and kv's tokens")
    if n < 1:
        refuse("query", query.shape, f"more dims than k_rope's e = {k_rope.shape[-1]}")
    if kv.shape[0] != rows or kv.shape[2] != heads or kv.shape[3] <= n:
        refuse("kv", kv.shape, f"({rows}, S, {heads}, n+v) with n = {n} and v at least 1")
    expected = {
        "query_segments": (rows, tokens),
        "key_segments": (rows, keys),
        "query_slots": (rows, tokens),
        "key_slots": (rows, keys),
    }
    for name, shape in expected.items():
        x = getattr(mask, name)
        if x is None and name != "query_segments":
            continue
        if x is None or x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
            refuse(f"mask.{name}", "None" if x is None else f"{x.dtype}{x.shape}", f"int32{shape}")
    if logit_scale is not None:
        fits = logit_scale.ndim == 3 and logit_scale.shape[::2] == (rows, keys) and logit_scale.shape[1] > 0
        if not fits or heads % logit_scale.shape[1] or logit_scale.dtype != jnp.float32:
            found = f"{logit_scale.dtype}{logit_scale.shape}"
            refuse("logit_scale", found, f"float32({rows}, G, {keys}) with G dividing the {heads} heads")
