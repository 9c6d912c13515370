"""How good an answer is: exact match, or temporal IoU for a start and end (SPEC §6). Asks nothing."""

import re

from iv3jax.data.digits import interval_iou
from iv3jax.data.tasks.task import Question

_TIME = re.compile(r"(?:(\d+):)?(?:(\d+):)?(\d+(?:\.\d+)?)")


def score(question: Question, text: str) -> float:
    """From 0 to 1, for the text of an answer without its end token.

    A start and end are the first two times in it; the score is 0 where there are none, where the first is not
    before the second, or where one is past the end of the video. Otherwise the text must be the answer, or
    hold one number only, and that the right one.
    """
    if question.span is None:
        numbers = re.findall(r"\d+(?:\.\d+)?", text)
        same = text.strip().rstrip(".").lower() == question.answer.rstrip(".").lower()
        return float(same or (len(numbers) == 1 and float(numbers[0]) == _number(question.answer)))
    times = parse_times(text)[:2]
    if len(times) < 2 or max(times) > question.duration:
        return 0.0
    return interval_iou((times[0], times[1]), question.span)


def parse_times(text: str) -> list[float]:
    """All times of a text, in seconds: "62", "62.5 s", "1:02", "01:02.5", "1:01:02"."""
    found = []
    for first, second, last in _TIME.findall(text):
        seconds = float(last)
        for unit, part in zip((60, 3600), [p for p in (second, first) if p], strict=False):
            seconds += unit * int(part)
        found.append(seconds)
    return found


def _number(text: str) -> float | None:
    found = re.fullmatch(r"\d+(?:\.\d+)?", text)
    return float(text) if found else None
