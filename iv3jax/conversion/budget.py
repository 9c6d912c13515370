"""Ranks by layer under one budget."""

from collections.abc import Sequence

import numpy as np

from iv3jax.errors import UserError


def spend(spectra: Sequence[np.ndarray], total: int, step: int, largest: int) -> tuple[int, ...]:
    """Gives `step` ranks at a time to the layer where they save the most.

    With the Fisher metric a layer's spectrum is what each direction of its latent is worth in expected loss,
    measured on the calibration tokens, so layers can be compared.

    Args:
        spectra: each layer's energies, descending.
        total: of all ranks. step: ranks are multiples of it. largest: rank of any layer.

    Raises:
        UserError: not even one step for each layer.
    """
    layers = len(spectra)
    if total < layers * step:
        raise UserError(
            f"a budget of {total} ranks is less than {step} for each of {layers} layers; ask for more"
        )
    ranks = [step] * layers
    largest = largest // step * step
    sums = [np.concatenate([[0.0], np.cumsum(x)]) for x in spectra]

    def gain(i: int) -> float:
        here, there = (min(r, len(spectra[i])) for r in (ranks[i], ranks[i] + step))
        return float(sums[i][there] - sums[i][here]) if ranks[i] < largest else -1.0

    gains = [gain(i) for i in range(layers)]
    for _ in range(total // step - layers):
        best = int(np.argmax(gains))
        if gains[best] < 0:
            break
        ranks[best] += step
        gains[best] = gain(best)
    return tuple(ranks)
