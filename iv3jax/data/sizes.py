"""The size a picture or a video is resized to (SPEC §5). Nothing here touches pixels."""

import math

from iv3jax.errors import UserError

MAX_ASPECT = 200
"""Longest side over shortest side that is still accepted."""


def image_size(
    height: int, width: int, min_pixels: int, max_pixels: int, factor: int = 32
) -> tuple[int, int]:
    """The size of a resized picture: Qwen2-VL's `smart_resize`.

    Args:
        height, width: source size in pixels.
        min_pixels, max_pixels: budget for height · width of the result.
        factor: both sides become multiples of it (patch size · merge).

    Returns:
        (height, width) in pixels. Very long pictures may miss the budget by a little: a side is
        never under `factor`.

    Raises:
        UserError: aspect ratio above 200, or an impossible budget. The text names no file.
    """
    _check(height, width, min_pixels, max_pixels)
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        return _shrink(height, width, math.sqrt(height * width / max_pixels), factor)
    if h * w < min_pixels:
        return _grow(height, width, math.sqrt(min_pixels / (height * width)), factor)
    return h, w


def video_size(
    num_frames: int, height: int, width: int, min_pixels: int, max_pixels: int, factor: int = 32
) -> tuple[int, int]:
    """The size of a resized video frame.

    Args:
        num_frames: how many frames were sampled, at least 2.
        height, width: source size in pixels.
        min_pixels, max_pixels: budget for frames · height · width of the result.
        factor: both sides become multiples of it (patch size · merge).

    Returns:
        (height, width) in pixels; a side is never under `factor`, even where that breaks the budget.

    Raises:
        UserError: a side under `factor`, aspect ratio above 200, or an impossible budget. The text
            names no file.
        ValueError: fewer than 2 frames.
    """
    if num_frames < 2:
        raise ValueError(f"a video needs at least 2 frames (one may be repeated), not {num_frames}")
    if min(height, width) < factor:
        raise UserError(
            f"frames of {width}x{height} pixels are too small, a side needs at least {factor}: scale it up"
        )
    _check(height, width, min_pixels, max_pixels)
    h, w = round(height / factor) * factor, round(width / factor) * factor
    total = round(num_frames / 2) * 2 * h * w
    pixels = num_frames * height * width
    if total > max_pixels:
        return _shrink(height, width, math.sqrt(pixels / max_pixels), factor)
    if total < min_pixels:
        return _grow(height, width, math.sqrt(min_pixels / pixels), factor)
    return h, w


def _check(height: int, width: int, min_pixels: int, max_pixels: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"a size of {width}x{height} pixels")
    # With min_pixels 0 a side under half the factor would round to nothing.
    if not 1 <= min_pixels <= max_pixels:
        raise UserError(f"min_pixels {min_pixels} must be at least 1 and at most max_pixels {max_pixels}")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise UserError(
            f"{width}x{height} pixels is an aspect ratio above {MAX_ASPECT}: crop it or cut it into pieces"
        )


def _shrink(height: int, width: int, beta: float, factor: int) -> tuple[int, int]:
    h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    return h, w


def _grow(height: int, width: int, beta: float, factor: int) -> tuple[int, int]:
    h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w
