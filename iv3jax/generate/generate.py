"""Prompt in, tokens out: the video looked at once, the prompt fed in chunks, then a jitted decode loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.compiles import Stopwatch
from iv3jax.errors import UserError
from iv3jax.generate.sampling import Sampling, choose
from iv3jax.models.batch import Batch
from iv3jax.models.cache import Cache, init_cache
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.vision import VisualFeatures
from iv3jax.typing import Array, DType, Params

PREFILL_CHUNK = 1024
"""Prompt tokens fed at a time; shorter prompts are fed whole."""

DECODE_BLOCK = 16
"""Tokens decoded between two looks from the host: what streaming waits for."""


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        tokens: for each row its new tokens, without the stop token.
        stopped: for each row whether a stop token ended it, rather than the limit.
        prompt_tokens, new_tokens: summed over the rows; new ones include stop tokens.
        cache_bytes: bytes the cache takes, for its whole capacity.
        prefill_seconds, decode_seconds: wall time without compiling.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    prompt_tokens: int
    new_tokens: int
    cache_bytes: int
    prefill_seconds: float
    decode_seconds: float


class DecodeState(NamedTuple):
    """What decoding goes on from.

    Attributes:
        cache: all tokens so far.
        logits: (B, V) fp32, of the next token.
        position: (B,) int32, where the next token stands.
        done: (B,) bool, rows that have ended.
        step: () int32, new tokens a row so far.
    """

    cache: Cache
    logits: Array
    position: Array
    done: Array
    step: Array


def generate(
    model: InternVideo3,
    params: Params,
    batch: Batch,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling | None = None,
    capacity: int | None = None,
    cache_dtype: DType | None = None,
    seed: int = 0,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
) -> Generation:
    """Continues every row of a batch.

    Args:
        batch: prompts, one sample a row, right-padded; rows may differ in length.
        max_new_tokens: at most this many new tokens a row.
        stop_ids: a row ends with any of these.
        sampling: None is greedy. The key of a token depends on seed, row and step only.
        capacity: cache slots a row; None takes what prompt and new tokens need.
        cache_dtype: of models.cache.CACHE_DTYPES; None takes the model's compute dtype.
        on_tokens: called with each row's newest tokens, every DECODE_BLOCK steps.

    Raises:
        UserError: an empty row, no new tokens, or prompt and new tokens that exceed the capacity or the
            model's max_position_embeddings.
    """
    sampling = sampling or Sampling()
    real = np.asarray(batch.segment_ids != 0)
    lengths = real.sum(axis=1)
    if not lengths.all():
        raise UserError(f"row {int(np.argmin(lengths))} of the prompts is empty")
    if (real[:, 1:] > real[:, :-1]).any():
        row = int(np.argmax((real[:, 1:] > real[:, :-1]).any(axis=1)))
        raise UserError(f"row {row} of the prompts has padding before tokens; put it at the end")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    needed = int(lengths.max()) + max_new_tokens
    limit = model.config.text_config.max_position_embeddings
    for name, most in (("the model's max_position_embeddings", limit), ("the cache's capacity", capacity)):
        if most is not None and needed > most:
            raise UserError(
                f"{int(lengths.max())} prompt tokens and {max_new_tokens} new ones are more than {name}, "
                f"{most}; use fewer frames, a lower fps or fewer new tokens"
            )
    cache = init_cache(
        model.config.text_config,
        len(lengths),
        capacity or needed,
        cache_dtype or model.run.dtype,
        model.run.scan_layers,
    )
    cache_bytes = cache.nbytes
    watch = Stopwatch()
    state = jax.block_until_ready(prefill(model, params, batch, cache))
    prefill_seconds = watch.seconds

    watch = Stopwatch()
    stop = jnp.asarray(list(stop_ids), jnp.int32)
    tokens: list[list[int]] = [[] for _ in lengths]
    stopped = [False] * len(lengths)
    step = partial(decode_block, model, sampling, min(DECODE_BLOCK, max_new_tokens))
    done_steps = 0
    key = jax.random.key(seed)
    while done_steps < max_new_tokens and not all(stopped):
        state, block = step(params, state, stop, key, max_new_tokens - done_steps)
        done_steps += DECODE_BLOCK
        fresh: list[list[int]] = [[] for _ in lengths]
        for row, new in enumerate(np.asarray(block)):
            for token in new:
                if stopped[row] or token < 0:
                    break
                stopped[row] = int(token) in stop_ids
                if not stopped[row]:
                    fresh[row].append(int(token))
            tokens[row] += fresh[row]
        if on_tokens is not None:
            on_tokens(fresh)
    new_tokens = sum(map(len, tokens)) + sum(stopped)
    return Generation(
        tokens, stopped, int(lengths.sum()), new_tokens, cache_bytes, prefill_seconds, watch.seconds
    )


def prefill(model: InternVideo3, params: Params, batch: Batch, cache: Cache) -> DecodeState:
    """Feeds the prompts into an empty cache, chunk by chunk; the video is encoded once, before."""
    lengths = np.asarray(batch.segment_ids != 0).sum(axis=1)
    seen = batch.patches is not None or batch.features is not None
    visual = _encode(model, params, batch) if seen else None
    length = batch.input_ids.shape[1]
    chunk = min(PREFILL_CHUNK, length)
    last = jnp.zeros((len(lengths), model.config.text_config.hidden_size), model.run.dtype)
    ends = jnp.asarray(lengths - 1)
    for start in range(0, int(lengths.max()), chunk):
        part = _columns(batch, start, chunk)
        cache, last = _prefill_chunk(model, params, part, visual, cache, last, ends - start)
    # Vision positions may run ahead of or behind the token count: text goes on after the largest.
    real = np.asarray(batch.segment_ids != 0)
    position = jnp.asarray(np.where(real, np.asarray(batch.positions).max(axis=0), -1).max(axis=1) + 1)
    return DecodeState(
        cache,
        _logits(model, params, last),
        position.astype(jnp.int32),
        jnp.zeros(len(lengths), bool),
        jnp.zeros((), jnp.int32),
    )


def _columns(batch: Batch, start: int, size: int) -> Batch:
    """Tokens start … start+size−1 of every row, padded at the end, without the pixels."""

    def cut(x: np.ndarray | None, fill: int = 0) -> np.ndarray | None:
        if x is None:
            return None
        part = np.asarray(x)[..., start : start + size]
        return np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, size - part.shape[-1])], constant_values=fill)

    return Batch(
        cut(batch.input_ids),
        cut(batch.positions),
        cut(batch.segment_ids),
        visual_index=cut(batch.visual_index, -1),
    )


@partial(jax.jit, static_argnums=0)
def _encode(model: InternVideo3, params: Params, batch: Batch) -> VisualFeatures:
    return model.apply({"params": params}, batch, method="encode")


@partial(jax.jit, static_argnums=0)
def _logits(model: InternVideo3, params: Params, hidden: Array) -> Array:
    return model.apply({"params": params}, hidden, method="logits")


@partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def _prefill_chunk(
    model: InternVideo3,
    params: Params,
    part: Batch,
    visual: VisualFeatures | None,
    cache: Cache,
    last: Array,
    ends: Array,
) -> tuple[Cache, Array]:
    """One chunk into the cache; `last` collects the hidden state of each row's last token."""
    out = model.apply({"params": params}, part, visual, cache)
    size = part.input_ids.shape[1]
    here = jnp.take_along_axis(out.hidden, jnp.clip(ends, 0, size - 1)[:, None, None], axis=1)[:, 0]
    inside = (ends >= 0) & (ends < size)
    return out.cache, jnp.where(inside[:, None], here, last)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode_block(
    model: InternVideo3,
    sampling: Sampling,
    steps: int,
    params: Params,
    state: DecodeState,
    stop: Array,
    key: Array,
    remaining: Array,
) -> tuple[DecodeState, Array]:
    """Up to min(steps, remaining) tokens a row → (B, steps) int32, −1 where there are none.

    The state is donated: its arrays, the cache among them, are written in place and gone afterwards.
    """
    rows = state.logits.shape[0]
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))

    def unfinished(carry: tuple[DecodeState, Array, Array]) -> Array:
        state, _, i = carry
        return (i < jnp.minimum(steps, remaining)) & ~jnp.all(state.done)

    def one(carry: tuple[DecodeState, Array, Array]) -> tuple[DecodeState, Array, Array]:
        state, block, i = carry
        keys = jax.vmap(lambda k: jax.random.fold_in(k, state.step))(row_keys)
        token = choose(state.logits, keys, sampling)
        block = block.at[:, i].set(jnp.where(state.done, -1, token))
        done = state.done | jnp.isin(token, stop)
        # A finished row writes nothing: its token is padding.
        fed = Batch(
            token[:, None],
            jnp.broadcast_to(state.position[:, None], (3, rows, 1)),
            (~done).astype(jnp.int32)[:, None],
        )
        out = model.apply({"params": params}, fed, None, state.cache)
        logits = model.apply({"params": params}, out.hidden[:, 0], method="logits")
        return DecodeState(out.cache, logits, state.position + 1, done, state.step + 1), block, i + 1

    start = (state, jnp.full((rows, steps), -1, jnp.int32), jnp.zeros((), jnp.int32))
    state, block, _ = jax.lax.while_loop(unfinished, one, start)
    return state, block
