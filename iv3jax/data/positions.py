"""The (time, height, width) positions of M-RoPE, from token ids and grids. Rotary angles are the model's."""

from collections.abc import Sequence

import numpy as np


def mrope_positions(
    input_ids: np.ndarray,
    image_token_id: int,
    video_token_id: int,
    grids: Sequence[tuple[int, int, int]],
    merge: int,
) -> np.ndarray:
    """Positions of one sample (SPEC §5).

    Text counts up equally on all three axes. Each temporal patch is a grid of its own: one time index,
    heights 0…h/merge−1 and widths 0…w/merge−1, offset by the position it starts at; what follows
    starts at the largest of the three plus one.

    Args:
        input_ids: (T,) integers, every vision token written out.
        image_token_id: the id that stands for a vision token of an image.
        video_token_id: the same of a video.
        grids: (t, h, w) in patches of each image and video, in order of appearance.
        merge: how many patches a side one vision token covers.

    Returns:
        (3, T) int32.

    Raises:
        ValueError: the grids do not give as many vision tokens as there are, or text splits a temporal patch.
    """
    visual = np.flatnonzero((input_ids == image_token_id) | (input_ids == video_token_id))
    sides = [(t, h // merge, w // merge) for t, h, w in grids]
    sizes = np.array([h * w for t, h, w in sides for _ in range(t)], np.int64)
    if sizes.sum() != len(visual):
        raise ValueError(f"the grids give {sizes.sum()} vision tokens, the text has {len(visual)}")
    advance = np.ones(len(input_ids), np.int32)
    if not len(visual):
        return np.broadcast_to(advance.cumsum(dtype=np.int32) - 1, (3, len(input_ids))).copy()
    ends = sizes.cumsum()
    last = visual[ends - 1]
    if np.any(last - visual[ends - sizes] != sizes - 1):
        raise ValueError("the vision tokens of a temporal patch are not contiguous")
    # A whole temporal patch moves the position once, at its last token.
    advance[visual] = 0
    advance[last] = [max(h, w) for t, h, w in sides for _ in range(t)]
    start = advance.cumsum(dtype=np.int32) - advance
    positions = np.broadcast_to(start, (3, len(input_ids))).copy()
    positions[1, visual] += np.concatenate([np.tile(np.repeat(np.arange(h), w), t) for t, h, w in sides])
    positions[2, visual] += np.concatenate([np.tile(np.arange(w), h * t) for t, h, w in sides])
    return positions
