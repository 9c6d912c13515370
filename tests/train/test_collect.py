"""Collecting: rows change places as they should, questions repeat, a prompt is the task's own question."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv3jax.data.config import DataConfig, SourceConfig
from iv3jax.data.processor import Processor
from iv3jax.data.sources import open_sources
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.errors import UserError
from iv3jax.mcr.environment import Environment
from iv3jax.mcr.grammar import GrammarConfig
from iv3jax.mcr.rollout_config import RolloutConfig
from iv3jax.mcr.tools import ToolConfig
from iv3jax.models.batch import Batch
from iv3jax.models.internvideo3 import InternVideo3, init_params
from iv3jax.models.presets import preset
from iv3jax.train.collect_batch import part_of, regrouped
from iv3jax.train.config import experiment
from iv3jax.train.policy_batch import PolicyBatch
from iv3jax.train.step import in_parts

MODEL = InternVideo3(preset("tiny"))
PROCESSOR = Processor.from_dir(TINY_FOLDER, MODEL.config)
ROLLOUT = RolloutConfig(
    steps=2,
    budget=112,
    slots=4,
    grammar=GrammarConfig(thought_tokens=3, text_tokens=3, answer_tokens=3, tools=("zoom", "answer")),
    tools=ToolConfig(frames=2, memory=2, grid=(3, 3)),
)
SOURCES = (
    SourceConfig("task:at", weight=1.0, options=("seconds=5,8", "shown=1.5,3.5")),
    SourceConfig("task:read", weight=1.0),
)


def environment(length: int = 112, sources=SOURCES, config=ROLLOUT) -> Environment:
    data = DataConfig(sources=sources)
    return Environment(data, MODEL, PROCESSOR, config, frames=2, length=length, seed=0)


def numbered(first: int, rows: int = 4) -> PolicyBatch:
    """Rows that are told apart by their number in every field."""
    number = jnp.arange(first, first + rows, dtype=jnp.int32)
    tokens = jnp.broadcast_to(number[:, None], (rows, 6))
    batch = Batch(tokens, jnp.broadcast_to(tokens, (3, rows, 6)), tokens, tokens)
    return PolicyBatch(batch, tokens, tokens.astype(jnp.float32), tokens.astype(jnp.float32), number)


def test_rows_change_places_whole():
    old, new = numbered(0), numbered(4)
    found = regrouped(old, new, jnp.array([0, 1, 6, 7]))
    cut = part_of(found, 2, jnp.int32(1))
    for leaf in jax.tree.leaves(cut):
        assert set(np.unique(leaf)) == {1, 6}
    assert cut.batch.positions.shape == (3, 2, 6) and cut.reference is None


def test_every_row_is_in_one_part():
    parts = in_parts(numbered(0, 6), 3)
    assert parts.batch.positions.shape == (3, 3, 2, 6) and parts.teacher is None
    np.testing.assert_array_equal(parts.advantages, [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(parts.states[1, :, 0], [1, 4])


def test_questions_depend_on_their_number_alone():
    asked = environment().asked(0, 6)
    later = environment().asked(4, 2)
    assert later.names == asked.names[4:] and later.questions == asked.questions[4:]
    assert sum(name.startswith("task:at") for name in asked.names) == 3
    np.testing.assert_array_equal(later.samples[1].patches, asked.samples[5].patches)
    assert later.ids == (4, 5)


@pytest.mark.medium
def test_prompts_are_the_questions_with_an_overview():
    own = environment()
    own.check(prompts=2, group=2)
    asked = own.asked(0, 2)
    # The grid is the frames', whatever the config said.
    assert own.config.tools.grid == (1, 1) and own.patches == 32
    params = jax.jit(lambda: init_params(MODEL, jax.random.key(0)))()
    prompts = own.prompts(params, asked)
    planned = own.shapes(2)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), prompts) == jax.tree.map(
        lambda x: (x.shape, np.dtype(x.dtype)), planned
    )
    assert prompts.tokens.shape == (2, 112) and prompts.world.features.shape[:3] == (2, 32, 1)
    for row, question in enumerate(asked.questions):
        real = np.asarray(prompts.segment_ids[row]) != 0
        text = PROCESSOR.tokenizer.decode(np.asarray(prompts.tokens[row])[real].tolist())
        assert question.text in text and (np.asarray(prompts.visual[row]) >= 0).sum() == 2


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="no synthetic task"):
        environment(sources=(SourceConfig("trace:at"),))
    with pytest.raises(UserError, match="the budget of 30 tokens is smaller"):
        environment(config=replace(ROLLOUT, budget=30)).check(prompts=2, group=2)


@pytest.mark.parametrize(
    "name", ["rl", "rl:tiny", "traces", "traces:tiny", "traces:tiny_once", "traces:tiny_wide"]
)
def test_sources_of_the_experiments_can_be_opened(name: str):
    for opened in open_sources(experiment(name).data):
        assert len(opened.source) == 100_000
