"""Frame numbers, times and timestamp texts: the golden table, and what must hold for any video."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iv3jax.data.sampling import average_rate, sample_indices, temporal_patch_times, timestamp_text
from iv3jax.errors import UserError


def test_golden(golden: Path):
    rows = json.loads((golden / "processing.json").read_text())["sampling"]
    assert rows
    for row in rows:
        bounds = row["min_frames"], row["max_frames"]
        indices = sample_indices(row["total_frames"], row["source_fps"], row["fps"], *bounds)
        texts = [timestamp_text(t) for t in temporal_patch_times(indices / row["source_fps"])]
        assert indices.dtype == np.int64
        assert (len(indices), indices.sum()) == (row["num_indices"], row["index_sum"]), row
        for key, values in (("", indices.tolist()), ("timestamps_text_", texts)):
            first, last = row[f"{key}first"], row[f"{key}last"]
            assert (values[: len(first)], values[-len(last) :]) == (first, last), row


@given(st.integers(1, 10**6), st.floats(1, 120), st.floats(0.1, 60), st.integers(1, 20), st.integers(0, 2000))
def test_indices_are_even_in_number_and_cover_the_video(total, source_fps, fps, low, more):
    indices = sample_indices(total, source_fps, fps, low, low + more)
    assert len(indices) % 2 == 0
    assert low <= len(indices) <= low + more + 1
    assert (np.diff(indices) >= 0).all()
    assert indices[0] == 0
    assert indices[-1] == total - 1 or len(indices) == 2


@pytest.mark.parametrize(
    ("fps", "bounds"), [(0, (4, 8)), (-1, (4, 8)), (float("nan"), (4, 8)), (2, (0, 8)), (2, (8, 4))]
)
def test_refusals(fps, bounds):
    with pytest.raises(UserError):
        sample_indices(100, 25.0, fps, *bounds)


def test_impossible_videos():
    for total, rate in ((0, 25.0), (10, 0.0), (10, float("nan"))):
        with pytest.raises(ValueError, match="frames"):
            sample_indices(total, rate, 2.0, 4, 8)


def test_patch_times():
    assert temporal_patch_times(np.array([0.0, 1.0, 2.0, 2.0])).tolist() == [0.5, 2.0]
    with pytest.raises(ValueError, match="pairs"):
        temporal_patch_times(np.array([0.0, 1.0, 2.0]))


def test_average_rate():
    film = 24000 / 1001
    milliseconds = np.round(np.arange(500) / film, 3)
    assert average_rate(milliseconds, milliseconds[-1] + 0.042, [25.0, film], 0.001) == film
    uneven = np.array([0.0, 0.1, 0.5, 0.6])
    assert average_rate(uneven, 1.0, [10.0], 0.001) == 4.0
