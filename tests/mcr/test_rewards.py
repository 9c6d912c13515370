"""Rewards: parsers on what models write, and each part against its definition."""

import numpy as np
import pytest

from iv3jax.data.tasks.task import Question
from iv3jax.errors import UserError
from iv3jax.mcr.rewards import (
    PARTS,
    Facts,
    RewardConfig,
    evidence_seen,
    frames_seen,
    overlaps,
    parse_choice,
    reward,
)

OPTIONS = ("A dog", "A cat", "Two birds", "Nothing")
NUMBER = Question("Which number?", "45", (), ((10.0, 11.0), (30.0, 31.0)), 64.0)
TIME = Question("When?", "From 10.0 to 20.0 seconds.", (), ((10.0, 20.0),), 64.0, (10.0, 20.0))
CHOICE = Question("What is seen?", "B", (), (), 64.0)
ALL = RewardConfig(dict.fromkeys(PARTS, 1.0))


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", 1),
        ("b", 1),
        (" (B) ", 1),
        ("B.", 1),
        ("B)", 1),
        ("B. A cat", 1),
        ("B: A cat", 1),
        ("The answer is B", 1),
        ("the answer is (B), because it purrs", 1),
        ("Answer: B", 1),
        ("It is a cat, so (B).", 1),
        ("A cat", 1),
        ("a dog.", 0),
        ("A", 0),
        ("D", 3),
        ("nothing", 3),
        ("E", None),
        ("", None),
        ("A dog is running", None),
        ("The answer is a cat", None),
        ("(A) or (B)", None),
        ("42", None),
    ],
)
def test_options_named(text, option):
    assert parse_choice(text, OPTIONS) == option


def test_choice():
    assert reward(ALL, CHOICE, Facts("(B)", 3), OPTIONS).parts == {
        "iou": 0, "choice": 1, "exact": 0, "format": 1, "evidence": 0, "step": -3,
    }  # fmt: skip
    wrong = reward(ALL, CHOICE, Facts("A dog", 3), OPTIONS).parts
    assert (wrong["choice"], wrong["format"]) == (0, 1)
    unread = reward(ALL, CHOICE, Facts("who knows", 3), OPTIONS).parts
    assert (unread["choice"], unread["format"]) == (0, 0)
    with pytest.raises(ValueError, match="none of the options"):
        reward(ALL, NUMBER, Facts("B", 1), OPTIONS)


@pytest.mark.parametrize(
    ("text", "iou", "form"),
    [
        ("From 10.0 to 20.0 seconds.", 1.0, 1),
        ("00:15 - 00:25", 1 / 3, 1),
        ("0:10 to 0:20", 1.0, 1),
        ("from 20 to 10", 0.0, 1),
        ("15", 0.0, 0),
        ("from 15 to 65", 0.0, 1),
        ("12 12", 0.0, 1),
        ("no idea", 0.0, 0),
    ],
)
def test_start_and_end(text, iou, form):
    parts = reward(ALL, TIME, Facts(text, 1)).parts
    assert parts["iou"] == pytest.approx(iou)
    assert parts["format"] == form
    assert parts["exact"] == parts["choice"] == 0


@pytest.mark.parametrize(
    ("text", "exact", "form"), [("45", 1, 1), ("It is 45.", 1, 1), ("54", 0, 1), (" ", 0, 0), (None, 0, 0)]
)
def test_exact(text, exact, form):
    parts = reward(ALL, NUMBER, Facts(text, 1)).parts
    assert (parts["exact"], parts["format"], parts["iou"]) == (exact, form, 0)


def test_no_answer_is_worth_what_was_seen_and_costs_its_steps():
    got = reward(ALL, TIME, Facts(None, 5, ((9.0, 10.5),)))
    assert got.parts == {"iou": 0, "choice": 0, "exact": 0, "format": 0, "evidence": 1, "step": -5}
    assert got.total == -4
    assert reward(ALL, CHOICE, Facts(None, 1), OPTIONS).parts["choice"] == 0


def test_evidence_is_the_share_of_spans_looked_at_or_named():
    assert evidence_seen(NUMBER, Facts("45", 1)) == 0
    assert evidence_seen(NUMBER, Facts("45", 1, ((0.0, 10.0),))) == 0
    assert evidence_seen(NUMBER, Facts("45", 1, ((0.0, 10.1),))) == 0.5
    assert evidence_seen(NUMBER, Facts("45", 1, ((0.0, 64.0),))) == 1
    assert evidence_seen(NUMBER, Facts("10 31", 1)) == 0, "numbers that are no start and end cite nothing"
    assert evidence_seen(TIME, Facts("19 25", 1)) == 1
    assert evidence_seen(TIME, Facts("19 99", 1)) == 0
    assert evidence_seen(CHOICE, Facts("B", 1, ((0.0, 64.0),))) == 0


def test_a_moment_overlaps_what_it_lies_in():
    assert overlaps((10.0, 10.0), (10.0, 11.0))
    assert not overlaps((11.0, 11.0), (10.0, 11.0))
    assert not overlaps((11.0, 12.0), (10.0, 11.0))


def test_frames_seen():
    times = np.array([0, 15, 30, 1_000_000])
    assert frames_seen(times, np.array([-1, 4, 5, -1, 2, 3, 4]), 2) == ((1.5, 1.5), (3.0, 3.0))
    assert frames_seen(times, np.array([-1]), 2) == ()


def test_total_is_the_weighted_sum():
    config = RewardConfig({"exact": 1.0, "evidence": 0.5, "step": 0.01})
    got = reward(config, NUMBER, Facts("45", 4, ((10.2, 10.4),)))
    assert got.total == pytest.approx(1 + 0.25 - 0.04)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"extact": 1.0}, "'extact'; did you mean 'exact'"),
        ({"iou": "1"}, "reward.iou: the weight is '1'"),
        ({"iou": float("nan")}, "reward.iou"),
        ({"step": 0.0}, "no weight is above 0"),
        ({}, "no weight is above 0"),
    ],
)
def test_wrong_configs_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        RewardConfig(weights)
