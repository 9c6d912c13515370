"""The long-video tasks: same samples everywhere, splits apart, true answers, judging, options."""

import io
import pickle
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from iv3jax.data.digits import CLIPS, EVENT_GAP, SIDE, Event, background, digit_images
from iv3jax.data.processor import Processor
from iv3jax.data.tasks import KINDS, TASKS
from iv3jax.data.tasks.__main__ import main
from iv3jax.data.tasks.chase import Chase
from iv3jax.data.tasks.episode import Episode, dense_times, panel, uniform_times, window_times
from iv3jax.data.tasks.judge import parse_times, score
from iv3jax.data.tasks.task import Question
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.data.video import read_video
from iv3jax.errors import UserError
from iv3jax.models.presets import preset

NAMES = sorted(TASKS)
PROCESSOR = Processor.from_dir(TINY_FOLDER, preset("tiny"))


def video_of(messages: list[dict]) -> dict:
    return messages[0]["content"][0]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_depends_on_its_number_and_the_options_only(name: str):
    source = TASKS[name](("seed=3",))
    copy = pickle.loads(pickle.dumps(TASKS[name](("seed=3", "count=50"))))
    copy[7]
    one, same = source[5].messages, copy[5].messages
    np.testing.assert_array_equal(video_of(one)["frames"], video_of(same)["frames"])
    np.testing.assert_array_equal(video_of(one)["times"], video_of(same)["times"])
    assert [turn["content"] for turn in one[1:]] == [turn["content"] for turn in same[1:]]
    assert (len(source), len(copy)) == (100_000, 50)
    assert source[5].name == source.name(5) == f"{name}/train:5"
    with pytest.raises(IndexError):
        copy[50]
    looks = {
        TASKS[name](options).case(i).episode.look
        for options in (("seed=3",), ("seed=4",), ("seed=3", "split=test"))
        for i in (5, 6)
    }
    assert len(looks) == 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("view", ["uniform", "window"])
