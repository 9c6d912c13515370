"""One latent for content and values (SPEC §3, steps 5 and 6), in any metric, and small fits beside it.

The latent is found by reduced-rank regression: of all linear maps of rank r from features to targets, the one
whose errors are smallest in a metric. With the features equal to the targets and the plain metric that is
PCA. All in float64 NumPy. Axes: y targets ([content ‖ values]), f features, r rank.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Factors:
    """A regression cut off at any rank.

    Attributes:
        regression: (y, f), the best map without a limit of rank.
        left: (y, n), directions of the weighted targets, the most important first.
        energies: (n,), how much error in the metric each direction saves; descending.
        root, inverse_root: (y, y), the metric's square root, and its inverse.
    """

    regression: Array
    left: Array
    energies: Array
    root: Array
    inverse_root: Array

    def down(self, rank: int) -> Array:
        """(r, f), features → latent."""
        return self.left[:, :rank].T @ self.root @ self.regression

    def up(self, rank: int) -> Array:
        """(y, r), latent → targets."""
        return self.inverse_root @ self.left[:, :rank]

    @cached_property
    def lost(self) -> Array:
        """(n+1,), the energy that is lost at each rank."""
        return np.concatenate([np.cumsum(self.energies[::-1])[::-1], [0.0]])


def factorise(regression: Array, features: Array, metric: Array) -> Factors:
    """The maps of lower rank nearest to a map (y, f), where features x have E[x xᵀ] and errors δ cost
    δᵀ·metric·δ.

    Args:
        regression: (y, f). features: (f, f), of any rank. metric: (y, y).
    """
    root, inverse_root = square_roots(metric)
    # Not Cholesky: the keys and values of a narrow model are linearly dependent, and fp32 sums not quite.
    values, vectors = np.linalg.eigh(features)
    spread = vectors * np.sqrt(np.maximum(values, 0))
    left, singular, _ = np.linalg.svd(root @ regression @ spread, full_matrices=False)
    return Factors(regression, left, singular**2, root, inverse_root)


def damped(moment: Array, damping: float) -> Array:
    """A symmetric moment with something added to its diagonal, so that it can be inverted."""
    return moment + damping * np.trace(moment) / len(moment) * np.eye(len(moment))


def square_roots(metric: Array) -> tuple[Array, Array]:
    """M^½ and M^-½ of a symmetric matrix that is positive after damping."""
    values, vectors = np.linalg.eigh(damped(metric, 1e-4))
    root = np.sqrt(np.maximum(values, 1e-12 * values[-1]))
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def ridge(cross: Array, features: Array, prior: Array, strength: float) -> Array:
    """The map (y, f) of least squares, pulled towards a prior map.

    Args:
        cross: E[y xᵀ]. features: E[x xᵀ]. strength: of the pull, as a share of each feature's own energy.
    """
    own = np.diag(features)
    # What is always zero in the source keeps its prior.
    level = strength * np.maximum(own, 1e-9 * own.mean())
    return np.linalg.solve(features + np.diag(level), (cross + prior * level).T).T


def adapters(cross: Array, features: Array, factors: Factors, rank: int, content: int) -> tuple[Array, Array]:
    """For each modality the affine map of the latent whose targets are nearest in the metric.

    Args:
        cross: (2, y, f), E[y xᵀ] of text and of vision. features: (2, f, f), E[x xᵀ]; x's last is a
            constant 1.
        factors: that the latent is from. rank: of the latent.
        content: how many targets, the first, have their mean over both modalities taken out.

    Returns:
        (2, r, r) and (2, r).
    """
    down = factors.down(rank)
    affine = np.concatenate([down, np.eye(1, down.shape[1], down.shape[1] - 1)])
    # The latent's best value for a target is its projection in the metric.
    back = factors.left[:, :rank].T @ factors.root
    cross = cross.copy()
    mean = cross.sum(axis=0)[:content, -1] / features.sum(axis=0)[-1, -1]
    cross[:, :content] -= mean[:, None] * features[:, None, -1]
    maps = []
    for y, x in zip(cross, features, strict=True):
        inner = affine @ x @ affine.T
        prior = np.eye(rank, rank + 1)
        maps.append(ridge(back @ y @ affine.T, inner, prior, 1e-3))
    found = np.stack(maps)
    return found[..., :-1], found[..., -1]
