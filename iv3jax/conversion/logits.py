"""The per-head coefficients of a positional split, fitted on the source's attention logits (SPEC §3, step 4).

What stops turning makes an error that depends on how far apart query and key are. Per head, two sets of
complex coefficients are fitted by ridge least squares: of the shared RoPE key's components, which turn, and
of the content's, which do not. Keys are drawn by the source's own attention probabilities, and what is the
same for all keys of a query is taken out, since the softmax does not see it: to second order this is the
divergence between the two attention distributions.

A head that looks at one token is the same under any logits there, so by itself this does not see that another
token must not come near. Where layers choose what turns, keys are therefore drawn by p + 1 / (1 + gap²) too:
an error is squared over the gap that it would have to close, which bounds how often it does (Chebyshev).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.conversion.layer import Split
from iv3jax.conversion.passes import Parts, Rows, parts, source_logits
from iv3jax.conversion.rotate import Layout, as_real, content_real, interleaved_rows
from iv3jax.conversion.run import Conversion
from iv3jax.models.config import TextConfig
from iv3jax.typing import Array

QUERIES, KEYS = 32, 24
"""Of each row, queries that the fit looks at, and keys drawn for each."""

FIT_TOKENS = 16384
"""Tokens of the rows that the fit looks at."""

RIDGE = 3e-2
"""Weight of the start's coefficients, as a share of the mean diagonal of the normal equations."""


class Samples(NamedTuple):
    """Normal equations of the fit: moment (H, n, n), target (H, n) and energy (H,), of real coefficients."""

    moment: Array
    target: Array
    energy: Array


