"""search, ground and segments: where in the video something is, as times that can be zoomed into."""

import jax
import jax.numpy as jnp

from iv3jax.mcr.tools.strip import Strip, join, laid_out, number, piece, span, text, time
from iv3jax.mcr.wording import Wording
from iv3jax.mcr.world import NO_TIME, World
from iv3jax.typing import Array


def search(words: Wording, world: World, results: int, prompt: Array, wanted: Array) -> Strip:
    """The timed texts nearest to (B, D) `wanted` by cosine, best first, each a line after its time."""
    scores = _scores(wanted, world.text_vectors, world.text_lengths > 0, prompt)
    best, index = jax.lax.top_k(scores, min(results, scores.shape[1]))
    found, at = jnp.isfinite(best).ravel(), (jnp.repeat(prompt, index.shape[1]), index.ravel())
    tokens = world.texts[at]
    real = jnp.arange(tokens.shape[1]) < world.text_lengths[at][:, None]
    lines = join(
        piece(words.open, found),
        span(words, world.text_times[at], found),
        piece(words.close, found),
        text(tokens, real & found[:, None]),
    )
    some = jnp.any(jnp.isfinite(best), axis=1)
    return join(piece(words.nothing, ~some), laid_out(lines, len(prompt)))


def ground(words: Wording, world: World, results: int, prompt: Array, wanted: Array) -> Strip:
    """The moments whose frames are nearest to (B, D) `wanted` by cosine, best first, a line each.

    A patch beside one that was named is passed over: it shows nearly the same.
    """
    times = world.times[prompt]
    scores = _scores(wanted, world.patch_vectors, world.times < NO_TIME, prompt)
    place, named = jnp.arange(times.shape[1]), []
    for _ in range(results):
        best = jnp.argmax(scores, axis=1)[:, None]
        named.append(jnp.where(jnp.any(jnp.isfinite(scores), axis=1)[:, None], best, -1))
        scores = jnp.where(jnp.abs(place - best) <= 1, -jnp.inf, scores)
    index = jnp.concatenate(named, axis=1)
    found, when = (index >= 0).ravel(), jnp.take_along_axis(times, jnp.maximum(index, 0), axis=1).ravel()
    lines = join(piece(words.open, found), time(words, when, found), piece(words.close_line, found))
    return laid_out(lines, len(prompt))


def segments(words: Wording, world: World, results: int, prompt: Array) -> Strip:
    """The first segments of the video in order of time, a line each, and how many more there are."""
    windows = world.segments[prompt]
    there = windows[..., 0] >= 0
    first = windows[:, :results].reshape(-1, 2)
    shown = first[:, 0] >= 0
    lines = join(piece(words.open, shown), span(words, first, shown), piece(words.close_line, shown))
    left = jnp.sum(there, axis=1) - results
    more = left > 0
    return join(
        piece(words.nothing, ~jnp.any(there, axis=1)),
        laid_out(lines, len(prompt)),
        piece(words.and_more, more),
        number(words, left, len(str(windows.shape[1])), more),
        piece(words.more, more),
    )


def _scores(wanted: Array, vectors: Array, there: Array, prompt: Array) -> Array:
    """(B, n) fp32: wanted (B, D) · vectors (P, n, D) of each row's prompt; −inf where nothing is there.

    The vectors have length 1, and that of `wanted` changes no order, so this ranks as the cosine does. All
    rows are multiplied with all prompts: a copy of its prompt's vectors for each row would be larger.
    """
    found = jnp.einsum("bd,pnd->pbn", wanted, vectors, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(there[prompt], found[prompt, jnp.arange(len(prompt))], -jnp.inf)
