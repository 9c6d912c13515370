"""The driver: token for token what the compiled rollout says, and the host's tools for the graph's."""

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest

from iv3jax.compiles import Stopwatch
from iv3jax.generate.sampling import Sampling
from iv3jax.mcr.driver import Asked, drive
from iv3jax.mcr.rollout import rollout
from iv3jax.mcr.tools import Observation
from iv3jax.mcr.trajectories import OBSERVATION

pytestmark = pytest.mark.medium

KEY = jax.random.key(3)


def agree(name: str, count: int, first: int, group: int = 1, **changes: object) -> int:
    """Tokens of `count` prompts that driver and rollout agree on: all, of all kinds."""
    own = loops.lab(name)
    prompts = loops.prompts_of(own, count, first=first)
    compiled, work = rollout(*own.given(prompts, **changes), KEY, group)
    driven, driven_work = drive(*own.given(prompts, **changes), KEY, group)
    loops.same(compiled, driven)
    assert [int(x) for x in work] == [int(x) for x in driven_work]
    return int(jnp.sum(compiled.kinds >= 2))


@pytest.mark.slow
def test_driver_and_rollout_of_a_gqa_model_say_the_same_on_200_prompts() -> None:
    assert agree("tiny_gqa", 200, 0, slots=32) > 200 * 20


def test_driver_and_rollout_say_the_same() -> None:
    assert agree("tiny", loops.COUNT, 0, loops.GROUP) > loops.COUNT * 20


@pytest.mark.slow
def test_driver_and_rollout_draw_the_same_from_what_top_p_keeps() -> None:
    agree("tiny", loops.COUNT, 0, loops.GROUP, sampling=Sampling(0.8, 0.9), patience=1.0)


@pytest.mark.slow
def test_driver_and_rollout_say_the_same_on_1000_prompts() -> None:
    for first in range(0, 1000, 250):
        agree("tiny", 250, first, slots=32)


def test_the_host_may_answer_a_call() -> None:
    """What the host says stands in the record, and is what the model goes on from."""
    own = loops.lab()
    prompts = loops.prompts_of(own)
    plain, _ = rollout(*own.given(prompts), KEY, loops.GROUP)
    words = np.array(own.tokenizer.encode("look elsewhere"), np.int32)
    spoken = np.concatenate([own.words.begin, words, own.words.finish])
    asked_for = set()

    def tools(asked: Asked, observation: Observation) -> Observation:
        rows = np.flatnonzero(np.asarray(asked.tool) >= 0)
        asked_for.update((int(asked.rollout[i]), int(asked.step[i])) for i in rows)
        place = jnp.arange(observation.tokens.shape[1])
        real = jnp.broadcast_to(place < len(spoken), observation.real.shape)
        tokens = jnp.pad(jnp.asarray(spoken), (0, len(place) - len(spoken)))
        return Observation(
            jnp.broadcast_to(tokens, real.shape),
            real,
            jnp.full_like(observation.visual, -1),
            jnp.broadcast_to(place, observation.offsets.shape).astype(jnp.int32),
            jnp.full_like(observation.advance, len(spoken)),
        )

    found, _ = drive(*own.given(prompts), KEY, loops.GROUP, tools)
    assert np.asarray(found.answered).all()
    for row in range(loops.COUNT * loops.GROUP):
        steps = int(found.record.steps[row].max()) + 1
        assert {(row, step) for step in range(steps)} <= asked_for
        heard = np.asarray(found.tokens[row])[np.asarray(found.kinds[row]) == OBSERVATION]
        np.testing.assert_array_equal(heard, np.tile(spoken, steps - 1))
        # Until the first observation nothing is different.
        until = int(np.argmax(np.asarray(plain.kinds[row]) == OBSERVATION)) or None
        np.testing.assert_array_equal(found.tokens[row, :until], plain.tokens[row, :until])


def test_nothing_compiles_after_the_first_call() -> None:
    own = loops.lab()
    jax.block_until_ready(drive(*own.given(loops.prompts_of(own)), KEY, loops.GROUP))
    again, key = loops.prompts_of(own, first=6), jax.random.key(9)
    jax.block_until_ready((again, key))
    watch = Stopwatch()
    jax.block_until_ready(drive(*own.given(again), key, loops.GROUP))
    assert watch.compiles == 0