def test_a_record_becomes_a_sample_of_the_frames_it_claims(name: str, view: str):
    source = TASKS[name]((f"view={view}", "frames=32", "questions=2"))
    for i in range(4):
        case = source.case(i)
        assert len(case.times) <= 32 and len(case.times) % 2 == 0
        assert (
            np.all(np.diff(case.times) >= 0) and 0 <= case.times[0] and case.times[-1] < case.episode.duration
        )
        sample = PROCESSOR(source[i].messages)
        assert sample.grids == ((len(case.times) // 2, 2, 2),)
        end = PROCESSOR.tokenizer.token_id("<|im_end|>")
        assert (sample.labels == end).sum() == len(case.questions)
        assert len(sample) < 32 * 5 + 70 * len(case.questions)


@pytest.mark.parametrize("split", ["train", "test"])
def test_only_the_splits_own_clips_and_handwriting_are_seen(split, monkeypatch: pytest.MonkeyPatch):
    clips, hands = set(), set()

    def clip(name: str) -> np.ndarray:
        clips.add(name)
        return background(name)

    def hand(which):
        hands.add(which)
        return digit_images(which)

    monkeypatch.setattr("iv3jax.data.tasks.episode.background", clip)
    monkeypatch.setattr("iv3jax.data.digits.digit_images", hand)
    for name in NAMES:
        for i in range(6):
            TASKS[name]((f"split={split}",))[i]
    assert clips == set(CLIPS[split]) and hands == {split}
    # That these are disjoint is test_digits' business.


def test_an_episode_is_the_same_at_the_same_time_in_any_view():
    events = (Event(42, 3.0, 4.0), Event(137, 8.25, 9.5))
    episode = Episode(200.0, events, "test", look=5)
    times = dense_times(episode.duration)
    assert len(times) == 1600
    frames = episode.frames(times)
    assert frames.shape == (1600, SIDE, SIDE, 3) and frames.dtype == np.uint8
    zoom = np.arange(60, 80)
    np.testing.assert_array_equal(episode.frames(times[zoom]), frames[zoom])
    plain = Episode(200.0, (), "test", look=5).frames(times)
    shown = ((times >= 3) & (times < 4)) | ((times >= 8.25) & (times < 9.5))
    np.testing.assert_array_equal((frames != plain).any(axis=(1, 2, 3)), shown)
    zeroed = Episode(200.0, events, "test", look=5, zeroed=True).frames(times)
    assert not zeroed[:, SIDE // 2 :].any()
    np.testing.assert_array_equal(zeroed[:, : SIDE // 2], plain[:, : SIDE // 2])
    assert np.abs(np.diff(plain.astype(int), axis=0)).mean() > 1


def test_handwriting_varies_where_it_is_wanted_in_training_only():
    events = (Event(42, 0.0, 2.0),)
    times = np.array([1.0])
    plain, varied, more = (Episode(3.0, events, "train", look=5, varied=v).frames(times) for v in (0, 1, 2))
    top = SIDE // 2
    np.testing.assert_array_equal(plain[:, :top], varied[:, :top])
    assert (
        2 < np.abs(plain.astype(int) - varied)[:, top:].mean() < np.abs(plain.astype(int) - more).mean() * 2
    )
    # Still that number: nearer to it as it was written than to any other of the same hand.
    apart = [
        np.abs(Episode(3.0, (Event(n, 0.0, 2.0),), "train", look=5).frames(times).astype(int) - varied).sum()
        for n in (42, 17, 58, 93)
    ]
    assert np.argmin(apart) == 0
    for split, differs in (("train", True), ("test", False)):
        frames = [
            TASKS["read"]((f"split={split}", f"varied={v}"))[3].messages[0]["content"][0]["frames"]
            for v in (0, 1)
        ]
        assert (frames[0] != frames[1]).any() == differs


def test_three_digits_are_drawn_in_order():
    image = panel(np.random.default_rng(0), 137, "train")
    assert image.shape == (SIDE // 2, SIDE) and image.max() <= 1
    for place, digit in enumerate((1, 3, 7)):
        shown = image[:, place * 10 : place * 10 + 10]
        # The nearest of all digits' images, stretched in the same way, is one of this digit's.
        distance = [
            min(
                np.abs(panel(np.random.default_rng(s), 100 + d, "train")[:, 20:30] - shown).sum()
                for s in range(60)
            )
            for d in range(10)
        ]
        assert int(np.argmin(distance)) == digit


@pytest.mark.parametrize("name", NAMES)
def test_layouts_are_apart_and_answers_true(name: str):
    task = KINDS[name]()
    for i in range(200):
        episode, questions = task.make(np.random.default_rng(i), "train")
        edges = [0.0, *(t for e in episode.events for t in (e.start, e.end)), episode.duration]
        gaps = np.diff(edges)
        if name != "read":
            assert np.all(gaps[2:-1:2] > EVENT_GAP - 0.02) and min(gaps[0], gaps[-1]) > EVENT_GAP / 2 - 0.02
            assert np.all((gaps[1::2] > task.shown[0] - 0.02) & (gaps[1::2] < task.shown[1] + 0.02))
        assert len({q.text for q in questions}) == len(questions)
        for question in questions:
            assert answer_by_reading(episode, question.text) == question.answer
            assert score(question, question.answer) > 0.9
            assert all(any(e.start == s and e.end == t for e in episode.events) for s, t in question.evidence)


def answer_by_reading(episode: Episode, text: str) -> str:
    """A plain answer from the events alone, worked out from the words of the question."""
    at = {t: e for e in episode.events for t in np.arange(e.start, e.end, 0.01).round(2).tolist()}
    numbers = [int(word.strip("?,.")) for word in text.split() if word.strip("?,.").isdigit()]
    if text.startswith("Go to the time"):
        event = at[numbers[0]]
        for _ in range(1 + text.count("then the time")):
            event = at[event.number]
        return f"{event.number}"
    if text.startswith("When"):
        (event,) = [e for e in episode.events if e.number == numbers[0]]
        return f"From {event.start:.1f} to {event.end:.1f} seconds."
    if text.startswith("How many"):
        return f"{sum(e.number == numbers[0] for e in episode.events)}"
    if "first" in text:
        return f"{next(e.number for e in episode.events if e.number in numbers)}"
    if " at " in text:
        return f"{at[float(text.split()[5])].number}"
    return f"{episode.events[0].number}"


def test_longer_chases_and_longer_videos():
    task = Chase(seconds=(128.0, 300.0), shown=(1.0, 2.5), hops=2, chains=4)
    for i in range(100):
        episode, questions = task.make(np.random.default_rng(i), "test")
        assert len(questions) == 4 and len(episode.events) == 12
        for question in questions:
            assert answer_by_reading(episode, question.text) == question.answer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("view", ["uniform", "window"])
def test_training_asks_what_its_frames_show_and_the_test_whatever_comes(name: str, view: str):
    missed = 0
    for split in ("train", "test"):
        source = TASKS[name]((f"view={view}", "frames=32", "questions=3", f"split={split}"))
        for i in range(40):
            case = source.case(i)
            for question in case.questions:
                seen = [((case.times >= a) & (case.times < b)).any() for a, b in question.evidence]
                assert all(seen) or split == "test"
                missed += not all(seen)
                answer = case.task.read(case.episode, question, case.times)
                assert not all(seen) or score(question, answer) > (0.19 if question.span else 0.99)
    assert (missed > 0) == (view == "uniform" and name not in ("read", "at", "when"))


def test_a_span_is_answered_as_exactly_as_the_frames_allow():
    source = TASKS["when"](("frames=32",))
    found = []
    for i in range(100):
        case = source.case(i)
        answer = case.messages()[1]["content"]
        a, b = parse_times(answer)
        (start, end), stride = case.questions[0].span, case.times[1] - case.times[0]
        assert abs(a - start) <= stride + 0.06 and abs(b - end) <= stride + 0.06
        found.append(score(case.questions[0], answer))
    assert np.mean(found) > 0.93


def test_windows_hide_their_middle():
    rng = np.random.default_rng(0)
    offsets = []
    for _ in range(300):
        times = window_times(rng, 64.0, ((30.0, 31.0), (8.0, 9.5)), 16)
        assert (
            len(times) == 16 and ((times >= 30) & (times < 31)).any() and ((times >= 8) & (times < 9.5)).any()
        )
        offsets.append(times[8:].mean() - 30.5)
    assert np.std(offsets) > 0.1
    assert window_times(rng, 31.0, ((30.0, 30.9),), 8)[-1] < 31
    with pytest.raises(ValueError, match="6 frames for 2 windows"):
        window_times(rng, 64.0, ((30.0, 31.0), (8.0, 9.5)), 6)


def test_uniform_times_are_a_files():
    np.testing.assert_allclose(uniform_times(64.0, 16), np.linspace(0, 64 - 1 / 24, 16), atol=0.03)
    assert len(uniform_times(64.0, 768)) == 128 and len(uniform_times(1.0, 32)) == 4


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("From 3.0 to 5.5 seconds.", [3, 5.5]),
        ("1:02 to 01:04.5", [62, 64.5]),
        ("1:00:05", [3605]),
        ("62.5 s - 70s", [62.5, 70]),
        ("3-5", [3, 5]),
        ("never", []),
    ],
)
def test_times_are_read_in_any_form(text: str, times: list[float]):
    assert parse_times(text) == pytest.approx(times)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("From 10.0 to 12.0 seconds.", 1),
        ("0:10 to 0:12", 1),
        ("11 to 13", 1 / 3),
        ("12 to 10", 0),
        ("11 to 11", 0),
        ("10 to 64.5", 0),
        ("10", 0),
        ("", 0),
    ],
)
def test_spans_are_judged_by_their_overlap(text: str, expected: float):
    question = Question("", "", ((0,),), (), 64.0, (10.0, 12.0))
    assert score(question, text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", 1),
        (" 42.\n", 1),
        ("The number is 42.", 1),
        ("43", 0),
        ("42 or 43", 0),
        ("", 0),
        ("4 2", 0),
        ("-", 0),
    ],
)
def test_numbers_are_judged_exactly(text: str, expected: float):
    assert score(Question("", "42", ((0,),), (), 64.0), text) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chase", ("hop=2",), "chase: unknown option 'hop'; did you mean 'hops'"),
        ("chase", ("hops=two",), "chase.hops: 'two' is no int"),
        ("chase", ("hops",), "write key=value"),
        ("chase", ("hops=1", "hops=2"), "given twice"),
        ("chase", ("hops=6",), "chase.hops: 6 with 3 chains"),
        ("chase", ("hops=0",), "chase.hops: 0"),
        ("chase", ("seconds=6",), "chase.seconds: 6 events of 1 seconds need 9"),
        ("chase", ("seconds=64,16",), "chase.seconds: 64,16"),
        ("chase", ("seconds=1,2,3",), "chase.seconds: '1,2,3' is no number|a number, or two"),
        ("chase", ("shown=0.5",), "chase.shown: 0.5"),
        ("chase", ("split=val",), "chase.split: 'val' is not one of train, test"),
        ("chase", ("view=zoom",), "chase.view"),
        ("chase", ("count=0",), "chase.count: 0 must be 1"),
        ("chase", ("seconds=900", "frames=4"), "almost never show"),
        ("count", ("frames=16",), "16 frames almost never show"),
        ("count", ("frames=16", "view=window"), "too few for view=window; it needs 24"),
        ("count", ("most=9",), "count.most: 9"),
        ("order", ("events=1",), "order.events: 1"),
        ("ground", ("events=0",), "ground.seconds: 0 events"),
    ],
)
def test_wrong_options_are_refused_in_a_line(name: str, options: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message) as error:
        TASKS[name](options)
    assert "\n" not in str(error.value)


def test_an_episode_can_be_written_as_a_file(tmp_path: Path):
    path, shown = tmp_path / "a.mp4", io.StringIO()
    with redirect_stdout(shown):
        main(["chase", str(path), "seconds=16"])
    video = read_video(path, fps=8.0, min_pixels=1, max_pixels=1024)
    assert abs(video.duration - 16) < 0.1
    episode = TASKS["chase"](("split=test", "seconds=16")).case(0).episode
    assert shown.getvalue().startswith("Go to the time shown at ")
    for event in episode.events:
        assert f"{event.number:02} from {event.start} to {event.end} seconds" in shown.getvalue()
    with pytest.raises(UserError, match="at most 100 seconds"):
        main(["chase", str(path), "seconds=200", "frames=768"])
    with pytest.raises(UserError, match="usage"):
        main(["chase"])
