"""What a rollout leaves behind, token by token, and the batch that a trainer makes of it."""

from typing import NamedTuple

import jax.numpy as jnp

from iv3jax.mcr.grammar import Call
from iv3jax.mcr.memory import Memory
from iv3jax.mcr.prompts import Prompts, ends, visual_features
from iv3jax.models.batch import Batch
from iv3jax.typing import Array

PAD, PROMPT, FREE, FORCED, OBSERVATION = range(5)
"""Kinds of tokens. FREE alone were the policy's choice; FORCED ones were all that the grammar allowed."""

KIND_NAMES = ("padding", "prompt", "free", "forced", "observation")


class Record(NamedTuple):
    """Tokens of rows, with what is known of each; nothing but zeros where a row has none.

    Attributes:
        tokens: (B, T) int32.
        kinds: (B, T) int32, of the kinds above.
        logprobs: (B, T) fp32, of the FREE ones, under grammar, temperature, top-k and top-p; else 0.
        states: (B, T) int32, the grammar's state before a FREE or FORCED token; else 0.
        positions: (3, B, T) int32.
        visual: (B, T) int32, index into the F·M vision tokens of the row's world, −1 for text.
        steps: (B, T) int32, the step of the rollout.
    """

    tokens: Array
    kinds: Array
    logprobs: Array
    states: Array
    positions: Array
    visual: Array
    steps: Array


def empty_record(rows: int, length: int) -> Record:
    """A record of no tokens."""
    zeros = jnp.zeros((rows, length), jnp.int32)
    return Record(
        tokens=zeros,
        kinds=zeros,
        logprobs=jnp.zeros((rows, length)),
        states=zeros,
        positions=jnp.zeros((3, rows, length), jnp.int32),
        visual=zeros - 1,
        steps=zeros,
    )


def append(record: Record, start: Array, new: Record, count: Array) -> Record:
    """The record with the first `count` (B,) tokens of each row of `new` from its place `start` (B,) on."""
    rows, width = new.tokens.shape
    places = start[:, None] + jnp.arange(width)
    # Past the record's end, where nothing is written.
    places = jnp.where(jnp.arange(width) < count[:, None], places, record.tokens.shape[1])

    def put(old: Array, fresh: Array) -> Array:
        return old.at[..., jnp.arange(rows)[:, None], places].set(fresh, mode="drop")

    return Record(*(put(old, fresh) for old, fresh in zip(record, new, strict=True)))


class Calls(NamedTuple):
    """The calls of R rows, one for each step; −1 and zeros where there was none.

    Attributes:
        tools: (R, steps) int32, index into grammar.TOOLS.
        numbers: (R, steps, 5) int32, as `grammar.Call` has them. text: (R, steps, K) int32.
        length: (R, steps) int32, tokens of the text.
    """

    tools: Array
    numbers: Array
    text: Array
    length: Array


def empty_calls(rows: int, steps: int, text_tokens: int) -> Calls:
    """No calls yet."""
    return Calls(
        jnp.full((rows, steps), -1, jnp.int32),
        jnp.zeros((rows, steps, 5), jnp.int32),
        jnp.zeros((rows, steps, text_tokens), jnp.int32),
        jnp.zeros((rows, steps), jnp.int32),
    )


def add_call(calls: Calls, rows: Array, step: Array, tool: Array, call: Call) -> Calls:
    """The calls with each row's `call` of `tool` (B,) at its `step` (B,), for the rows (B,) that made one."""
    here = (jnp.arange(calls.tools.shape[1]) == step[:, None]) & rows[:, None]

    def put(old: Array, new: Array) -> Array:
        return jnp.where(here.reshape(*here.shape, *(1,) * (old.ndim - 2)), new[:, None], old)

    return Calls(
        put(calls.tools, tool),
        put(calls.numbers, call.numbers),
        put(calls.text, call.text),
        put(calls.length, call.length),
    )


class Trajectories(NamedTuple):
    """R rollouts, those of a prompt side by side, T tokens: the prompt, what follows it, then padding.

    Attributes:
        record: (R, T), the tokens. `steps` of the prompt's are 0.
        length: (R,) int32, tokens before the padding.
        prompt: (R,) int32, row of the prompts.
        answered: (R,) bool, whether the rollout ended with an answer, as all do that do not overflow.
        overflow: (R,) bool, the cache had no room; tokens at the end were then fed nowhere, and the rollout
            ended there.
        calls: what was called, step by step.
        memory: of R rows, as it was at the end.
    """

    record: Record
    length: Array
    prompt: Array
    answered: Array
    overflow: Array
    calls: Calls
    memory: Memory

    @property
    def tokens(self) -> Array:
        """(R, T) int32."""
        return self.record.tokens

    @property
    def kinds(self) -> Array:
        """(R, T) int32."""
        return self.record.kinds


def with_prompts(record: Record, length: Array, prompts: Prompts, prompt: Array) -> Record:
    """(R, budget) tokens after the prompts → (R, T0 + budget), each prompt's own (R,) before them."""
    before = jnp.sum(prompts.segment_ids != 0, axis=1, dtype=jnp.int32)[prompt]
    real = prompts.segment_ids[prompt] != 0
    zeros = jnp.zeros(real.shape, jnp.int32)
    start = Record(
        tokens=jnp.where(real, prompts.tokens[prompt], 0),
        kinds=jnp.where(real, PROMPT, PAD),
        logprobs=zeros.astype(jnp.float32),
        states=zeros,
        positions=jnp.where(real, prompts.positions[:, prompt], 0),
        visual=jnp.where(real, prompts.visual[prompt], -1),
        steps=zeros,
    )
    room = empty_record(*record.tokens.shape)
    whole = Record(*(jnp.concatenate(pair, axis=-1) for pair in zip(start, room, strict=True)))
    return append(whole, before, record, length)


def after_others(trajectories: Trajectories, prompts: Prompts, others: Prompts) -> Trajectories:
    """The same rollouts after other prompts about the same videos, such as some that show more frames.

    Args:
        prompts: those of the trajectories. others: as many, of any length.
    """
    record, row = trajectories.record, trajectories.prompt
    (before, old), (others_before, new) = ends(prompts), ends(others)
    room = record.tokens.shape[1] - prompts.tokens.shape[1]
    source = jnp.minimum(jnp.arange(room) + before[row][:, None], record.tokens.shape[1] - 1)

    def cut(x: Array) -> Array:
        return jnp.take_along_axis(x, jnp.broadcast_to(source, (*x.shape[:-1], room)), axis=-1)

    rest = Record(*map(cut, record))
    rest = rest._replace(positions=rest.positions + (new - old)[row][:, None])
    count = trajectories.length - before[row]
    whole = with_prompts(rest, count, others, row)
    return trajectories._replace(record=whole, length=others_before[row] + count)


def as_batch(trajectories: Trajectories, prompts: Prompts) -> Batch:
    """The trajectories as a model reads them in one pass, each vision token beside the place it stands at."""
    record = trajectories.record
    real = record.kinds != PAD
    batch = Batch(record.tokens, record.positions, real.astype(jnp.int32))
    seen = visual_features(prompts.world, trajectories.prompt, record.visual)
    features = jnp.concatenate([seen.tokens[:, :, None], jnp.moveaxis(seen.deepstack, 0, 2)], axis=2)
    places = jnp.broadcast_to(jnp.arange(record.visual.shape[1], dtype=jnp.int32), record.visual.shape)
    return batch._replace(features=features, visual_index=jnp.where(record.visual >= 0, places, -1))
