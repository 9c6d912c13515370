"""Strip: a stretch of an observation, the same length in every row, with gaps where a row has less to say."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from iv3jax.mcr.wording import Wording
from iv3jax.typing import Array

TIME_DIGITS = 4
"""Digits of a time before its point: the calls' and so the observations' longest time is 9999.9 seconds."""
STEP_DIGITS = 3
"""Digits of the number of a step, or of entries dropped, which are no more than the steps."""


class Strip(NamedTuple):
    """(B, n) each.

    Attributes:
        tokens: int32, anything where not real.
        real: bool.
        visual: int32, which of the F·M vision tokens of the row's prompt stands here, −1 for text.
        rows, columns: int32, how far height and width position lie above the time position.
        advance: int32, how far the position moves on after this token; 0 where not real.
    """

    tokens: Array
    real: Array
    visual: Array
    rows: Array
    columns: Array
    advance: Array


def text(tokens: Array, real: Array) -> Strip:
    """Text: tokens and which of them there are, broadcast to (B, n)."""
    tokens, real = jnp.broadcast_arrays(jnp.asarray(tokens, jnp.int32), jnp.asarray(real, bool))
    none = jnp.zeros_like(tokens)
    return Strip(tokens, real, none - 1, none, none, real.astype(jnp.int32))


def piece(tokens: Array, present: Array) -> Strip:
    """A piece of the wording, (n,), in the rows of `present`, (B,) bool."""
    return text(jnp.asarray(tokens)[None], present[:, None])


def join(*strips: Strip) -> Strip:
    """One after the other."""
    return Strip(*(jnp.concatenate(parts, axis=1) for parts in zip(*strips, strict=True)))


def only(strip: Strip, present: Array) -> Strip:
    """The strip in the rows of `present`, (B,) bool, and nothing in the others."""
    here = present[:, None]
    return strip._replace(real=strip.real & here, advance=jnp.where(here, strip.advance, 0))


def laid_out(strip: Strip, rows: int) -> Strip:
    """Strips of (B·k, n), those of a row one after the other: (B, k·n)."""
    return Strip(*(x.reshape(rows, -1) for x in strip))


def padded(strip: Strip, length: int) -> Strip:
    """The strip, made longer with nothing."""
    more = length - strip.tokens.shape[1]
    none = jnp.zeros((strip.tokens.shape[0], more), jnp.int32)
    return join(strip, text(none, none > 0)) if more else strip


def chosen(strips: Sequence[Strip], where: Sequence[Array], rows: int) -> Strip:
    """Of strips of any length, each in the rows where its (B,) bool says so, nothing in the other rows."""
    length = max((strip.tokens.shape[1] for strip in strips), default=0)
    nothing = jnp.zeros((rows, length), jnp.int32)
    out = text(nothing, nothing > 0)
    for strip, here in zip(strips, where, strict=True):
        longer = padded(strip, length)
        out = Strip(*(jnp.where(here[:, None], new, old) for new, old in zip(longer, out, strict=True)))
    return out


def compact(strip: Strip) -> Strip:
    """What is real first, in its order."""
    order = jnp.argsort(~strip.real, axis=1, stable=True)
    return Strip(*(jnp.take_along_axis(x, order, axis=1) for x in strip))


def number(words: Wording, value: Array, digits: int, present: Array) -> Strip:
    """A whole number, (B,), without leading zeros, in so many places."""
    place = 10 ** jnp.arange(digits - 1, -1, -1)
    # The last place is written for a 0 as well.
    written = (value[:, None] >= place) | (place == 1)
    return text(jnp.asarray(words.digits)[value[:, None] // place % 10], written & present[:, None])


def time(words: Wording, tenths: Array, present: Array) -> Strip:
    """Seconds with one decimal, of (B,) tenths."""
    return join(
        number(words, tenths // 10, TIME_DIGITS, present),
        piece(words.point, present),
        number(words, tenths % 10, 1, present),
    )


def span(words: Wording, window: Array, present: Array) -> Strip:
    """`12.0-15.5`, of (B, 2) tenths."""
    return join(
        time(words, window[:, 0], present),
        piece(words.dash, present),
        time(words, window[:, 1], present),
    )


def offsets(strip: Strip) -> tuple[Array, Array]:
    """The (3, B, n) positions relative to that at the strip's start, and (B,), where what follows stands.

    As `data.positions.mrope_positions` has them.
    """
    start = jnp.cumsum(strip.advance, axis=1) - strip.advance
    return jnp.stack([start, start + strip.rows, start + strip.columns]), jnp.sum(strip.advance, axis=1)