def features_of(
    plan: Layout, groups: int, head_dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which (source frequency, component) pairs have a coefficient, for RoPE and for content.

    Returns:
        rope_f, rope_i: frequencies and pairs of the RoPE key; content_f, content_j: frequencies and content
        components. A frequency meets the components of its own group only.
    """
    size = groups * plan.members.shape[1]
    rope = [(f, i) for m, k in zip(plan.members, plan.kept, strict=True) for f in m for i in k]
    rest = [size - len(kept) for kept in plan.kept]
    first = np.cumsum([0, *rest])
    content = [(f, first[g] + j) for g, m in enumerate(plan.members) for f in m for j in range(rest[g])]
    rope_f, rope_i = np.array(rope).T
    content_f, content_j = np.array(content, dtype=int).reshape(-1, 2).T
    return rope_f, rope_i, content_f, content_j


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def sample(
    config: TextConfig,
    queries: int,
    keys: int,
    cached: bool,
    far: bool,
    p: Parts,
    key: Array,
    rows: Rows,
    to_rope: Array,
    to_content: Array,
    anchor: Array,
    index: tuple[Array, ...],
    rng: Array,
) -> Samples:
    """Sums over some queries of each row and some keys of each query.

    Args:
        queries, keys: how many queries of a row, and keys of a query and head.
        cached: whether the key norm stays, and so scales all that a key gives.
        far: whether keys that get no attention are drawn too, by 1 / (1 + gap²), gap to the largest logit.
        p: the source's parts. key: (B, T, G·d), the keys that are converted.
        to_rope: (e, G·d), to_content: (c, G·d). anchor: (e/2,). index: `features_of`.
    """
    pick, draw = jax.random.split(rng)
    batch, tokens = rows.segment_ids.shape
    heads, d = config.num_attention_heads, config.head_dim
    half = d // 2
    logits = source_logits(config, p, rows.rope).reshape(batch, heads, tokens, tokens)
    logits = jnp.where(rows.mask()[:, None], logits, -1e30)
    # Early queries see few keys and say little; padding says nothing.
    chosen = jax.random.randint(pick, (batch, queries), 1, tokens)
    at = jnp.take_along_axis(logits, chosen[:, None, :, None], axis=2)
    # By the inverse of the distribution function: one random number a draw instead of one a key.
    weights = jax.nn.softmax(at, axis=-1)
    if far:
        gap = jnp.max(at, axis=-1, keepdims=True) - at
        weights += jnp.where(at > -1e29, 1 / (1 + gap * gap), 0.0)
    below = jnp.cumsum(weights, axis=-1)
    level = jax.random.uniform(draw, (*at.shape[:3], keys)) * below[..., -1:]
    drawn = jnp.sum(below[..., None, :] <= level[..., None], axis=-1)
    drawn = jnp.minimum(drawn, chosen[:, None, :, None])
    real = jnp.take_along_axis(rows.segment_ids, chosen, axis=1) != 0
    target = jnp.take_along_axis(at, drawn, axis=-1) * d**0.5
    query = jnp.take_along_axis(p.query, chosen[:, :, None, None], axis=1)
    query = jnp.moveaxis(query, 2, 1)
    query = query[..., :half] - 1j * query[..., half:]
    rope_key = jnp.einsum("ek,bsk->bse", to_rope, key)
    rope_key = rope_key[..., 0::2] + 1j * rope_key[..., 1::2]
    phase = rows.rope.cos + 1j * rows.rope.sin
    rope_key = rope_key * phase[..., anchor]
    content = jnp.einsum("ck,bsk->bsc", to_content, key)
    size = content.shape[-1] // 2
    content = content[..., :size] + 1j * content[..., size:]
    rope_f, rope_i, content_f, content_j = index
    queried_phase = jnp.conj(jnp.take_along_axis(phase, chosen[:, :, None], axis=1))[..., anchor]

    mass = jnp.moveaxis(jnp.sqrt(below[..., -1]), 1, 0)
    scale = p.key_scale if cached else jnp.ones_like(p.key_scale)
    scale = jnp.repeat(jnp.moveaxis(scale, 2, 0), heads // config.num_key_value_heads, axis=0)

    def one_head(query: Array, drawn: Array, target: Array, scale: Array, mass: Array) -> tuple[Array, ...]:
        pull = jax.vmap(lambda x, i: x[i])
        turned = pull(rope_key, drawn) * queried_phase[:, :, None]
        still = pull(content, drawn)
        rope = query[:, :, None, rope_f] * turned[..., rope_i]
        rest = query[:, :, None, content_f] * still[..., content_j]
        z = jnp.concatenate([rope, rest], axis=-1)
        # Re(a·z) = Re a·Re z − Im a·Im z.
        x = jnp.concatenate([z.real, -z.imag], axis=-1) * pull(scale, drawn)[..., None]
        weight = jnp.where(real, mass, 0.0)[..., None]
        x = (x - x.mean(axis=2, keepdims=True)) * weight[..., None]
        y = (target - target.mean(axis=2, keepdims=True)) * weight
        x, y = x.reshape(-1, x.shape[-1]), y.ravel()
        return x.T @ x, x.T @ y, y @ y

    by_head = [jnp.moveaxis(x, 1, 0) for x in (query, drawn, target)]
    return Samples(*jax.lax.map(lambda x: one_head(*x), (*by_head, scale, mass)))


def sampled(
    run: Conversion,
    layer: int,
    params: Any,
    hidden: Any,
    used: np.ndarray,
    maps: tuple[np.ndarray, np.ndarray],
    anchor: np.ndarray,
    index: tuple[np.ndarray, ...],
) -> Samples:
    """The normal equations from the rows that the fit looks at, float64.

    Args:
        params, hidden: the source layer's, and its input by batch.
        used: (Z, Z+1) as `split.used_map` gives it.
        maps: to_rope and to_content. anchor, index: as in `sample`.
    """
    text = run.text
    keys = text.num_key_value_heads * text.head_dim
    linear = jnp.asarray(used[:keys], jnp.float32)
    to_rope, to_content = (jnp.asarray(x, jnp.float32) for x in maps)
    far = run.config.pairs == "chosen"
    places = jnp.asarray(anchor), tuple(jnp.asarray(x) for x in index)
    total: Samples | None = None
    chosen = run.fitted[:: max(1, len(run.fitted) * run.stream.batches[0].input_ids.size // FIT_TOKENS)]
    for b in chosen:
        rows = run.stream.rows(b)
        p = parts(text, params, hidden(b))
        key = p.raw_key_value @ linear[:, :-1].T + linear[:, -1]
        rng = jax.random.fold_in(jax.random.key(run.config.seed), layer * 1000 + b)
        batch = sample(
            text, QUERIES, KEYS, run.plan.cached, far, p, key, rows, to_rope, to_content, *places, rng
        )
        batch = jax.tree.map(lambda x: np.asarray(x, np.float64), batch)
        total = batch if total is None else jax.tree.map(np.add, total, batch)
    assert total is not None
    return total


def coefficients(start: Split, index: tuple[np.ndarray, ...]) -> np.ndarray:
    """(H, n) real coefficients of a split, in the order of the fit."""
    rope_f, rope_i, content_f, content_j = index
    half = start.content_up.shape[1] // 2
    heads = len(start.query_rope)
    # Rows 2i are the real parts of conj(a): (Re, −Im of conj a) on (real, imaginary) numbers.
    conj = start.query_rope[:, 0::2, :half] - 1j * start.query_rope[:, 0::2, half:]
    size = start.content_up.shape[2] // 2
    content = start.content_up[:, :half, :size] - 1j * start.content_up[:, :half, size:]
    z = np.concatenate([np.conj(conj)[:, rope_i, rope_f], content[:, content_f, content_j]], axis=-1)
    return np.concatenate([z.real, z.imag], axis=-1).reshape(heads, -1)


def fitted(start: Split, samples: Samples, index: tuple[np.ndarray, ...], ridge: float = RIDGE) -> Split:
    """The split with coefficients that fit the logits, pulled towards its own."""
    moment = np.asarray(samples.moment, np.float64)
    first = coefficients(start, index)
    level = ridge * np.trace(moment, axis1=1, axis2=2)[:, None, None] / moment.shape[-1]
    # A head whose queries are all zero keeps its start.
    level = np.maximum(level, np.finfo(np.float64).tiny)
    eye = level * np.eye(moment.shape[-1])
    goal = np.asarray(samples.target, np.float64) + level[..., 0] * first
    solved = np.linalg.solve(moment + eye, goal[..., None])[..., 0]
    return with_coefficients(start, solved, index)


def with_coefficients(start: Split, values: np.ndarray, index: tuple[np.ndarray, ...]) -> Split:
    """The split with other coefficients (H, n)."""
    rope_f, rope_i, content_f, content_j = index
    heads, e, d = start.query_rope.shape
    z = values[:, : values.shape[1] // 2] + 1j * values[:, values.shape[1] // 2 :]
    rope = np.zeros((heads, e // 2, d // 2), complex)
    rope[:, rope_i, rope_f] = np.conj(z[:, : len(rope_f)])
    content = np.zeros((heads, d // 2, start.content_up.shape[2] // 2), complex)
    content[:, content_f, content_j] = z[:, len(rope_f) :]
    query_rope = np.stack([interleaved_rows(as_real(q[:, None])[:, :, 0]) for q in rope])
    return Split(start.to_rope, query_rope, start.to_content, content_real(content))


def missed(split: Split, samples: Samples, index: tuple[np.ndarray, ...]) -> float:
    """Share of the logits' variance, keys drawn by attention, that a split misses."""
    x = coefficients(split, index)
    moment, target, energy = (np.asarray(y, np.float64) for y in samples)
    error = energy.sum() - 2 * np.einsum("hn,hn->", x, target) + np.einsum("hn,hnm,hm->", x, moment, x)
    return float(max(0.0, error / energy.sum()))
