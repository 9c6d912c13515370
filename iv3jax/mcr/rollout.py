"""The rollout: prompts in, finished trajectories out, the whole tool loop in one compiled program.

The prompts are fed once. Then rounds of `step` run until the queue of rollouts is empty and every slot idle:
a loop that ends by itself, so rollouts that have ended cost nothing.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from iv3jax.mcr.grammar import LAST, Grammar, longest_forced, longest_step, start_call
from iv3jax.mcr.memory import empty_memory
from iv3jax.mcr.prompts import Prompts, check_prompts, fill_bank
from iv3jax.mcr.rollout_config import Lengths, RolloutConfig, check_rollout
from iv3jax.mcr.step import Given, Loop, State, Work, listen, look, running, speak, start
from iv3jax.mcr.tools import Observation, observe
from iv3jax.mcr.trajectories import Record, Trajectories, with_prompts
from iv3jax.mcr.wording import Wording
from iv3jax.mcr.world import World
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.sharding import axes_over
from iv3jax.typing import Array, Params
from kernels_pallas.choice import chip

_RUN_ON_CPU = 2
"""Tokens fed after one choice at most on a CPU, where a pass takes longer for all rows if one has a long run.
A chip reads the weights for one token as for five: there a run is fed at once."""


def rollout(
    model: InternVideo3,
    params: Params,
    prompts: Prompts,
    config: RolloutConfig,
    grammar: Grammar,
    words: Wording,
    key: Array,
    group: int = 1,
) -> tuple[Trajectories, Work]:
    """`group` rollouts of each prompt → the P·group trajectories, those of a prompt side by side.

    What a trajectory says depends on the parameters, its prompt, the prompt's id, its number in the group and
    the key; not on slots, their order, the padding of prompts, other prompts, or how many devices share them.
    A second call of the same shapes compiles nothing.

    Args:
        key: a jax.random.key.

    Raises:
        UserError: prompts or config cannot work; before anything is compiled.
    """
    check_prompts(prompts)
    loop = prepare(model, prompts, config, grammar, words, group)
    return program(loop, Given(params, prompts, grammar, words, key))


def prepare(
    model: InternVideo3,
    prompts: Prompts,
    config: RolloutConfig,
    grammar: Grammar,
    words: Wording,
    group: int,
) -> Loop:
    """What is compiled in, checked; of the prompts only the shapes count.

    Raises:
        UserError: see `check_rollout`.
    """
    text = model.config.text_config
    table = jax.ShapeDtypeStruct((text.vocab_size, text.hidden_size), jnp.float32)
    observation = _shown.eval_shape(config, words, prompts.world, table)
    run = 1 + longest_forced(grammar)
    lengths = Lengths(
        min(run, _RUN_ON_CPU) if chip().platform == "cpu" else run,
        longest_step(grammar),
        longest_step(grammar, LAST),
        observation.tokens.shape[1],
    )
    check_rollout(config, lengths, prompts.tokens.shape[1], text.max_position_embeddings, group)
    return Loop(model, config, lengths, group)


@partial(jax.jit, static_argnums=0)
def _shown(config: RolloutConfig, words: Wording, world: World, table: Array) -> Observation:
    """An observation, for its shape."""
    none = jnp.zeros((1,), jnp.int32)
    text = config.grammar.longest_text
    call = start_call(1, text)
    memory = empty_memory(1, config.tools.memory, text)
    names = config.grammar.tools
    return observe(words, config.tools, world, none, none, call, memory, none, table, names)[0]


def finish(loop: Loop, given: Given, state: State) -> Trajectories:
    """The trajectories of a state in which all rollouts have ended. Pure."""
    rows = state.ended
    prompt = jnp.arange(len(rows.length)) // loop.group
    before = jnp.sum(given.prompts.segment_ids != 0, axis=1)[prompt]
    return Trajectories(
        with_prompts(rows.record, rows.length, given.prompts, prompt),
        before + rows.length,
        prompt,
        rows.answered,
        rows.overflow,
        rows.calls,
        rows.memory,
    )


@partial(jax.jit, static_argnums=0)
def program(loop: Loop, given: Given) -> tuple[Trajectories, Work]:
    """`rollout` after its checks. On every device that shares a batch its part of the prompts and slots.

    A rollout is what it is in any company, so the devices have nothing to tell each other: the weights are
    gathered once, and no device waits for another before all are done.
    """
    prompts = given.prompts.tokens.shape[0]
    axes = axes_over("batch", prompts)
    if not axes:
        return _alone(loop, given)
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[axis] for axis in axes)
    slots = -(-loop.config.slots // parts)
    local = replace(loop, config=replace(loop.config, slots=slots))

    def part(given: dict[str, Any]) -> tuple[Trajectories, Work]:
        found, work = _alone(local, Given(**given))
        sums = Work(*(jax.lax.psum(x, axes) for x in work))
        return found, sums._replace(rounds=jax.lax.pmax(work.rounds, axes))

    whole = PartitionSpec()
    found, work = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=({**dict.fromkeys(Given._fields, whole), "prompts": _split_rows(Prompts, axes)},),
        out_specs=(_split_rows(Trajectories, axes)._replace(record=_split_rows(Record, axes)), whole),
        check_vma=False,
    )(given._asdict())
    return found._replace(prompt=jnp.arange(prompts * loop.group) // loop.group), work


def _split_rows(kind: Any, axes: tuple[str, ...]) -> Any:
    """Of a NamedTuple whose rows are the first axis of all arrays, and of positions the second."""
    names = {name: PartitionSpec(axes) for name in kind._fields}
    if "positions" in names:
        names["positions"] = PartitionSpec(None, axes)
    return kind(**names)


def _alone(loop: Loop, given: Given) -> tuple[Trajectories, Work]:
    bank = fill_bank(loop.model, given.params, given.prompts, loop.config.cache_dtype)

    def one(state: State) -> State:
        state = speak(loop, given, state)
        return listen(loop, given, bank, state, *look(loop, given, state))

    state = jax.lax.while_loop(running, one, start(loop, given, bank))
    return finish(loop, given, state), state.work
