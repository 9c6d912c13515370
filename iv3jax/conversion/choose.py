"""Which pairs of the keys keep RoPE where each layer chooses its own (`--rope-pairs chosen`).

Not every frequency matters alike, nor in every layer. So of all (frequency, component) pairs of rotate.py
those are taken which the attention logits need most. Under interleaved M-RoPE a frequency belongs
to an axis, and so a layer also decides how much it keeps of time, height and width.
"""

from typing import Any

import numpy as np

from iv3jax.conversion import logits as fit
from iv3jax.conversion import rotate
from iv3jax.conversion.run import Conversion

Array = np.ndarray


def choose(
    run: Conversion, layer: int, params: Any, hidden: Any, used: Array, to: Array, back: Array
) -> tuple[rotate.Layout, Array, Array]:
    """The layout of a layer's RoPE key, and `rotate.unitaries` with what is kept of a frequency first.

    Args:
        params, hidden, used: as in `logits.sampled`.
        to, back: T and T⁻¹ (d/2, G, G), of every frequency by itself.
    """
    frequencies, groups = to.shape[:2]
    every = rotate.listed(np.repeat(np.arange(frequencies), groups), frequencies)
    per_group = run.text.num_attention_heads // groups
    turned = rotate.split(to, back, every, groups, per_group, run.text.head_dim).to_rope
    # The same components once more, in the order of content.
    still = np.concatenate([turned[0::2], turned[1::2]])
    pairs = np.arange(len(every.anchor))
    index = (every.anchor, pairs, every.anchor, pairs)
    seen = fit.sampled(run, layer, params, hidden, used, (turned, still), every.anchor, index)
    kept = most_turned(seen, run.plan.rope_dim // 2)
    first = np.argsort(~np.isin(pairs, kept).reshape(frequencies, groups), axis=1, kind="stable")
    to = np.take_along_axis(to, first[:, :, None], axis=1)
    back = np.take_along_axis(back, first[:, None], axis=2)
    return rotate.listed(every.anchor[kept], frequencies), to, back


def most_turned(samples: fit.Samples, count: int, ridge: float = fit.RIDGE) -> Array:
    """(count,) the components that are to keep RoPE, ascending.

    Forward selection on normal equations, of all heads together: the logits are first made of still
    components alone; then one after the other is turned, each time the one that explains most of what is
    left.

    Args:
        samples: of features [M turned ‖ M still], first their real parts, then the imaginary (n = 4·M).
        ridge: as in `logits.fitted`.
    """
    heads, n = samples.target.shape
    m = n // 4
    turned = (np.arange(m)[:, None] + [0, 2 * m]).ravel()
    still = turned + m
    # What the still ones leave of the turned ones, and of the target.
    left, wanted = np.empty((heads, 2 * m, 2 * m)), np.empty((heads, 2 * m))
    for h in range(heads):
        moment, target = samples.moment[h], samples.target[h]
        level = max(ridge * np.trace(moment) / n, np.finfo(np.float64).tiny)
        across = moment[np.ix_(turned, still)]
        inner = moment[np.ix_(still, still)] + level * np.eye(2 * m)
        solved = np.linalg.solve(inner, np.column_stack([across.T, target[still]]))
        left[h] = moment[np.ix_(turned, turned)] + level * np.eye(2 * m) - across @ solved[:, :-1]
        wanted[h] = target[turned] - across @ solved[:, -1]
    a, b = left.reshape(heads, m, 2, m, 2), wanted.reshape(heads, m, 2)
    chosen: list[int] = []
    for _ in range(count):
        own = np.moveaxis(np.diagonal(a, axis1=1, axis2=3), -1, 1)
        gain = np.sum(b * np.linalg.solve(own, b[..., None])[..., 0], axis=(0, 2))
        gain[chosen] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        column = a[:, :, :, best].copy()
        reach = column @ np.linalg.inv(own[:, best])[:, None]
        b = b - np.einsum("hmxy,hy->hmx", reach, b[:, best])
        a -= np.einsum("hmxy,hnzy->hmxnz", reach, column)
        # Nothing is left of it; kept solvable.
        a[:, best, :, best] += np.eye(2)
    return np.sort(chosen)
