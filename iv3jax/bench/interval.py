"""95 % intervals of mean scores."""

import math

import numpy as np

_Z = 1.96


def interval(scores: np.ndarray) -> tuple[float, float]:
    """Low and high of the mean of scores from 0 to 1, (n,) of two or more.

    Wilson's (1927) where each is right or wrong, which is sound near 0 and 1 too; else the normal one.
    """
    count, mean = len(scores), float(scores.mean())
    if np.isin(scores, (0, 1)).all():
        middle = mean + _Z * _Z / (2 * count)
        half = _Z * math.sqrt(mean * (1 - mean) / count + _Z * _Z / (4 * count * count))
        whole = 1 + _Z * _Z / count
        return max((middle - half) / whole, 0.0), min((middle + half) / whole, 1.0)
    half = _Z * float(scores.std(ddof=1)) / math.sqrt(count)
    return max(mean - half, 0.0), min(mean + half, 1.0)
