"""The digit task: its videos show what its questions ask, and training never sees the test's pixels."""

from pathlib import Path

import numpy as np
import pytest

from iv3jax.data.digits import (
    CLIPS,
    EVENT_GAP,
    EVENT_SECONDS,
    SIDE,
    ask_about,
    background,
    conversation,
    digit_images,
    interval_iou,
    make_events,
    make_video,
    most_events,
    write_video,
)
from iv3jax.data.video import read_video


def test_splits_share_no_clip_and_no_handwriting():
    assert not set(CLIPS["train"]) & set(CLIPS["test"])
    train, test = digit_images("train"), digit_images("test")
    for digit in range(10):
        seen = {image.tobytes() for image in train[digit]}
        repeats = sum(image.tobytes() in seen for image in test[digit])
        assert repeats == 0 and len(test[digit]) >= 25
    assert sum(map(len, train)) + sum(map(len, test)) == 1797


@pytest.mark.parametrize("count", [1, 2, 3])
def test_events_are_apart_and_inside(count: int):
    rng = np.random.default_rng(count)
    for duration in rng.uniform(count * 4.5 + 0.6, 40, 50):
        assert most_events(duration, EVENT_SECONDS[0]) >= count
        events = make_events(rng, count, duration)
        assert len({event.number for event in events}) == count
        edges = [0.0, *(t for event in events for t in (event.start, event.end)), duration]
        gaps = np.diff(edges)
        assert np.all(gaps[0::2] >= EVENT_GAP - 0.02)
        assert np.all((gaps[1::2] > EVENT_SECONDS[0] - 0.02) & (gaps[1::2] < EVENT_SECONDS[1] + 0.02))
    with pytest.raises(ValueError, match="do not fit"):
        make_events(rng, count, count * 4.0)


def test_digits_are_drawn_exactly_while_shown():
    rng = np.random.default_rng(0)
    events = make_events(rng, 2, 14.0)
    made = [
        make_video(np.random.default_rng(5), "train", duration=14.0, events=shown) for shown in (events, ())
    ]
    with_digits, without = made
    np.testing.assert_array_equal(with_digits.times, without.times)
    changed = np.any(with_digits.frames != without.frames, axis=(1, 2, 3))
    inside = np.zeros(len(changed), bool)
    for event in events:
        inside |= (with_digits.times >= event.start) & (with_digits.times < event.end)
    np.testing.assert_array_equal(changed, inside)
    np.testing.assert_array_equal(with_digits.frames[:, : SIDE // 2], without.frames[:, : SIDE // 2])


def test_zeroed_control_keeps_everything_but_the_digits():
    rng = np.random.default_rng(0)
    events = make_events(rng, 1, 12.0)
    shown, zeroed, other = (
        make_video(np.random.default_rng(5), "test", duration=12.0, events=which, zeroed=zero)
        for which, zero in ((events, False), (events, True), ((), True))
    )
    assert not zeroed.frames[:, SIDE // 2 :].any()
    np.testing.assert_array_equal(zeroed.frames[:, : SIDE // 2], shown.frames[:, : SIDE // 2])
    # Nothing tells it from a video in which no number was ever shown.
    np.testing.assert_array_equal(zeroed.frames, other.frames)


def test_the_trained_answer_is_close_to_the_truth():
    rng = np.random.default_rng(3)
    scores = []
    for _ in range(200):
        video = make_video(rng, "train", duration=14.0, events=make_events(rng, 2, 14.0))
        question = ask_about(rng, video, "when", video.events[1])
        words = question.answer.removesuffix(" seconds.").split()
        assert str(question.event.number) in question.text
        truth = (question.event.start, question.event.end)
        scores.append(interval_iou((float(words[1]), float(words[3])), truth))
    assert min(scores) > 0.6 and np.mean(scores) > 0.8


def test_conversation_shows_the_video_once():
    rng = np.random.default_rng(3)
    video = make_video(rng, "train", duration=14.0, events=make_events(rng, 2, 14.0))
    questions = [ask_about(rng, video, "at", video.events[i]) for i in (0, 1, 0)]
    turns = conversation(video, questions, answered=True)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
    kinds = [part["type"] for turn in turns[::2] for part in turn["content"]]
    assert kinds == ["video", "text", "text", "text"]


def test_a_written_file_shows_the_same_events(tmp_path: Path):
    rng = np.random.default_rng(1)
    events = make_events(rng, 1, 8.0)
    path = tmp_path / "a.mp4"
    write_video(path, rng, "test", 8.0, events)
    video = read_video(path, min_pixels=1, max_pixels=1024)
    assert abs(video.duration - 8.0) < 0.05 and video.source_size == (144, 176)
    # The panel is a third as bright as the clip where there is no ink, so its minimum tells.
    inside = (video.times >= events[0].start) & (video.times < events[0].end)
    panel = np.sort(video.frames[:, SIDE // 2 :].reshape(len(video.times), -1), axis=1)[:, 100]
    assert panel[inside].max() < panel[~inside].min()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 2), (1, 3), 1 / 3),
        ((0, 4), (1, 2), 1 / 4),
        ((0, 1), (2, 3), 0),
        ((2, 1), (1, 2), 0),
        ((1, 1), (1, 1), 0),
        ((1, 2), (1, 2), 1),
    ],
)
def test_interval_iou(first: tuple[float, float], second: tuple[float, float], expected: float):
    assert interval_iou(first, second) == pytest.approx(expected)


def test_backgrounds_are_real_and_move():
    frames = background(CLIPS["test"][0])
    assert frames.shape[1:] == (SIDE, SIDE, 3) and len(frames) > 20
    assert frames.std() > 20 and np.abs(np.diff(frames.astype(int), axis=0)).mean() > 1
