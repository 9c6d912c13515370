"""One step of the loop as text, read and written on the host. Its tokens are in grammar.py.

A step is an assistant turn: a thought on one line, then one call,

    the first time is near 12
    zoom 12.0 20.0

A time is in seconds with one decimal, 0.0 to 9999.9, without leading zeros. A region is four digits: left,
top, right and bottom in tenths of the picture.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from iv3jax.errors import UserError, did_you_mean

Argument = Literal["time", "tenth", "text"]

ARGUMENTS: Mapping[str, tuple[Argument, ...]] = {
    "zoom": ("time", "time"),
    "crop": ("time", "tenth", "tenth", "tenth", "tenth"),
    "search": ("text",),
    "segments": (),
    "ground": ("text",),
    "note": ("text",),
    "recall": (),
    "verify": (),
    "answer": ("text",),
}
"""What each tool takes, in the order written. A text is the only argument of its call."""

TOOLS = tuple(ARGUMENTS)
"""The tools' names; a tool's index in here is its number everywhere else."""

ANSWER = "answer"
"""The call that ends a rollout."""

MAX_NUMBERS = max(sum(kind != "text" for kind in kinds) for kinds in ARGUMENTS.values())

WHITESPACE = " \t\n\r\v\f"
"""What a text may not begin with: one space parts it from the name."""

_FORMS = {"time": re.compile(r"(0|[1-9][0-9]{0,3})\.[0-9]"), "tenth": re.compile(r"[0-9]")}
_WANTED = {"time": 'seconds such as "12.0"', "tenth": "a digit, tenths of the picture"}
_LONGEST_TIME = 9999.9


@dataclass(frozen=True)
class Spoken:
    """What a step says.

    Attributes:
        name: of TOOLS.
        numbers: seconds for times, 0 to 9 for tenths, as many as the tool takes.
        text: the text argument; empty where the tool takes none.
        thought: one line, perhaps empty.
    """

    name: str
    numbers: tuple[float, ...] = ()
    text: str = ""
    thought: str = ""


def check_tool(name: str, source: str = "tool") -> None:
    """Raises UserError where there is no such tool; the nearest name is suggested, `source` comes first."""
    if name not in TOOLS:
        raise UserError(f"{source}: unknown tool {name[:40]!r}{did_you_mean(name, TOOLS)}")


def write(spoken: Spoken) -> str:
    """The assistant's text, such that `parse` gives the same back.

    Raises:
        UserError: an unknown tool; numbers too many, too few, out of range or finer than a tenth; a text that
            is missing, not wanted, or begins with white space; a line break in text or thought.
    """
    check_tool(spoken.name)
    kinds = ARGUMENTS[spoken.name]
    wanted = [kind for kind in kinds if kind != "text"]
    if len(spoken.numbers) != len(wanted):
        raise UserError(f"{spoken.name}: takes {len(wanted)} numbers, not {len(spoken.numbers)}")
    if "\n" in spoken.thought:
        raise UserError(f"thought: {spoken.thought[:40]!r} has a line break; a thought is one line")
    arguments = [
        _number(spoken.name, kind, value) for kind, value in zip(wanted, spoken.numbers, strict=True)
    ]
    if "text" in kinds:
        _check_text(spoken.name, spoken.text)
        arguments.append(spoken.text)
    elif spoken.text:
        raise UserError(f"{spoken.name}: takes no text, not {spoken.text[:40]!r}")
    return f"{spoken.thought}\n{' '.join([spoken.name, *arguments])}"


def parse(text: str) -> Spoken:
    """What an assistant's text says.

    Raises:
        UserError: no line break after the thought, an unknown tool, or arguments that are not the tool's.
    """
    thought, line_break, call = text.partition("\n")
    if not line_break:
        raise UserError(f"step: {text[:40]!r} has no line break between thought and call")
    name, space, rest = call.partition(" ")
    check_tool(name, "step")
    kinds = ARGUMENTS[name]
    if kinds == ("text",):
        _check_text(name, rest)
        return Spoken(name, (), rest, thought)
    words = rest.split(" ") if space else []
    if len(words) != len(kinds):
        raise UserError(f"{name}: takes {len(kinds)} numbers, not {rest[:40]!r}")
    for kind, word in zip(kinds, words, strict=True):
        if not _FORMS[kind].fullmatch(word):
            raise UserError(f"{name}: {word[:40]!r} is not {_WANTED[kind]}")
    return Spoken(name, tuple(map(float, words)), "", thought)


def _check_text(name: str, text: str) -> None:
    if not text:
        raise UserError(f"{name}: its text is missing")
    if text[0] in WHITESPACE:
        raise UserError(f"{name}: {text[:40]!r} begins with white space")
    if "\n" in text:
        raise UserError(f"{name}: {text[:40]!r} has a line break; a call is one line")


def _number(name: str, kind: str, value: float) -> str:
    """A number as it is written."""
    if kind == "tenth":
        if value not in range(10):
            raise UserError(f"{name}: {value!r} is not {_WANTED[kind]}, 0 to 9")
        return str(int(value))
    if not 0 <= value <= _LONGEST_TIME:
        raise UserError(f"{name}: {value!r} seconds is not between 0 and {_LONGEST_TIME}")
    if abs(value - round(value, 1)) > 1e-6:
        raise UserError(f"{name}: {value!r} seconds is finer than a tenth; round it to one decimal")
    # abs: −0.0 would be written with its sign.
    return f"{abs(value):.1f}"
