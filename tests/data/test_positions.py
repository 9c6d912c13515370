"""mrope_positions against the authors' values, and against a plain loop over tokens."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from iv3jax.data.positions import mrope_positions
from iv3jax.models.config import ModelConfig

IMAGE, VIDEO, START, END, TEXT = 508, 509, 510, 511, 1
CASES = ["gqa/text", "gqa/image", "gqa/video", "m2la/text", "m2la/video", "m2la/packed"]


@pytest.mark.parametrize("name", CASES)
def test_golden(golden, name):
    model, case_name = name.split("/")
    config = ModelConfig.from_file(golden / model)
    case = load_file(golden / model / "cases" / f"{case_name}.safetensors")
    ids, expect = case["input_ids"][0], case["position_ids"][:, 0]
    bounds = case["cu_seqlens"].tolist() if "cu_seqlens" in case else [0, len(ids)]
    grids = {
        config.image_token_id: [tuple(g) for g in case.get("grid_thw_image", np.zeros((0, 3), int)).tolist()],
        config.video_token_id: [tuple(g) for g in case.get("grid_thw_video", np.zeros((0, 3), int)).tolist()],
    }
    for start, end in pairwise(bounds):
        sample = ids[start:end]
        own = []
        # An item begins where its first temporal patch does; a later patch of a video is part of it.
        patches = 0
        for i in np.flatnonzero(sample == config.vision_start_token_id):
            if patches == 0:
                own.append(grids[int(sample[i + 1])].pop(0))
                patches = own[-1][0]
            patches -= 1
        got = mrope_positions(sample, config.image_token_id, config.video_token_id, own, 2)
        np.testing.assert_array_equal(got, expect[:, start:end])
        assert got.dtype == np.int32
    assert not any(grids.values())


def reference(blocks) -> np.ndarray:
    """SPEC §5 read aloud: one token after the other."""
    out, at = [], 0
    for block in blocks:
        if block is None:
            out.append((at, at, at))
            at += 1
            continue
        h, w = block
        out += [(at, at + y, at + x) for y in range(h) for x in range(w)]
        at = max(max(p) for p in out[-h * w :]) + 1
    return np.array(out).reshape(-1, 3).T


ITEM = st.tuples(st.sampled_from([IMAGE, VIDEO]), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


@given(st.lists(st.integers(0, 3) | ITEM, max_size=6))
def test_equals_a_loop_over_tokens(parts):
    ids, blocks, grids = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += [TEXT] * part
            blocks += [None] * part
            continue
        token, t, h, w = part
        t = 1 if token == IMAGE else t
        grids.append((t, 2 * h, 2 * w))
        for _ in range(t):
            ids += [START, *[token] * (h * w), END]
            blocks += [None, (h, w), None]
    got = mrope_positions(np.array(ids, np.int32), IMAGE, VIDEO, grids, 2)
    np.testing.assert_array_equal(got, reference(blocks))


def test_too_few_vision_tokens():
    with pytest.raises(ValueError, match="give 4 vision tokens, the text has 3"):
        mrope_positions(np.array([START, VIDEO, VIDEO, VIDEO, END]), IMAGE, VIDEO, [(1, 4, 4)], 2)


def test_text_inside_a_temporal_patch():
    with pytest.raises(ValueError, match="not contiguous"):
        mrope_positions(np.array([VIDEO, TEXT, VIDEO]), IMAGE, VIDEO, [(1, 2, 4)], 2)
