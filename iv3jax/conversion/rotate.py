"""Which combination of the key heads keeps RoPE (SPEC §3, steps 3 and 4).

A pair of dims of a key is one complex number of its frequency, and RoPE multiplies it by a phase. So every
complex linear combination of the heads' numbers of one frequency commutes with RoPE, also with interleaved
M-RoPE, where a frequency belongs to one axis. Per frequency a unitary U over the heads is chosen; its first
component becomes the shared RoPE key, the others lose their rotation and become content.

With e < d fewer frequencies turn: neighbouring ones are folded into groups of `fold`, whose members are
components beside the heads. That is approximate, as they turn at slightly different speeds.

Complex numbers here stand for pairs in half order: k[i] + 1j·k[i + d/2].
"""

from dataclasses import dataclass

import numpy as np

from iv3jax.conversion.layer import Split

Array = np.ndarray


@dataclass(frozen=True)
class Layout:
    """Which source frequencies are grouped, and at which frequency what is kept of a group turns.

    Attributes:
        members: (groups, fold), source frequencies of each group.
        kept: of each group, the pairs of the RoPE key that it fills.
        anchor: (e/2,), the source frequency that each pair of the RoPE key turns at.
    """

    members: Array
    kept: tuple[Array, ...]
    anchor: Array


class LayoutError(ValueError):
    """A RoPE width that the source's frequencies cannot be laid out for."""


