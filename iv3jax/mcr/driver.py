"""The same rounds from Python: what they leave is what rollout.py leaves, token for token.

Slower, because the host waits for every round, but between two parts of a round the host may put another
observation in the place of the graph's: a tool that needs speech recognition, new frames or the web.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax

from iv3jax.mcr.grammar import Call, Grammar
from iv3jax.mcr.memory import Memory
from iv3jax.mcr.prompts import Bank, Prompts, check_prompts, fill_bank
from iv3jax.mcr.rollout import finish, prepare
from iv3jax.mcr.rollout_config import RolloutConfig
from iv3jax.mcr.step import Given, Loop, State, Work, called, listen, look, running, speak, start
from iv3jax.mcr.tools import Observation
from iv3jax.mcr.trajectories import Trajectories
from iv3jax.mcr.wording import Wording
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.typing import Array, Params


class Asked(NamedTuple):
    """The calls that a round's tools are asked, of all S slots.

    Attributes:
        rollout, step: (S,) int32, whose, and in which of its steps.
        tool: (S,) int32, index into grammar.TOOLS; −1 where there is no call, and nothing is asked.
        call: its registers.
    """

    rollout: Array
    step: Array
    tool: Array
    call: Call


HostTools = Callable[[Asked, Observation], Observation]
"""What the tools of the graph say → what is said; of the same shapes and dtypes."""


def drive(
    model: InternVideo3,
    params: Params,
    prompts: Prompts,
    config: RolloutConfig,
    grammar: Grammar,
    words: Wording,
    key: Array,
    group: int = 1,
    host_tools: HostTools | None = None,
) -> tuple[Trajectories, Work]:
    """As `rollout`, round by round from Python.

    Args:
        host_tools: called once a round; may replace what any waiting slot is told.

    Raises:
        UserError: as `rollout`.
    """
    check_prompts(prompts)
    loop = prepare(model, prompts, config, grammar, words, group)
    given = Given(params, prompts, grammar, words, key)
    bank, state = _start(loop, given)
    while running(state):
        state, observation, memory = _speak_and_look(loop, given, state)
        if host_tools is not None:
            asked = Asked(state.rollout, state.step, called(given, state), state.call)
            observation = host_tools(asked, observation)
        state = _listen(loop, given, bank, state, observation, memory)
    return _finish(loop, given, state), state.work


@partial(jax.jit, static_argnums=0)
def _start(loop: Loop, given: Given) -> tuple[Bank, State]:
    bank = fill_bank(loop.model, given.params, given.prompts, loop.config.cache_dtype)
    return bank, start(loop, given, bank)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _speak_and_look(loop: Loop, given: Given, state: State) -> tuple[State, Observation, Memory]:
    state = speak(loop, given, state)
    return state, *look(loop, given, state)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _listen(
    loop: Loop, given: Given, bank: Bank, state: State, observation: Observation, memory: Memory
) -> State:
    return listen(loop, given, bank, state, observation, memory)


_finish = jax.jit(finish, static_argnums=0)
