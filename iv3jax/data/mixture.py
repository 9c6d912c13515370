"""The global order of samples: number i → which record of which source. Reading it is read.py."""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import grain
import numpy as np


class Mixture:
    """An endless order in which sources take turns by weight, looked up at any place.

    It depends on the arguments only, not on hosts or workers. Each source is in a new random order in each
    of its epochs, and uses each record once in it. With weights in proportion to the lengths, the first
    `sum(lengths)` samples are one epoch of every source, and so on.

    Shuffling is grain's. Its mixing rounds weights to 1 % of the smallest, which would spoil that: ours,
    by the same method, is exact.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int):
        """Takes the number of records of each source, all at least 1, and positive weights."""
        exact = [Fraction(str(weight)) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        self._shares = [int(weight * scale) for weight in exact]
        # Sources of one length must not be shuffled alike.
        seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(len(lengths))]
        self._orders = [
            grain.MapDataset.range(length).seed(own).shuffle().repeat()
            for length, own in zip(lengths, seeds, strict=True)
        ]

    def __getitem__(self, i: int) -> tuple[int, int]:
        """The source and the record of the sample with global number i, from 0."""
        source, turn = self._turn(i)
        return source, int(self._orders[source][turn])

    def _turn(self, i: int) -> tuple[int, int]:
        """Whose turn it is at place i, and how many turns that source had before.

        Of the first n places the first source has its share, rounded up; the other sources share the
        rest in the same way. So all keep to their weights at every place, to within one for each source.
        """
        left, here, after = sum(self._shares), i, i + 1
        for source, share in enumerate(self._shares):
            others, others_after = here * (left - share) // left, after * (left - share) // left
            if after - others_after > here - others:
                return source, here - others
            left, here, after = left - share, others, others_after
        raise AssertionError("the last source takes what is left")
