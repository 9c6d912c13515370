"""One round of the loop for all slots: speak until calls are made, look with the tools, listen to them.

All functions here are pure and have static shapes; rollout.py runs them in one compiled program, driver.py
from Python. What a rollout says does not depend on its slot or its company: its random numbers are keyed by
prompt, rollout and place, and a row of the cache sees itself alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from iv3jax.generate.sampling import Sampling, choose, filtered
from iv3jax.mcr.grammar import LAST, START, Call, Grammar, advance, mask, read_token, start_call
from iv3jax.mcr.language import ANSWER, TOOLS
from iv3jax.mcr.memory import Memory, empty_memory
from iv3jax.mcr.prompts import Bank, Prompts, feed_chunk, next_logits, take_prompts
from iv3jax.mcr.rollout_config import Lengths, RolloutConfig
from iv3jax.mcr.tools import Observation, observe
from iv3jax.mcr.trajectories import (
    FORCED,
    FREE,
    OBSERVATION,
    Calls,
    Record,
    add_call,
    append,
    empty_calls,
    empty_record,
)
from iv3jax.mcr.wording import Wording
from iv3jax.models.batch import Batch
from iv3jax.models.cache import Cache, init_cache
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.typing import Array, Params

IDLE, DECIDING, WAITING = range(3)
"""What a slot does: nothing, choose tokens, or wait for the next round with a call, or with a full cache."""

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Loop:
    """What is compiled in. group: rollouts of each prompt."""

    model: InternVideo3
    config: RolloutConfig
    lengths: Lengths
    group: int


class Given(NamedTuple):
    """What all rounds share. key: of all random numbers."""

    params: Params
    prompts: Prompts
    grammar: Grammar
    words: Wording
    key: Array


class Work(NamedTuple):
    """What was computed, () int32 each.

    Attributes:
        rounds: rounds of speaking, looking and listening; of several devices, the most.
        decoded: row-steps of decoding: a row for each slot in each pass that chose tokens.
        choices: those of them whose tokens a rollout needed: it chose one, or went on with a forced run.
    """

    rounds: Array
    decoded: Array
    choices: Array

    @property
    def useful(self) -> float:
        """The share of row-steps of decoding in which a rollout needed the tokens."""
        return float(self.choices) / float(self.decoded)


class Rows(NamedTuple):
    """What a rollout has come to; S rows while it runs, R when it has ended.

    Attributes:
        record: (…, budget) the tokens after the prompt. length: (B,) int32, how many.
        answered, overflow: (B,) bool; see Trajectories. calls, memory: likewise.
    """

    record: Record
    length: Array
    answered: Array
    overflow: Array
    calls: Calls
    memory: Memory


class State(NamedTuple):
    """Between two rounds. S slots.

    Attributes:
        cache: of the slots. logits: (S, V) fp32, of the next token of those that decide.
        position: (S,) int32, where the next token stands.
        phase: (S,) int32, IDLE, DECIDING or WAITING. rollout: (S,) int32, which, 0 … R−1.
        grammar_state, step: (S,) int32. call: registers of the call so far.
        pending: (S, run) int32, the tokens that ended the call; not fed yet. pending_count: (S,) int32.
        rows: of the slots. ended: of the R rollouts that have.
        queue: () int32, the next rollout that gets a slot.
        work: so far.
    """

    cache: Cache
    logits: Array
    position: Array
    phase: Array
    rollout: Array
    grammar_state: Array
    step: Array
    call: Call
    pending: Array
    pending_count: Array
    rows: Rows
    ended: Rows
    queue: Array
    work: Work


def start(loop: Loop, given: Given, bank: Bank) -> State:
    """The first rollouts in their slots."""
    config, text = loop.config, loop.model.config.text_config
    slots, budget = config.slots, config.budget
    prompts, length = given.prompts.tokens.shape
    dtype = loop.model.run.dtype if config.cache_dtype is None else config.cache_dtype
    capacity = length + budget if config.capacity is None else config.capacity
    zeros = jnp.zeros((slots,), jnp.int32)
    nothing = jnp.zeros((), jnp.int32)
    return _refill(
        loop,
        given,
        bank,
        State(
            cache=init_cache(text, slots, capacity, dtype, loop.model.run.scan_layers),
            logits=jnp.zeros((slots, text.vocab_size)),
            position=zeros,
            phase=zeros + IDLE,
            rollout=zeros,
            grammar_state=zeros,
            step=zeros,
            call=start_call(slots, config.grammar.longest_text),
            pending=jnp.zeros((slots, loop.lengths.run), jnp.int32),
            pending_count=zeros,
            rows=_no_rows(loop, slots),
            ended=_no_rows(loop, prompts * loop.group),
            queue=nothing,
            work=Work(nothing, nothing, nothing),
        ),
    )


def running(state: State) -> Array:
    """() bool: whether any rollout has not ended."""
    return jnp.any(state.phase != IDLE)


def speak(loop: Loop, given: Given, state: State) -> State:
    """Chooses tokens until enough slots wait: `patience` of those that run."""
    keys = _keys(loop, given, state)
    enough = jnp.ceil(loop.config.patience * jnp.sum(state.phase != IDLE)).astype(jnp.int32)

    def going(state: State) -> Array:
        return jnp.any(state.phase == DECIDING) & (jnp.sum(state.phase == WAITING) < enough)

    return jax.lax.while_loop(going, lambda state: _choose_and_feed(loop, given, keys, state), state)


def look(loop: Loop, given: Given, state: State) -> tuple[Observation, Memory]:
    """What the tools say to the slots that wait, and the memory of all."""
    tool = called(given, state)
    return observe(
        given.words,
        loop.config.tools,
        given.prompts.world,
        _prompt(loop, state),
        tool,
        state.call,
        state.rows.memory,
        state.step,
        given.params["embed_tokens"]["embedding"],
        loop.config.grammar.tools,
    )


def called(given: Given, state: State) -> Array:
    """(S,) int32 index into TOOLS of the call that a slot waits with, else −1."""
    tool: Array = jnp.where(state.phase == WAITING, given.grammar.ended[state.grammar_state], -1)
    return tool


def listen(
    loop: Loop, given: Given, bank: Bank, state: State, observation: Observation, memory: Memory
) -> State:
    """Feeds the observations to the slots that wait; ends those that have answered, refills their slots."""
    waiting = state.phase == WAITING
    tool = called(given, state)
    answered = tool == TOOLS.index(ANSWER)
    rows = state.rows._replace(
        calls=add_call(state.rows.calls, tool >= 0, state.step, tool, state.call),
        answered=state.rows.answered | answered,
        memory=memory,
    )
    going_on = (tool >= 0) & ~answered & ~state.cache.overflow
    state = _hear(loop, given, state._replace(rows=rows), going_on, observation)
    overflow = state.cache.overflow & waiting
    ended = waiting & (answered | overflow)
    state = _begin_step(loop, given, state, going_on & ~ended, state.step + 1)
    rows = state.rows._replace(overflow=overflow)
    state = state._replace(
        phase=jnp.where(ended, IDLE, state.phase),
        rows=rows,
        ended=_keep(state.ended, rows, ended, state.rollout),
        work=state.work._replace(rounds=state.work.rounds + 1),
    )
    return _refill(loop, given, bank, state)


def pick(logits: Array, keys: Array, sampling: Sampling) -> tuple[Array, Array]:
    """(B, V) logits, −inf where the grammar forbids → tokens (B,) and their log-probs (B,) fp32.

    The log-probs are those of what was chosen from; greedily, of the logits as they are.
    """
    token = choose(logits, keys, sampling)
    kept = logits if sampling.temperature == 0 else filtered(logits, sampling)
    logprobs = jax.nn.log_softmax(kept, axis=-1)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]


class _Turn(NamedTuple):
    """A token chosen and those that the grammar then forces.

    Attributes:
        tokens, states, kinds: (S, run) int32. length: (S,) int32. logprobs: (S, run) fp32.
        state: (S,) int32, the grammar's afterwards. call: with all of them read.
    """

    tokens: Array
    states: Array
    kinds: Array
    length: Array
    logprobs: Array
    state: Array
    call: Call


def _turn(loop: Loop, given: Given, keys: Array, state: State, deciding: Array) -> _Turn:
    grammar = given.grammar
    before = jnp.where(deciding, state.grammar_state, START)
    place_keys = jax.vmap(jax.random.fold_in)(keys, state.rows.length)
    allowed = jnp.where(mask(grammar, before), state.logits, -jnp.inf)
    token, logprob = pick(allowed, place_keys, loop.config.sampling)
    free = grammar.forced[before] < 0
    token = jnp.where(free, token, grammar.forced[before])
    tokens, states, call, count = [token], [before], state.call, deciding.astype(jnp.int32)
    after = advance(grammar, before, token)
    call = _where(deciding, read_token(grammar, call, after, token), call)
    for _ in range(loop.lengths.run - 1):
        forced = grammar.forced[after]
        more = deciding & (forced >= 0) & (grammar.ended[after] < 0)
        tokens.append(forced)
        states.append(after)
        count += more
        after = jnp.where(more, advance(grammar, after, jnp.maximum(forced, 0)), after)
        call = _where(more, read_token(grammar, call, after, forced), call)
    first = jnp.arange(loop.lengths.run) == 0
    chosen = free[:, None] & first
    return _Turn(
        jnp.stack(tokens, axis=1),
        jnp.stack(states, axis=1),
        jnp.where(chosen, FREE, FORCED),
        count,
        jnp.where(chosen, logprob[:, None], 0.0),
        after,
        call,
    )


def _choose_and_feed(loop: Loop, given: Given, keys: Array, state: State) -> State:
    """One token chosen in every slot that decides, and what it forces; fed unless it ends the call."""
    deciding = state.phase == DECIDING
    turn = _turn(loop, given, keys, state, deciding)
    complete = deciding & (given.grammar.ended[turn.state] >= 0)
    fed = deciding & ~complete
    count = jnp.where(fed, turn.length, 0)
    places = state.position[:, None] + jnp.arange(loop.lengths.run, dtype=jnp.int32)
    new = Record(
        turn.tokens,
        turn.kinds,
        turn.logprobs,
        turn.states,
        jnp.broadcast_to(places, (3, *places.shape)),
        jnp.full_like(places, -1),
        jnp.broadcast_to(state.step[:, None], places.shape),
    )
    record = append(state.rows.record, state.rows.length, new, turn.length)

    def feed(width: int, before: _Fed) -> _Fed:
        real = jnp.arange(width) < count[:, None]
        batch = Batch(turn.tokens[:, :width], new.positions[..., :width], real.astype(jnp.int32))
        world, prompt = given.prompts.world, _prompt(loop, state)
        cache, hidden = feed_chunk(loop.model, given.params, batch, before[0], world, prompt)
        said = next_logits(loop.model, given.params, hidden)
        return cache, jnp.where(fed[:, None], said, before[1])

    widths = [min(width, loop.lengths.run) for width in (1, 2, 4, loop.lengths.run)]
    cache, logits = _as_wide_as_needed(widths, count, feed, (state.cache, state.logits))
    stopped = complete | (deciding & cache.overflow)
    return state._replace(
        cache=cache,
        logits=logits,
        position=state.position + turn.length,
        phase=jnp.where(stopped, WAITING, state.phase),
        grammar_state=jnp.where(deciding, turn.state, state.grammar_state),
        call=turn.call,
        pending=jnp.where(complete[:, None], turn.tokens, state.pending),
        pending_count=jnp.where(complete, turn.length, state.pending_count),
        rows=state.rows._replace(record=record, length=state.rows.length + turn.length),
        work=state.work._replace(
            decoded=state.work.decoded + len(deciding),
            choices=state.work.choices + jnp.sum(deciding, dtype=jnp.int32),
        ),
    )


_Fed = tuple[Cache, Array]
"""The cache and the logits (S, V) of the next token."""


def _as_wide_as_needed(
    widths: Sequence[int], count: Array, feed: Callable[[int, _Fed], _Fed], before: _Fed
) -> _Fed:
    """`feed` at the smallest of the widths that holds `count` (S,) tokens; not at all if there are none.

    Loops of one turn or none, in which a CPU writes in place: `cond` and `switch` would copy the cache.
    """
    most, narrower, fed = jnp.max(count), 0, before
    for width in sorted(set(widths)):
        once = ((most > narrower) & (most <= width)).astype(jnp.int32)
        fed = jax.lax.fori_loop(0, once, lambda _, x, width=width: feed(width, x), fed)
        narrower = width
    return fed


def _hear(loop: Loop, given: Given, state: State, rows: Array, observation: Observation) -> State:
    """The pending tokens and the observation into the cache and the record of some rows (S,) bool."""
    tokens, said = observation.tokens, jnp.sum(observation.real, axis=1, dtype=jnp.int32)
    positions = state.position[:, None] + observation.offsets
    heard = Record(
        tokens,
        jnp.full_like(tokens, OBSERVATION),
        jnp.zeros(tokens.shape),
        jnp.zeros_like(tokens),
        positions,
        observation.visual,
        jnp.broadcast_to(state.step[:, None], tokens.shape),
    )
    record = append(state.rows.record, state.rows.length, heard, jnp.where(rows, said, 0))

    # The pending tokens are the last of the record: the chunk is what follows what the cache holds.
    first = state.rows.length - state.pending_count
    count = jnp.where(rows, state.pending_count + said, 0)
    prompt, widest = _prompt(loop, state), loop.lengths.run + tokens.shape[1]

    def hear(width: int, slot: Array, before: _Fed) -> _Fed:
        """One row alone, in a chunk of `width`."""
        places = jnp.minimum(first[slot] + jnp.arange(width), loop.config.budget - 1)

        def cut(x: Array) -> Array:
            return jnp.take(jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=x.ndim - 2), places, axis=-1)

        cache, logits = before
        real = (jnp.arange(width) < count[slot])[None].astype(jnp.int32)
        batch, seen = Batch(cut(record.tokens), cut(record.positions), real), cut(record.visual)
        row, own = cache.row(slot), prompt[slot][None]
        row, hidden = feed_chunk(loop.model, given.params, batch, row, given.prompts.world, own, seen)
        said = next_logits(loop.model, given.params, hidden)
        return cache.with_row(slot, row), logits.at[slot].set(said[0])

    # Rows one by one, each in a chunk as narrow as it can be: together, all would be as wide as the longest,
    # and most are much shorter than the longest observation of all tools.
    fed, narrower = (state.cache, state.logits), 0
    for width in sorted({-(-widest * part // 4) for part in (1, 2, 3, 4)}):
        those = (count > narrower) & (count <= width)
        one = partial(hear, width)
        order, narrower = jnp.argsort(~those), width
        fed = jax.lax.fori_loop(
            0, jnp.sum(those), lambda i, fed, one=one, order=order: one(order[i], fed), fed
        )
    cache, logits = fed
    return state._replace(
        cache=cache,
        logits=logits,
        position=state.position + jnp.where(rows, observation.advance, 0),
        rows=state.rows._replace(record=record, length=state.rows.length + jnp.where(rows, said, 0)),
    )


def _begin_step(loop: Loop, given: Given, state: State, rows: Array, step: Array) -> State:
    """Some rows (S,) bool at the start of a step (S,): one that must answer if there is no room for more."""
    config, need = loop.config, loop.lengths
    left = config.budget - state.rows.length
    last = (step >= config.steps - 1) | (left < need.step + need.observation + need.answer)
    first = jnp.where(last, LAST, START)
    return state._replace(
        phase=jnp.where(rows, DECIDING, state.phase),
        step=jnp.where(rows, step, state.step),
        grammar_state=jnp.where(rows, first, state.grammar_state),
        call=_where(rows, start_call(len(rows), config.grammar.longest_text), state.call),
    )


def _refill(loop: Loop, given: Given, bank: Bank, state: State) -> State:
    """The next rollouts of the queue in the slots that are idle."""
    idle = state.phase == IDLE
    wanted = state.queue + jnp.cumsum(idle, dtype=jnp.int32) - 1
    taken = idle & (wanted < len(state.ended.length))
    state = state._replace(
        rollout=jnp.where(taken, wanted, state.rollout), queue=state.queue + jnp.sum(taken, dtype=jnp.int32)
    )
    prompt = _prompt(loop, state)
    state = state._replace(
        cache=take_prompts(state.cache, bank.cache, taken, prompt),
        logits=jnp.where(taken[:, None], bank.logits[prompt], state.logits),
        position=jnp.where(taken, bank.position[prompt], state.position),
        rows=_where_rows(taken, _no_rows(loop, len(taken)), state.rows),
    )
    return _begin_step(loop, given, state, taken, jnp.zeros_like(state.step))


def _no_rows(loop: Loop, rows: int) -> Rows:
    config = loop.config
    none = jnp.zeros((rows,), bool)
    text = config.grammar.longest_text
    return Rows(
        empty_record(rows, config.budget),
        jnp.zeros((rows,), jnp.int32),
        none,
        none,
        empty_calls(rows, config.steps, text),
        empty_memory(rows, config.tools.memory, text),
    )


def _keep(ended: Rows, rows: Rows, which: Array, rollout: Array) -> Rows:
    """The rollouts that have ended, those of some slots (S,) bool among them now."""
    to = jnp.where(which, rollout, len(ended.length))
    record = (
        old.at[..., to, :].set(new, mode="drop") for old, new in zip(ended.record, rows.record, strict=True)
    )
    rest = jax.tree.map(lambda old, new: old.at[to].set(new, mode="drop"), ended[1:], rows[1:])
    return Rows(Record(*record), *rest)


def _where_rows(which: Array, new: Rows, old: Rows) -> Rows:
    """As `_where`; a record's rows are its last axis but one."""
    record = (jnp.where(which[:, None], a, b) for a, b in zip(new.record, old.record, strict=True))
    return Rows(Record(*record), *_where(which, new[1:], old[1:]))


def _where(which: Array, new: Tree, old: Tree) -> Tree:
    """Of each array the rows, its first axis, of `new` where `which` (B,) says so."""

    def put(a: Array, b: Array) -> Array:
        return jnp.where(which.reshape(-1, *(1,) * (b.ndim - 1)), a, b)

    return jax.tree.map(put, new, old)


def _prompt(loop: Loop, state: State) -> Array:
    """(S,) int32: the prompt of each slot's rollout."""
    return state.rollout // loop.group


def _keys(loop: Loop, given: Given, state: State) -> Array:
    """(S,) keys of prompt and rollout; the place of a token is still to be folded in."""
    fold = jax.vmap(jax.random.fold_in)
    by_prompt = jax.vmap(lambda number: jax.random.fold_in(given.key, number))
    return fold(by_prompt(given.prompts.ids[_prompt(loop, state)]), state.rollout % loop.group)
