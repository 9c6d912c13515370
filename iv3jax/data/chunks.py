"""Which chunk each temporal patch of a row goes into: first fit, for the packer and for collate alike."""

import numpy as np


class Chunks:
    """The chunks of one row, of `width` patches each, filled as temporal patches come.

    Each goes into the first chunk with room for the whole of it; there are as many chunks as that needs.
    """

    def __init__(self, width: int):
        self._width = width
        self._used = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._used)

    def copy(self) -> "Chunks":
        """A copy to try something on."""
        other = Chunks(self._width)
        other._used = self._used
        return other

    def place(self, sizes: np.ndarray) -> np.ndarray:
        """Places temporal patches, in order.

        Args:
            sizes: (n,) patches in each.

        Returns:
            (n,) int64, where each begins when the row's chunks are laid end to end.

        Raises:
            ValueError: a temporal patch is larger than a chunk.
        """
        # Those of one video are of one size.
        runs = np.split(sizes, np.flatnonzero(np.diff(sizes)) + 1) if len(sizes) else []
        return np.concatenate([np.zeros(0, np.int64), *(self._place(len(run), int(run[0])) for run in runs)])

    def _place(self, count: int, size: int) -> np.ndarray:
        """Places `count` temporal patches of one size: each chunk takes what it has room for, in order."""
        if size > self._width:
            raise ValueError(f"a temporal patch has {size} patches, a chunk only {self._width}")
        room = (self._width - self._used) // size
        more = -(-max(count - int(room.sum()), 0) // (self._width // size))
        used = np.concatenate([self._used, np.zeros(more, np.int64)])
        room = (self._width - used) // size
        taken = np.clip(count - (room.cumsum() - room), 0, room)
        chunk = np.repeat(np.arange(len(used)), taken)
        place = np.arange(count) - np.repeat(taken.cumsum() - taken, taken)
        self._used = used + taken * size
        return chunk * self._width + used[chunk] + place * size
