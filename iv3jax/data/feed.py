"""Feed: what a training loop draws its batches from, and goes on with exactly after a stop. No jax here."""

from typing import NamedTuple, Protocol

import numpy as np

from iv3jax.models.batch import Batch


class Fed(NamedTuple):
    """One step's batch.

    Attributes:
        batch: this host's rows of the global batch, NumPy arrays.
        names: of the samples in each of these rows.
        state: (lanes, S) int64, of this host's lanes; a feed that is opened with it gives the next batch.
        waited: seconds that the caller waited for it.
    """

    batch: Batch
    names: tuple[tuple[str, ...], ...]
    state: np.ndarray
    waited: float = 0.0


class Feed(Protocol):
    """An endless iterator of batches, all of the same shapes."""

    def __next__(self) -> Fed:
        """The next step's batch."""

    def close(self) -> None:
        """Ends its threads and processes."""
