"""How a step may be spelled: which tokens there are for it, and the states between them. Host only.

grammar.py makes tables of this; nothing else needs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.language import ANSWER, ARGUMENTS, TOOLS, WHITESPACE

PLAIN, ENDER, OPENER, SOLID = "plain", "ender", "opener", "solid"
"""Sets of tokens; see `token_sets`."""

Label = int | str
"""What an edge takes: one token, or any of a set."""


class Spelling(NamedTuple):
    """The tokens of a call: `<|im_end|>`, a space, the decimal point, ten digits, and those of each name."""

    end: int
    space: int
    point: int
    digits: tuple[int, ...]
    names: dict[str, tuple[int, ...]]


def spell(tokenizer: Tokenizer, tools: Sequence[str]) -> Spelling:
    """The tokens that calls are written with.

    Raises:
        UserError: the tokenizer joins digits, or a name with what stands beside it: then the text of a call
            would have other tokens than the loop samples.
    """
    singles = " .0123456789"
    ids = [tokenizer.encode(character) for character in singles]
    names = {tool: tuple(tokenizer.encode(tool)) for tool in tools}
    line = tokenizer.encode("\n")
    known = dict(zip(singles, ids, strict=True))
    for tool, name in names.items():
        numbers = " 9012.3 45 6.7 8"
        wanted = [*line, *name, *(i for character in numbers for i in known[character])]
        text = f"\n{tool}{numbers}"
        if tokenizer.encode(text) != wanted or any(len(i) != 1 for i in ids):
            raise UserError(
                f"tokenizer: {text[1:]!r} is not one token a digit; calls cannot be written with it"
            )
    space, point, *digits = (i[0] for i in ids)
    return Spelling(tokenizer.token_id("<|im_end|>"), space, point, tuple(digits), names)


def token_sets(tokenizer: Tokenizer, vocab_size: int) -> dict[str, np.ndarray]:
    """(vocab_size,) bool for each set of text tokens; special, added and unknown ones are in none.

    PLAIN: without a line break. ENDER: with one, at its end. OPENER: plain, a space and then no white space.
    SOLID: plain, not beginning with white space.

    Raises:
        UserError: the tokenizer has more tokens than `vocab_size`.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"tokenizer: {tokenizer.vocab_size} tokens, but the model has only {vocab_size}")
    sets = {name: np.zeros(vocab_size, bool) for name in (PLAIN, ENDER, OPENER, SOLID)}
    white = WHITESPACE.encode()
    for index in range(tokenizer.vocab_size):
        text = tokenizer.text_bytes(index)
        if not text:
            continue
        if b"\n" in text:
            sets[ENDER][index] = text.index(b"\n") == len(text) - 1
            continue
        sets[PLAIN][index] = True
        sets[OPENER][index] = text[:1] == b" " and len(text) > 1 and text[1] not in white
        sets[SOLID][index] = text[0] not in white
    return sets


@dataclass
class State:
    """`edges`: what may follow → the next state. The others as in grammar.Grammar."""

    edges: dict[Label, int] = field(default_factory=dict)
    ended: int = -1
    register: int = -1
    in_text: bool = False


class Machine:
    """The states of a step: 0 begins one, 1 one that must answer, and out of the last nothing leads."""

    def __init__(self, spelling: Spelling, thought_tokens: int, text_tokens: int, answer_tokens: int):
        self.states: list[State] = [State(), State()]
        self._spelling = spelling
        named: dict[str, int] = {}
        for tool in spelling.names:
            named[tool] = self._new()
            self._arguments(named[tool], tool, answer_tokens if tool == ANSWER else text_tokens)
        for start, tools in enumerate((list(named), [ANSWER])):
            call = self._new()
            thought = [start, *(self._new() for _ in range(thought_tokens))]
            for here, after in zip(thought, [*thought[1:], None], strict=True):
                if after is not None:
                    self.states[here].edges[PLAIN] = after
                self.states[here].edges[ENDER] = call
            for tool in tools:
                self._word(call, spelling.names[tool], named[tool])
        self._new()

    def _new(self, ended: int = -1, register: int = -1, in_text: bool = False) -> int:
        self.states.append(State({}, ended, register, in_text))
        return len(self.states) - 1

    def _word(self, here: int, tokens: Sequence[int], end: int) -> None:
        """A word from `here` to `end`, sharing its beginning with the words that are there already."""
        for token in tokens[:-1]:
            edges = self.states[here].edges
            here = edges[token] if token in edges else edges.setdefault(token, self._new())
        self.states[here].edges[tokens[-1]] = end

    def _arguments(self, here: int, tool: str, tokens: int) -> None:
        done = self._new(ended=TOOLS.index(tool))
        self.states[done].edges[self._spelling.end] = done
        for register, kind in enumerate(ARGUMENTS[tool]):
            if kind == "text":
                self._text(here, tokens, done)
                return
            gap = self._new()
            self.states[here].edges[self._spelling.space] = gap
            here = self._time(gap, register) if kind == "time" else self._digits([gap], register)
        self.states[here].edges[self._spelling.end] = done

    def _text(self, here: int, tokens: int, done: int) -> None:
        """One to `tokens` tokens, the first with the space before the text or that space alone."""
        spoken = [self._new(in_text=True) for _ in range(tokens)]
        self.states[here].edges[OPENER] = spoken[0]
        if tokens > 1:
            alone = self._new(in_text=True)
            self.states[here].edges[self._spelling.space] = alone
            self.states[alone].edges[SOLID] = spoken[1]
        for state, after in zip(spoken, [*spoken[1:], None], strict=True):
            if after is not None:
                self.states[state].edges[PLAIN] = after
            self.states[state].edges[self._spelling.end] = done

    def _time(self, here: int, register: int) -> int:
        """One to four digits without a leading zero, the point, one digit."""
        point = self._new()
        zero = self._new(register=register)
        self.states[here].edges[self._spelling.digits[0]] = zero
        first = self._digits([here], register, self._spelling.digits[1:])
        second = self._digits([first], register)
        third = self._digits([second], register)
        fourth = self._digits([third], register)
        for state in (zero, first, second, third, fourth):
            self.states[state].edges[self._spelling.point] = point
        return self._digits([point], register)

    def _digits(self, sources: Sequence[int], register: int, digits: Sequence[int] = ()) -> int:
        """The state after one digit (of `digits`, else any) that belongs to a register."""
        after = self._new(register=register)
        for source in sources:
            for digit in digits or self._spelling.digits:
                self.states[source].edges[digit] = after
        return after
