"""Which part of a layer's keys keeps RoPE (SPEC §3, steps 2 to 4): norms' substitutes, rotation,
logits' fit.
"""

from typing import Any

import numpy as np

from iv3jax.conversion import logits as fit
from iv3jax.conversion import measure, rotate
from iv3jax.conversion.choose import choose
from iv3jax.conversion.layer import GQALayer, Split
from iv3jax.conversion.run import Conversion, moments

Array = np.ndarray


def split_layer(run: Conversion, layer: int) -> dict[str, Array]:
    """What keeps RoPE in a layer (steps 2 to 4), on the source's own hidden states."""
    how, plan, text = run.method, run.plan, run.text
    params, hidden = run.params(layer), run.hidden(f"source_{layer}")
    found = moments(run, params, hidden, hidden)
    used, key_residual = used_map(run, params["self_attn"], found)
    query, query_residual = query_map(run, found)
    if how.features == "weights":
        found = weights_as_moments(run, GQALayer.of(params["self_attn"]), found)
    _, features = found.of_both()
    groups, d = text.num_key_value_heads, text.head_dim
    keys = used[: groups * d] @ features @ used[: groups * d].T
    members = np.arange(d // 2)[:, None] if plan.layout is None else plan.layout.members
    covariance = rotate.complex_moments(keys, groups, members)
    weights = None if how.real_rotation else _query_weights(found.query_energy, groups, members)
    to, back = rotate.unitaries(covariance, weights, real=how.real_rotation)
    layout = plan.layout
    if layout is None:
        layout, to, back = choose(run, layer, params, hidden, used, to, back)
    split = rotate.split(to, back, layout, groups, text.num_attention_heads // groups, d)
    result: dict[str, Array] = {
        "rope_energy": rotate.kept_energy(covariance, to, layout),
        "anchor": layout.anchor,
    }
    if how.fitted:
        index = fit.features_of(layout, groups, d)
        maps = split.to_rope, split.to_content
        seen = fit.sampled(run, layer, params, hidden, used, maps, layout.anchor, index)
        split = fit.fitted(split, seen, index)
        result["logit_error"] = np.asarray(fit.missed(split, seen, index))
    if key_residual is not None:
        result["key_residual"] = np.asarray(key_residual)
    if query_residual is not None:
        result["query_residual"] = np.asarray(query_residual)
    if query is not None:
        result["query"] = query
    return {
        **result,
        "used": used,
        "features": found.features,
        "cross": found.cross,
        "to_rope": split.to_rope,
        "query_rope": split.query_rope,
        "to_content": split.to_content,
        "content_up": split.content_up,
    }


def weights_as_moments(run: Conversion, layer: GQALayer, found: measure.Moments) -> measure.Moments:
    """The moments that inputs without any structure would give: what weights alone say."""
    kernel = np.concatenate([layer.key_value, np.zeros((1, layer.key_value.shape[1]))])
    features = kernel @ kernel.T
    features[-1, -1] = 1.0
    return found._replace(features=np.stack([features, np.zeros_like(features)]))


def used_map(run: Conversion, attention: Any, found: measure.Moments) -> tuple[Array, float | None]:
    """(Z, Z+1): [keys ‖ values] as they are used from those that are projected, and what the norm's
    fit misses.
    """
    groups, d = run.text.num_key_value_heads, run.text.head_dim
    size = 2 * groups * d
    out = np.eye(size, size + 1)
    if not run.text.use_qk_norm or run.config.qk_norm == "dropped":
        return out, None
    if run.plan.cached:
        scale = np.asarray(attention["k_norm"]["scale"], np.float64)
        out[: groups * d, : groups * d] = np.diag(np.tile(scale, groups))
        return out, None
    cross, features = found.of_both()
    rows, columns = measure.head_blocks(features, groups)
    blocks = np.stack([cross[np.ix_(r, c)] for r, c in zip(rows, columns, strict=True)])
    inner = np.stack([features[np.ix_(c, c)] for c in columns])
    maps = measure.affine_fit(blocks, inner, np.zeros_like(blocks), 1e-6)
    for r, c, m in zip(rows, columns, maps, strict=True):
        out[r] = 0
        out[np.ix_(r, c)] = m
    return out, measure.residual(maps, blocks, inner, found.key_energy)


def query_map(run: Conversion, found: measure.Moments) -> tuple[Array | None, float | None]:
    """(H, d, d+1): queries as they are used from those that are projected; None where their norm stays."""
    heads, d = run.text.num_attention_heads, run.text.head_dim
    if run.plan.cached:
        return None, None
    plain = np.broadcast_to(np.eye(d, d + 1), (heads, d, d + 1))
    if not run.text.use_qk_norm or run.config.qk_norm == "dropped":
        return plain, None
    maps = measure.affine_fit(found.query, found.query_features, np.zeros_like(plain), 1e-6)
    return maps, measure.residual(maps, found.query, found.query_features, found.query_energy)


def _query_weights(energy: Array, groups: int, members: Array) -> Array:
    """(groups of frequencies, G·fold): √ of the energy of the queries that meet each number of a key."""
    pairs = energy[:, : energy.shape[1] // 2] + energy[:, energy.shape[1] // 2 :]
    pairs = pairs.reshape(groups, -1, pairs.shape[-1]).sum(axis=1)
    weights = np.sqrt(np.moveaxis(pairs[:, members], 0, 1).reshape(len(members), -1))
    return np.maximum(weights, 1e-6 * weights.max())


def split_of(arrays: dict[str, Array]) -> Split:
    """The split that a step holds."""
    return Split(
        *(np.asarray(arrays[name]) for name in ("to_rope", "query_rope", "to_content", "content_up"))
    )
