"""zoom and crop: temporal patches of the video, looked at again."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from iv3jax.mcr.tools.strip import Strip, join, laid_out, piece, time
from iv3jax.mcr.wording import Wording
from iv3jax.mcr.world import World
from iv3jax.typing import Array


class Look(NamedTuple):
    """What a look gives: the strip, (B,) bool where something was seen, and the (B, 2) window in tenths."""

    strip: Strip
    seen: Array
    window: Array


def spread(count: Array | int, frames: int) -> Array:
    """(…, frames) places among `count` patches, evenly from the first to the last; all where there are fewer.

    Places from `count` on say that there is no further patch.
    """
    count = jnp.asarray(count)[..., None]
    place = jnp.arange(frames)
    if frames == 1:
        return jnp.where(count > 0, (count - 1) // 2, 0)
    # Rounded half up, in whole numbers: the same on every machine.
    even = (2 * place * (count - 1) + frames - 1) // (2 * (frames - 1))
    return jnp.where(count > frames, even, place)


def zoom(
    words: Wording, world: World, frames: int, grid: tuple[int, int], prompt: Array, call: Array
) -> Look:
    """The patches of a window, `frames` of them, or all where there are fewer.

    A patch is in the window if the time written beside it is, the end not included. A window between two
    patches shows the one nearest to its middle. A window past the end of the video is cut there.

    Args:
        prompt: (B,) int32, the row of the world. call: (B, 2) int32, start and end in tenths.
    """
    start, end = call[:, 0], call[:, 1]
    times, duration = world.times[prompt], world.duration[prompt]
    valid = (start < end) & (start < duration)
    end = jnp.minimum(end, duration)
    inside = (times >= start[:, None]) & (times < end[:, None])
    count = jnp.sum(inside, axis=1)
    nearest = jnp.argmin(jnp.abs(2 * times - (start + end)[:, None]), axis=1)
    first = jnp.where(count > 0, jnp.argmax(inside, axis=1), nearest)
    count = jnp.maximum(count, 1)
    place = spread(count, frames)
    patches = first[:, None] + place
    patches = jnp.minimum(patches, times.shape[1] - 1)
    when = jnp.take_along_axis(times, patches, axis=1)
    present = valid[:, None] & (place < count[:, None])
    whole = jnp.broadcast_to(jnp.array([0, 0, 9, 9]), (patches.size, 4))
    shown = _patch(words, when.ravel(), patches.ravel(), whole, grid, present.ravel())
    refused = _refusal(words, words.no_window, duration, ~valid)
    return Look(join(refused, laid_out(shown, len(prompt))), valid, jnp.stack([start, end], axis=1))


def crop(words: Wording, world: World, grid: tuple[int, int], prompt: Array, call: Array) -> Look:
    """A region of the patch that is nearest to a time: its vision tokens that the region touches.

    They form a grid of their own, as a smaller picture would.

    Args:
        prompt: (B,) int32. call: (B, 5) int32: time in tenths of a second; left, top, right and bottom as
            tenths of the picture from 0 to 9, all four included: `0 0 9 9` is the whole.
    """
    at, region = call[:, 0], call[:, 1:]
    times, duration = world.times[prompt], world.duration[prompt]
    valid = (at < duration) & (region[:, 0] <= region[:, 2]) & (region[:, 1] <= region[:, 3])
    nearest = jnp.argmin(jnp.abs(times - at[:, None]), axis=1)
    when = times[jnp.arange(len(prompt)), nearest]
    shown = _patch(words, when, nearest, region, grid, valid)
    refused = _refusal(words, words.no_crop, duration, ~valid)
    return Look(join(refused, shown), valid, jnp.stack([when, when], axis=1))


def _patch(
    words: Wording, when: Array, patch: Array, region: Array, grid: tuple[int, int], present: Array
) -> Strip:
    """Temporal patches (n,) at times (n,), or a region (n, 4) of each: its time and its vision tokens."""
    height, width = grid
    row, column = (x[None] for x in np.divmod(np.arange(height * width), width))
    left, top, right, bottom = (x[:, None] for x in region.T)
    first_row, last_row = top * height // 10, ((bottom + 1) * height - 1) // 10
    first_column, last_column = left * width // 10, ((right + 1) * width - 1) // 10
    inside = (row >= first_row) & (row <= last_row) & (column >= first_column) & (column <= last_column)
    real = inside & present[:, None]
    # The position moves on once, after the whole patch.
    last = real & (row == last_row) & (column == last_column)
    side = jnp.maximum(last_row - first_row, last_column - first_column) + 1
    tokens = Strip(
        jnp.broadcast_to(jnp.asarray(words.video_pad), real.shape),
        real,
        jnp.where(real, patch[:, None] * (height * width) + np.arange(height * width), -1),
        jnp.where(real, row - first_row, 0),
        jnp.where(real, column - first_column, 0),
        jnp.where(last, side, 0),
    )
    return join(
        piece(words.open, present),
        time(words, when, present),
        piece(words.close, present),
        piece(words.vision_start, present),
        tokens,
        piece(words.vision_end, present),
    )


def _refusal(words: Wording, why: Array, duration: Array, present: Array) -> Strip:
    """A sentence that ends with the length of the video."""
    return join(piece(why, present), time(words, duration, present), piece(words.seconds, present))
