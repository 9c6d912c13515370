"""Rollouts as a teacher reads them, who was shown more of the same video."""

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest

from iv3jax.data.positions import mrope_positions
from iv3jax.mcr.prompts import Prompts
from iv3jax.mcr.rollout import rollout
from iv3jax.mcr.trajectories import PROMPT, Trajectories, after_others, as_batch
from iv3jax.train.collect_batch import logprobs, rows_of, teachers_logprobs, with_view
from iv3jax.train.distill import TEACHER, Teacher
from iv3jax.train.policy import Rules

pytestmark = pytest.mark.medium
KEY = jax.random.key(7)


def both() -> tuple[Prompts, Trajectories]:
    own = loops.lab()
    prompts = loops.prompts_of(own, first=60)
    return prompts, rollout(*own.given(prompts), KEY, loops.GROUP)[0]


def test_after_the_same_prompts_nothing_changes() -> None:
    prompts, found = both()
    jax.tree.map(np.testing.assert_array_equal, found, after_others(found, prompts, prompts))


def test_what_was_said_follows_the_others() -> None:
    own = loops.lab()
    prompts, found = both()
    others = loops.prompts_of(own, first=60, length=200, frames=9)
    moved = after_others(found, prompts, others)
    mine, theirs = (np.asarray(p.segment_ids).sum(axis=1) for p in (prompts, others))
    assert (theirs > mine).all()
    record = moved.record
    for row, prompt in enumerate(np.asarray(found.prompt)):
        (a, b), (c, d) = (mine[prompt], int(found.length[row])), (theirs[prompt], int(moved.length[row]))
        assert d - c == b - a
        np.testing.assert_array_equal(record.tokens[row, :c], others.tokens[prompt, :c])
        assert (np.asarray(record.kinds[row, :c]) == PROMPT).all()
        for name in ("tokens", "kinds", "logprobs", "states", "visual", "steps"):
            np.testing.assert_array_equal(
                getattr(record, name)[row, c:d], getattr(found.record, name)[row, a:b], err_msg=name
            )
        # Positions are those of the whole conversation, which knows nothing of prompts.
        tokens = np.asarray(record.tokens[row, :d])
        video = own.model.config.video_token_id
        patches = int((tokens == video).sum()) // 2
        expected = mrope_positions(tokens, -1, video, [(1, *loops.GRID)] * patches, 1)
        np.testing.assert_array_equal(record.positions[:, row, :d], expected)
        assert not np.asarray(record.tokens[row, d:]).any()


def test_the_teachers_view_predicts_the_same_tokens() -> None:
    own = loops.lab()
    prompts, found = both()
    others = loops.prompts_of(own, first=60, length=200, frames=9)
    batch = with_view(rows_of(found, prompts), found, prompts, others)
    assert batch.teacher is not None and batch.teacher_index is not None
    read = jnp.take_along_axis(batch.teacher.input_ids, batch.teacher_index + 1, axis=1)
    free = np.asarray(batch.free)
    np.testing.assert_array_equal(np.asarray(read)[free], np.asarray(batch.labels)[free])
    # Every vision token stands beside its features.
    moved = as_batch(after_others(found, prompts, others), others)
    np.testing.assert_array_equal(batch.teacher.features, moved.features)
    seen = np.asarray(batch.teacher.input_ids) == own.model.config.video_token_id
    np.testing.assert_array_equal(np.asarray(batch.teacher.visual_index) >= 0, seen)


def test_the_teacher_of_the_same_view_is_the_student() -> None:
    """Log-probabilities of a plain pass, whichever way they are had."""
    own = loops.lab()
    prompts, found = both()
    longer = loops.prompts_of(own, first=60, length=200)
    batch = with_view(rows_of(found, prompts), found, prompts, longer)
    rules = Rules(own.grammar, own.config.sampling)
    given = {TEACHER: own.params}
    mine = logprobs(own.model, rules, own.params, 3, batch._replace(teacher=None, teacher_index=None))
    theirs = teachers_logprobs(Teacher(own.model), rules, given, 3, batch)
    np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)
    assert float(jnp.min(mine)) < -1
