"""Calls as text: what is written is read back, and what is wrong is said in one line."""

import pytest
from hypothesis import given
from spoken import steps

from iv3jax.errors import UserError
from iv3jax.mcr.language import Spoken, parse, write


@given(steps())
def test_what_is_written_is_read_back(step):
    assert parse(write(step)) == step


def test_the_form_of_each_call():
    thought = "the first time is near 12."
    steps = [
        (Spoken("zoom", (12, 20.5), thought=thought), f"{thought}\nzoom 12.0 20.5"),
        (Spoken("crop", (0, 1, 2, 8, 9)), "\ncrop 0.0 1 2 8 9"),
        (Spoken("search", text="a red ball"), "\nsearch a red ball"),
        (Spoken("segments"), "\nsegments"),
        (Spoken("answer", text="12.5 seconds, or 0:12 "), "\nanswer 12.5 seconds, or 0:12 "),
    ]
    for step, text in steps:
        assert write(step) == text
        assert parse(text) == step


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Spoken("zom", (1, 2)), "tool: unknown tool 'zom'; did you mean 'zoom'?"),
        (Spoken("zoom", (1,)), "zoom: takes 2 numbers, not 1"),
        (Spoken("zoom", (1, 2), "x"), "zoom: takes no text, not 'x'"),
        (Spoken("search"), "search: its text is missing"),
        (Spoken("note", text=" x"), "note: ' x' begins with white space"),
        (Spoken("note", text="x\ny"), "note: 'x\\\\ny' has a line break"),
        (Spoken("recall", thought="x\n"), "thought: 'x\\\\n' has a line break"),
        (Spoken("zoom", (1, 10000)), "zoom: 10000 seconds is not between 0 and 9999.9"),
        (Spoken("zoom", (-0.1, 1)), "zoom: -0.1 seconds is not between"),
        (Spoken("zoom", (float("nan"), 1)), "zoom: nan seconds is not between"),
        (Spoken("zoom", (1.25, 2)), "zoom: 1.25 seconds is finer than a tenth; round it"),
        (Spoken("crop", (1, 0, 0, 10, 9)), "crop: 10 is not a digit, tenths of the picture, 0 to 9"),
        (Spoken("crop", (1, 0, 0, 2.5, 9)), "crop: 2.5 is not a digit"),
    ],
)
def test_what_cannot_be_written(step, message):
    with pytest.raises(UserError, match=message) as error:
        write(step)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zoom 1.0 2.0", "step: 'zoom 1.0 2.0' has no line break"),
        ("", "step: '' has no line break"),
        ("x\nzooms 1.0 2.0", "step: unknown tool 'zooms'; did you mean 'zoom'?"),
        ("x\n", "step: unknown tool ''; did you mean"),
        ("x\nzoom 1.0", "zoom: takes 2 numbers, not '1.0'"),
        ("x\nzoom", "zoom: takes 2 numbers, not ''"),
        ("x\nzoom 1.0  2.0", "zoom: takes 2 numbers"),
        ("x\nzoom 1.0 2", "zoom: '2' is not seconds such as"),
        ("x\nzoom 01.0 2.0", "zoom: '01.0' is not seconds"),
        ("x\nzoom ١.٠ 2.0", "is not seconds"),
        ("x\nzoom 12345.0 2.0", "is not seconds"),
        ("x\ncrop 1.0 1 2 3 10", "crop: '10' is not a digit, tenths"),
        ("x\nrecall ", "recall: takes 0 numbers, not ''"),
        ("x\nrecall all", "recall: takes 0 numbers, not 'all'"),
        ("x\nrecall\n", "step: unknown tool 'recall"),
        ("x\nsearch", "search: its text is missing"),
        ("x\nsearch  y", "search: ' y' begins with white space"),
        ("x\nanswer y\nz", "answer: 'y.*' has a line break"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)
