"""Resized sizes: the golden table, and what must hold for any size."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iv3jax.data.sizes import MAX_ASPECT, image_size, video_size
from iv3jax.errors import UserError

SIDES = st.integers(1, 5000)
BUDGETS = st.tuples(st.integers(1, 1 << 20), st.integers(0, 1 << 27)).map(lambda b: (b[0], b[0] + b[1]))


@pytest.mark.parametrize(
    ("table", "function", "keys"),
    [
        ("image_resize", image_size, ("height", "width")),
        ("video_resize", video_size, ("num_frames", "height", "width")),
    ],
)
def test_golden(golden: Path, table, function, keys):
    rows = json.loads((golden / "processing.json").read_text())[table]
    assert rows
    for row in rows:
        arguments = [row[key] for key in (*keys, "min_pixels", "max_pixels")]
        if row["expect"] is None:
            with pytest.raises(UserError):
                function(*arguments)
        else:
            assert list(function(*arguments)) == row["expect"], row


@given(SIDES, SIDES, BUDGETS)
def test_image_size_holds_the_budget(height, width, budget):
    low, high = budget
    if max(height, width) / min(height, width) > MAX_ASPECT:
        with pytest.raises(UserError, match="aspect"):
            image_size(height, width, low, high)
        return
    h, w = image_size(height, width, low, high)
    assert h % 32 == w % 32 == 0 and min(h, w) >= 32
    # Rounding up to whole blocks may pass a tight budget; a side of one block cannot shrink.
    grown = round(height / 32) * round(width / 32) * 1024 < low
    assert h * w <= high or min(h, w) == 32 or grown
    assert h * w >= low or round(height / 32) * round(width / 32) * 1024 > high


@given(st.integers(2, 2048), st.integers(32, 5000), st.integers(32, 5000), BUDGETS)
def test_video_size_holds_the_budget(frames, height, width, budget):
    low, high = budget
    h, w = video_size(frames, height, width, low, high)
    assert h % 32 == w % 32 == 0 and min(h, w) >= 32
    rounded = round(frames / 2) * 2 * round(height / 32) * round(width / 32) * 1024
    if low <= rounded <= high:
        assert (h, w) == (round(height / 32) * 32, round(width / 32) * 32)
    elif rounded > high:
        assert frames * h * w <= high or min(h, w) == 32
    else:
        assert frames * h * w >= low


def test_refusals():
    with pytest.raises(UserError, match="640x31"):
        video_size(4, 31, 640, 1024, 1 << 24)
    with pytest.raises(UserError, match="crop"):
        video_size(4, 32, 6401, 1024, 1 << 24)
    with pytest.raises(UserError, match="min_pixels"):
        image_size(64, 64, 2048, 1024)
    with pytest.raises(UserError, match="min_pixels"):
        image_size(64, 64, 0, 1024)
    with pytest.raises(ValueError, match="2 frames"):
        video_size(1, 64, 64, 1024, 1 << 24)
