"""Frames cut into the vision tower's input rows, and where each row lies (SPEC §4).

A row is one patch: channel, 2 frames, y, x. Rows run over temporal patches, then merge blocks, then
the patches inside a block, so merge² consecutive rows form one output token.
"""

import einops
import numpy as np
import numpy.typing as npt


def patchify(
    frames: npt.NDArray[np.uint8], patch_size: int = 16, temporal_patch_size: int = 2, merge: int = 2
) -> tuple[npt.NDArray[np.uint8], tuple[int, int, int]]:
    """Cuts a video or a picture into patch rows.

    Args:
        frames: (n, H, W, 3) uint8 video frames, or (H, W, 3) for a picture, which is doubled in
            time. The last frame is repeated until n is a multiple of `temporal_patch_size`.
        patch_size, temporal_patch_size, merge: the tower's; H and W are multiples of
            patch_size · merge.

    Returns:
        patches: (t·h·w, 3·temporal_patch_size·patch_size²) uint8, not normalised.
        grid: (t, h, w) in patches.

    Raises:
        ValueError: a shape that cannot be cut.
    """
    frames = frames[None] if frames.ndim == 3 else frames
    side = patch_size * merge
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames of shape {frames.shape} are no (n, H, W, 3) video nor (H, W, 3) picture")
    if frames.shape[1] % side or frames.shape[2] % side:
        raise ValueError(f"sides of {frames.shape[1:3]} pixels are not multiples of {side}")
    missing = -len(frames) % temporal_patch_size
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    patches = einops.rearrange(
        frames,
        "(t f) (h mh y) (w mw x) c -> (t h w mh mw) (c f y x)",
        f=temporal_patch_size,
        mh=merge,
        mw=merge,
        y=patch_size,
        x=patch_size,
    )
    count, height, width, _ = frames.shape
    grid = (count // temporal_patch_size, height // patch_size, width // patch_size)
    return np.ascontiguousarray(patches), grid


def patch_coords(grid_h: int, grid_w: int, merge: int = 2) -> npt.NDArray[np.int32]:
    """Where the patches of one temporal patch lie, in the row order of `patchify`.

    Args:
        grid_h, grid_w: the grid in patches, multiples of `merge`.
        merge: patches along a side of a merge block.

    Returns:
        (grid_h·grid_w, 4) int32: row, column, grid_h, grid_w.

    Raises:
        ValueError: a grid that is no whole number of merge blocks.
    """
    if grid_h % merge or grid_w % merge:
        raise ValueError(f"a grid of {grid_h}x{grid_w} patches has no whole {merge}x{merge} blocks")
    rows, cols = np.indices((grid_h, grid_w), np.int32)
    stacked = np.stack([rows, cols, np.full_like(rows, grid_h), np.full_like(rows, grid_w)], -1)
    return np.ascontiguousarray(
        einops.rearrange(stacked, "(h mh) (w mw) k -> (h w mh mw) k", mh=merge, mw=merge)
    )
