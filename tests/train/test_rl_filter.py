"""Which groups and questions are kept."""

import numpy as np
import pytest

from iv3jax.errors import UserError
from iv3jax.train.rl_filter import data_filter, gap_filter, mixed, pick


def test_mixed_outcomes():
    """Equal rewards teach nothing, rounding apart."""
    rewards = np.array([[0, 1, 1], [1, 1, 1], [0, 0, 0], [0.1, 0.1 + 1e-9, 0.1], [0.2, 0.2, 0.3]])
    assert mixed(rewards).tolist() == [True, False, False, False, True]


def test_a_batch_is_filled_with_mixed_groups_first():
    """Oldest first; where there are too few, the others fill it up."""
    first, second = np.array([[0, 0], [0, 1], [1, 1]]), np.array([[1, 0], [0, 0]])
    got = pick([first, second], 3)
    assert got.rollout.tolist() == [0, 1, 0] and got.group.tolist() == [1, 0, 0] and got.mixed == 2
    full = pick([first, second], 2)
    assert full.rollout.tolist() == [0, 1] and full.group.tolist() == [1, 0] and full.mixed == 2
    with pytest.raises(UserError, match="5 groups were rolled out, a batch has 6"):
        pick([first, second], 6)


def test_the_papers_data_filter():
    """Mean IoU in [0.1, 0.7]; multiple choice answered both right and wrong."""
    ious = np.array([[0.0, 0.1], [0.1, 0.1], [0.7, 0.7], [0.0, 1.0], [0.9, 0.6]])
    assert data_filter("grounding", ious).tolist() == [False, True, True, True, False]
    assert data_filter("grounding", ious[:, :1]).tolist() == [False, True, True, False, False]
    answers = np.array([[0, 0, 0], [0, 1, 0], [1, 1, 1]])
    assert data_filter("choice", answers).tolist() == [False, True, False]
    with pytest.raises(UserError, match="single answer"):
        data_filter("choice", answers[:, :1])
    with pytest.raises(UserError, match="'grounding' or 'choice'"):
        data_filter("caption", answers)


def test_the_gap_filter():
    """Kept where the teacher is right and the student is not, by the majority of their answers."""
    teacher = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 1], [1, 1, 1]])
    student = np.array([[0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]])
    assert gap_filter(teacher, student).tolist() == [True, False, False, False]
    assert gap_filter(np.array([[0.6]]), np.array([[0.4]])).tolist() == [True]
    assert gap_filter(np.array([[0.6]]), np.array([[0.4]]), right=0.7).tolist() == [False]
