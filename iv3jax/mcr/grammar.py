"""The language of language.py as a finite-state machine over tokens: what may be said, what was.

Tables are built on the host (`build`), and used in the graph to mask logits (`mask`), to move on (`advance`)
and to collect a call's arguments (`read_token`). Tokens that no state tells apart share a class. Class 0 is
never allowed: special and added tokens, and ids the tokenizer does not know; vision tokens and the padding
of the vocabulary are among them. Only `<|im_end|>` is not: it ends a call.

The tokens are those of `data.chat.render`: a thought's last mark and the line break may be one token, `.\\n`,
so any token that ends in its only line break ends a thought. A text argument's first token carries the space
before it, as in ` red`, or is that space alone.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.language import ANSWER, MAX_NUMBERS, TOOLS, check_tool
from iv3jax.mcr.machine import Label, Machine, State, spell, token_sets
from iv3jax.typing import Array

START, LAST = 0, 1
"""The states in which a step begins, and one that must answer."""

REFUSED = -1
"""The state, counted from the end, after a token that was not allowed. Nothing leads out of it."""

Table = Any
"""A NumPy array on the host, a jax array or tracer in the graph."""


@dataclass(frozen=True)
class GrammarConfig:
    """How much a step may say.

    Attributes:
        thought_tokens: tokens of a thought, without the one that ends it.
        text_tokens: tokens of the text of every call but `answer`; a space that is a token of its own counts.
        answer_tokens: the same for `answer`.
        tools: the calls there are; `answer` is one.
    """

    thought_tokens: int = 32
    text_tokens: int = 16
    answer_tokens: int = 24
    tools: tuple[str, ...] = TOOLS

    def __post_init__(self) -> None:
        for name in ("thought_tokens", "text_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for number, tool in enumerate(self.tools):
            check_tool(tool, "tools")
            if tool in self.tools[:number]:
                raise UserError(f"tools: {tool!r} is named twice")
        if ANSWER not in self.tools:
            raise UserError(f"tools: {ANSWER!r} is missing; without it no rollout can end")

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text argument: the room that `start_call` must give."""
        return max(self.text_tokens, self.answer_tokens)


class Grammar(NamedTuple):
    """The tables, a pytree of NumPy arrays: V tokens of the model, C classes of them, S states.

    Attributes:
        token_class: (V,) int32.
        digit: (V,) int32, the digit that a token is, else −1.
        allowed: (S, C) bool. Where a call is complete `<|im_end|>` alone, so that no mask is empty.
        following: (S, C) int32, the next state; REFUSED where the class is not allowed.
        forced: (S,) int32, the one token that is allowed; −1 if several are, or the call is complete.
        ended: (S,) int32, index into TOOLS of the call that is complete, else −1. Such a state stays.
        register: (S,) int32, which number 0 … 4 the token that led here is a digit of, else −1.
        in_text: (S,) bool, whether the token that led here belongs to the text.
    """

    token_class: Table
    digit: Table
    allowed: Table
    following: Table
    forced: Table
    ended: Table
    register: Table
    in_text: Table


class Call(NamedTuple):
    """The arguments of a call, as far as they have been read.

    Attributes:
        numbers: (B, 5) int32; times in tenths of a second, a region's sides in tenths of the picture.
        text: (B, K) int32 tokens, 0 from `length` on. Decoded they are a space and the text.
        length: (B,) int32, tokens of the text.
    """

    numbers: Array
    text: Array
    length: Array


def build(config: GrammarConfig, tokenizer: Tokenizer, vocab_size: int) -> Grammar:
    """The tables for a tokenizer and a model whose logits are `vocab_size` wide.

    Raises:
        UserError: the tokenizer does not write numbers digit by digit, or has more tokens than the model.
    """
    sets = token_sets(tokenizer, vocab_size)
    spelling = spell(tokenizer, config.tools)
    states = Machine(spelling, config.thought_tokens, config.text_tokens, config.answer_tokens).states
    token_class, members = _classes(sets, states)
    following = np.full((len(states), token_class.max() + 1), REFUSED, np.int32)
    for row, state in zip(following, states, strict=True):
        for label, target in state.edges.items():
            row[members[label]] = target
    allowed = following != REFUSED
    choices = allowed @ np.bincount(token_class)
    ended = np.array([state.ended for state in states], np.int32)
    first = np.unique(token_class, return_index=True)[1]
    forced = np.where((choices == 1) & (ended < 0), first[np.argmax(allowed, axis=1)], -1)
    digit = np.full(vocab_size, -1, np.int32)
    digit[list(spelling.digits)] = np.arange(10)
    return Grammar(
        token_class,
        digit,
        allowed,
        following,
        forced.astype(np.int32),
        ended,
        np.array([state.register for state in states], np.int32),
        np.array([state.in_text for state in states], bool),
    )


