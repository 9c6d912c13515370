"""Second moments of a layer's calibration tokens: everything that the fits need to know of them.

Sums are taken on the devices in fp32, batch by batch, and added up in float64.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.conversion.passes import Parts, flat, parts
from iv3jax.models.config import TextConfig
from iv3jax.typing import Array, Params

MODALITIES = ("text", "vision")


class Moments(NamedTuple):
    """Means over tokens; Z as in layer.py, a feature vector is [keys ‖ values as projected ‖ 1].

    Attributes:
        features: (2, Z+1, Z+1) of text and of vision tokens, each over all tokens, so that they add up.
        cross: (2, Z, Z+1), [keys ‖ values as they are used] with the features.
        key_energy: (G,), of the keys as they are used.
        query: (H, d, d+1), queries as they are used with [query as projected ‖ 1]; query_features: (H, d+1,
            d+1).
        query_energy: (H, d), of each dim of the queries as they are used.
    """

    features: Any
    cross: Any
    key_energy: Any
    query: Any
    query_features: Any
    query_energy: Any

    def of_both(self) -> tuple[np.ndarray, np.ndarray]:
        """cross and features over all tokens."""
        return self.cross.sum(axis=0), self.features.sum(axis=0)


def used_keys(p: Parts, cached: bool) -> Array:
    """Keys as M²LA is to give them: after their norm, or before it (but with its weight) where it stays."""
    return p.key / p.key_scale[..., None] if cached else p.key


@partial(jax.jit, static_argnums=(0, 1))
def sums(
    config: TextConfig,
    cached: bool,
    params: Params,
    targets: Array,
    hidden: Array,
    modality: Array,
) -> Moments:
    """Moments times the number of tokens.

    Args:
        targets: (B, T, D), where the queries, keys and values that are wanted come from.
        hidden: (B, T, D), where those that there are come from.
        modality: (B, T), −1 for padding.
    """
    wanted, found = parts(config, params, targets), parts(config, params, hidden)
    count = (modality >= 0).astype(jnp.float32)
    ones = jnp.ones((*modality.shape, 1))
    x = jnp.concatenate([found.raw_key_value, ones], axis=-1)
    key = used_keys(wanted, cached)
    y = jnp.concatenate([flat(key), flat(wanted.value)], axis=-1)
    mine = jnp.stack([modality == m for m in range(len(MODALITIES))]).astype(jnp.float32)
    query = jnp.concatenate(
        [found.raw_query, jnp.broadcast_to(ones[..., None], (*found.raw_query.shape[:3], 1))], -1
    )
    counted = wanted.query * count[..., None, None]
    return Moments(
        jnp.einsum("mbt,btx,bty->mxy", mine, x, x),
        jnp.einsum("mbt,bty,btx->myx", mine, y, x),
        jnp.einsum("bt,btgk->g", mine.sum(0), key * key),
        jnp.einsum("bthk,bthl->hkl", counted, query),
        jnp.einsum("bt,bthk,bthl->hkl", count, query, query),
        jnp.einsum("bthk,bthk->hk", counted, wanted.query),
    )


def mean(found: Iterable[tuple[Moments, float]]) -> Moments:
    """Moments from the sums of batches and the number of each batch's tokens."""
    total: Any = None
    count = 0.0
    for moments, part in found:
        values = jax.tree.map(lambda x: np.asarray(x, np.float64), moments)
        total = values if total is None else jax.tree.map(np.add, total, values)
        count += part
    return jax.tree.map(lambda x: x / count, total)


def affine_fit(cross: np.ndarray, features: np.ndarray, prior: np.ndarray, strength: float) -> np.ndarray:
    """Least squares of heads on their own projection and a constant: (…, d, d+1).

    Args:
        cross: (…, d, d+1), E[y x⁺ᵀ]. features: (…, d+1, d+1), E[x⁺ x⁺ᵀ].
        prior: (…, d, d+1), towards which it is pulled. strength: of the pull, as a share of each input's
            own energy.
    """
    own = np.diagonal(features, axis1=-2, axis2=-1)[..., None, :]
    # What is always zero in the source keeps its prior.
    level = strength * np.maximum(own, 1e-9 * own.mean(axis=-1, keepdims=True))
    system = features + level * np.eye(features.shape[-1])
    return np.swapaxes(np.linalg.solve(system, np.swapaxes(cross + level * prior, -1, -2)), -1, -2)


def residual(fit: np.ndarray, cross: np.ndarray, features: np.ndarray, energy: np.ndarray) -> float:
    """Share of the energy that fits miss, over all heads: Σ E|y − M x|² / Σ E|y|²."""
    predicted = np.sum(fit * cross)
    squared = np.sum((fit @ features) * fit)
    return float(max(0.0, (energy.sum() - 2 * predicted + squared) / energy.sum()))


def head_blocks(matrix: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each key head's own numbers and the constant lie in a feature vector: rows (G, d),
    columns (G, d+1).
    """
    size = (len(matrix) - 1) // (2 * groups)
    rows = np.arange(groups * size).reshape(groups, size)
    return rows, np.concatenate([rows, np.full((groups, 1), len(matrix) - 1)], axis=1)
