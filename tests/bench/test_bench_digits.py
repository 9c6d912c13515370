"""The digit table: its scoring, its intervals, and that a model which knows nothing scores nothing."""

import numpy as np
import pytest

from iv3jax.bench.digits import (
    CASES,
    _best_fixed_interval,
    bench_digits,
    format_table,
    make_case,
    score,
)
from iv3jax.checkpoint.load import load
from iv3jax.data.digits import Event, Question


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("read", "42", 1),
        ("read", " 42 ", 1),
        ("read", "43", 0),
        ("read", "42 and 17", 0),
        ("at", "42", 1),
        ("when", "From 2.0 to 6.0 seconds.", 1),
        ("when", "From 2 to 4 seconds.", 0.5),
        ("when", "From 6.0 to 2.0 seconds.", 0),
        ("when", "From 2.0", 0),
        ("when", "", 0),
    ],
)
def test_score(task, text: str, expected: float):
    assert score(Question(task, "?", "42", Event(42, 2.0, 6.0)), text) == pytest.approx(expected)


def test_the_control_differs_in_pixels_only():
    for case in CASES[:4]:
        (shown, question), (zeroed, same) = (make_case(case, [1, 2, 3], zeroed=z) for z in (False, True))
        assert question == same
        np.testing.assert_array_equal(shown.times, zeroed.times)
        assert not zeroed.frames[:, 16:].any() and shown.frames[:, 16:].any()


def test_best_fixed_interval_beats_any_guess():
    made = [make_case(CASES[2], [7, i]) for i in range(20)]
    best = _best_fixed_interval(made)
    middle = [score(q, f"{v.duration / 4:.2f} {v.duration * 3 / 4:.2f}") for v, q in made]
    assert np.mean(middle) - 1e-3 <= best < 1


@pytest.mark.slow
def test_an_untrained_model_knows_nothing():
    result = bench_digits(load("tiny", random_weights=True), 20)
    assert [row["name"] for row in result["rows"]] == [case.name for case in CASES]
    for row in result["rows"]:
        assert row["score"] <= 0.1
        assert row["videos"] == (2 if row["control"] is None else 20)
    assert "IoU" in format_table(result)