def mask(grammar: Grammar, state: Array) -> Array:
    """(…,) int32 states → (…, V) bool, which tokens may come next."""
    return jnp.asarray(grammar.allowed)[state][..., jnp.asarray(grammar.token_class)]


def advance(grammar: Grammar, state: Array, token: Array) -> Array:
    """The states (…,) int32 after the tokens (…,) int32; REFUSED after one that the mask leaves out."""
    return jnp.asarray(grammar.following)[state, jnp.asarray(grammar.token_class)[token]]


def start_call(rows: int, longest_text: int) -> Call:
    """Nothing read yet, in each of the rows; `longest_text` is GrammarConfig's."""
    return Call(
        jnp.zeros((rows, MAX_NUMBERS), jnp.int32),
        jnp.zeros((rows, longest_text), jnp.int32),
        jnp.zeros(rows, jnp.int32),
    )


def read_token(grammar: Grammar, call: Call, state: Array, token: Array) -> Call:
    """The call after another token (B,) int32 a row, with the states (B,) int32 that the tokens led to."""
    register = jnp.asarray(grammar.register)[state]
    digit = jnp.asarray(grammar.digit)[token]
    here = register[:, None] == jnp.arange(MAX_NUMBERS)
    numbers = jnp.where(here, call.numbers * 10 + digit[:, None], call.numbers)
    in_text = jnp.asarray(grammar.in_text)[state]
    slot = in_text[:, None] & (call.length[:, None] == jnp.arange(call.text.shape[1]))
    text = jnp.where(slot, token[:, None], call.text)
    return Call(numbers, text, call.length + in_text)


def walk(grammar: Grammar, tokens: np.ndarray, start: int = START) -> np.ndarray:
    """The states (T,) int32 *before* each token (T,) of a step that was written elsewhere. On the host.

    Raises:
        UserError: a token that is not allowed, or a step that is not over at the end.
    """
    found = np.zeros(len(tokens), np.int32)
    state = start
    for place, token in enumerate(tokens):
        found[place] = state
        state = int(grammar.following[state, grammar.token_class[token]])
        if state == REFUSED or grammar.ended[found[place]] >= 0:
            raise UserError(f"step: token {int(token)} at place {place} may not stand there")
    if grammar.ended[state] < 0:
        raise UserError(f"step: its call is not complete after {len(tokens)} tokens")
    return found


def longest_step(grammar: Grammar, start: int = START) -> int:
    """Tokens of the longest step, `<|im_end|>` included; with `start=LAST` of the longest that answers."""
    going_on = grammar.allowed & (grammar.ended < 0)[:, None]
    tokens = np.zeros(len(grammar.ended), np.int64)
    while True:
        longer = np.max(np.where(going_on, tokens[grammar.following] + 1, 0), axis=1)
        if (longer == tokens).all():
            return int(tokens[start])
        tokens = longer


def longest_forced(grammar: Grammar) -> int:
    """The most tokens that are forced one after the other."""
    run = np.zeros(len(grammar.forced), np.int64)
    after = grammar.following[np.arange(len(run)), grammar.token_class[grammar.forced]]
    while True:
        longer = np.where(grammar.forced >= 0, run[after] + 1, 0)
        if (longer == run).all():
            return int(run.max())
        run = longer


def _classes(sets: dict[str, np.ndarray], states: list[State]) -> tuple[np.ndarray, dict[Label, np.ndarray]]:
    """(V,) int32 class of every token, and for every label of an edge which classes (C,) bool it takes.

    A token that an edge takes by itself is a class of its own; others share one if their sets are the same.
    Class 0 are the tokens in no set.
    """
    singles = sorted({label for state in states for label in state.edges if isinstance(label, int)})
    key = np.packbits(np.stack(list(sets.values())), axis=0, bitorder="little")[0].astype(np.int64)
    key[singles] |= np.arange(1, len(singles) + 1) << len(sets)
    # Class 0 is there even if every token of the model is a text token.
    keys, classes = np.unique(np.append(key, 0), return_inverse=True)
    members: dict[Label, np.ndarray] = {name: keys >> bit & 1 == 1 for bit, name in enumerate(sets)}
    members |= {token: keys >> len(sets) == rank for rank, token in enumerate(singles, 1)}
    return classes[:-1].astype(np.int32), members