def layout(
    head_dim: int, rope_dim: int, components: int, fold: int, sections: tuple[int, ...] | None
) -> Layout:
    """Frequencies of a RoPE key of `rope_dim` dims for heads of `head_dim`.

    Args:
        components: how many components of every frequency keep RoPE (`rope_components`).
        fold: neighbouring frequencies that are treated as one.
        sections: `mrope_section`, None for plain RoPE.

    Raises:
        LayoutError: a width or a fold that does not divide, or frequencies to be folded under M-RoPE.
    """
    if head_dim * components % rope_dim:
        raise LayoutError(
            f"qk_rope_head_dim {rope_dim} does not divide head_dim {head_dim} × {components} components"
        )
    stride = head_dim * components // rope_dim
    if fold % stride or (head_dim // 2) % fold:
        raise LayoutError(
            f"freqfold {fold} must be a multiple of {stride} and divide a head's {head_dim // 2} frequencies"
        )
    turning = np.arange(0, head_dim // 2, stride)
    if sections is not None and fold > 1:
        raise LayoutError(
            f"qk_rope_head_dim {rope_dim} with freqfold {fold}: with mrope_section {list(sections)} "
            "neighbouring frequencies turn by other axes and cannot be folded; take "
            f"{head_dim * components} and 1"
        )
    anchor = np.tile(turning, components)
    members = np.arange(head_dim // 2).reshape(-1, fold)
    pair = np.arange(rope_dim // 2)
    kept = tuple(pair[anchor // fold == group] for group in range(len(members)))
    return Layout(members, kept, anchor)


def listed(anchor: Array, frequencies: int) -> Layout:
    """The layout of a RoPE key whose pairs' frequencies are given, none folded."""
    members = np.arange(frequencies)[:, None]
    return Layout(members, tuple(np.flatnonzero(anchor == f) for f in range(frequencies)), anchor)


def complex_moments(moment: Array, heads: int, members: Array) -> Array:
    """E[k kᵀ] (G·d, G·d) → E[z z*] (groups, G·fold, G·fold) of each group's complex numbers."""
    d = len(moment) // heads
    m = moment.reshape(heads, 2, d // 2, heads, 2, d // 2)
    real = m[:, 0, :, :, 0] + m[:, 1, :, :, 1]
    imaginary = m[:, 1, :, :, 0] - m[:, 0, :, :, 1]
    full = real + 1j * imaginary
    out = np.stack([full[:, f][:, :, :, f] for f in members])
    size = heads * members.shape[1]
    return out.reshape(len(members), size, size)


def unitaries(moments: Array, weights: Array | None = None, real: bool = False) -> tuple[Array, Array]:
    """Per group, the basis T whose components hold the most of the keys, and its inverse.

    Args:
        moments: (groups, n, n), E[z z*].
        weights: (groups, n) > 0, how much each number's error matters (√ of the queries' energy); None is 1.
        real: one rotation for real and imaginary parts alike, as published by others.

    Returns:
        T (groups, n, n) with components T·z, the largest first, and T⁻¹. T is unitary where weights are None.
    """
    weights = np.ones(moments.shape[:2]) if weights is None else weights
    weighted = weights[:, :, None] * moments * weights[:, None]
    _, vectors = np.linalg.eigh(weighted.real if real else weighted)
    vectors = vectors[..., ::-1].astype(complex)
    adjoint = np.conj(np.swapaxes(vectors, -1, -2))
    return adjoint * weights[:, None], vectors / weights[..., None]


def kept_energy(moments: Array, to: Array, plan: Layout) -> Array:
    """() the share of the keys' (weighted) energy that lies in the components T·z which keep RoPE."""
    energies = np.einsum("gij,gjk,gik->gi", to, moments, np.conj(to)).real
    kept = sum(own[: len(pairs)].sum() for own, pairs in zip(energies, plan.kept, strict=True))
    return np.asarray(kept / energies.sum())


def split(to: Array, back: Array, plan: Layout, heads: int, per_group: int, head_dim: int) -> Split:
    """The split that keeps RoPE on the first components of `unitaries`, exact but for what stops turning.

    Args:
        to, back: T and T⁻¹ (groups, n, n).
        heads: key heads. per_group: query heads of each.
    """
    fold, n = plan.members.shape[1], to.shape[1]
    pairs, half = len(plan.anchor), head_dim // 2
    rest = len(plan.members) * n - pairs
    every = np.arange(heads)
    to_rope = np.zeros((pairs, heads, half), complex)
    query_rope = np.zeros((heads, pairs, half), complex)
    to_content = np.zeros((rest, heads, half), complex)
    content_up = np.zeros((heads, half, rest), complex)
    start = 0
    for i, (members, kept) in enumerate(zip(plan.members, plan.kept, strict=True)):
        keep = len(kept)
        left = start + np.arange(n - keep)
        start += n - keep
        shaped, inverse = to[i].reshape(n, heads, fold), back[i].reshape(heads, fold, n)
        to_rope[np.ix_(kept, every, members)] = shaped[:keep]
        # Re(conj(q)·a·z) = Re(conj(conj(a)·q)·z): what meets z is conj(a)·q.
        query_rope[np.ix_(every, kept, members)] = np.conj(np.moveaxis(inverse[..., :keep], -1, 1))
        to_content[np.ix_(left, every, members)] = shaped[keep:]
        content_up[np.ix_(every, members, left)] = inverse[..., keep:]
    return Split(
        interleaved_rows(as_real(to_rope)).reshape(2 * pairs, -1),
        np.stack([interleaved_rows(as_real(q[:, None])[:, :, 0]) for q in query_rope]).repeat(
            per_group, axis=0
        ),
        half_rows(as_real(to_content)).reshape(2 * rest, heads * head_dim),
        content_real(content_up).repeat(per_group, axis=0),
    )


def as_real(z: Array) -> Array:
    """A complex map (m, heads, f) of numbers in half order → real (2, m, heads, 2·f), real parts first."""
    first = np.concatenate([z.real, -z.imag], axis=-1)
    second = np.concatenate([z.imag, z.real], axis=-1)
    return np.stack([first, second])


def interleaved_rows(x: Array) -> Array:
    """(2, m, …) → (2·m, …) in the order real 0, imaginary 0, real 1, …"""
    return np.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def half_rows(x: Array) -> Array:
    """(2, m, …) → (2·m, …), all real parts first."""
    return x.reshape(-1, *x.shape[2:])


def content_real(z: Array) -> Array:
    """A complex map (heads, f, m) → real (heads, 2·f, 2·m), half order on both sides."""
    top = np.concatenate([z.real, -z.imag], axis=-1)
    return np.concatenate([top, np.concatenate([z.imag, z.real], axis=-1)], axis=-2)
