"""Which rollouts and which questions are worth learning from. Plain NumPy, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iv3jax.errors import UserError

TOLERANCE = 1e-6
"""Rewards of a group that differ by less are equal."""

IOU_RANGE = (0.1, 0.7)
"""Of the fine-tuned model, where the paper's grounding questions for RL lie (SPEC §6)."""


def mixed(rewards: np.ndarray) -> np.ndarray:
    """(P, G) rewards → (P,) bool, groups whose rollouts differ: the others' advantages are all 0."""
    rewards = np.asarray(rewards)
    different: np.ndarray = rewards.max(axis=1) - rewards.min(axis=1) > TOLERANCE
    return different


@dataclass(frozen=True)
class Picked:
    """Groups that make up one batch.

    Attributes:
        rollout, group: (N,) int, which rollout's which group.
        mixed: how many of them have mixed outcomes; these come first.
    """

    rollout: np.ndarray
    group: np.ndarray
    mixed: int


def pick(rewards: Sequence[np.ndarray], wanted: int) -> Picked:
    """Groups with mixed outcomes from one or more rollouts, oldest first, to fill a batch.

    Where there are too few, roll out again or take the others that fill it up: shapes stay as they are.

    Args:
        rewards: (P, G) of each rollout.

    Raises:
        UserError: fewer groups in all than wanted.
    """
    places = [(i, j) for i, values in enumerate(rewards) for j in range(len(values))]
    if len(places) < wanted:
        raise UserError(f"{len(places)} groups were rolled out, a batch has {wanted}; roll out more prompts")
    outcomes = np.concatenate([mixed(values) for values in rewards])
    order = np.argsort(~outcomes, kind="stable")[:wanted]
    rollout, group = np.asarray(places).reshape(-1, 2)[order].T
    return Picked(rollout, group, int(outcomes[order].sum()))


def data_filter(kind: str, scores: np.ndarray) -> np.ndarray:
    """The paper's choice of questions for RL, by the fine-tuned model's own answers (SPEC §6).

    Args:
        kind: "grounding": kept where the mean temporal IoU of the answers lies in IOU_RANGE, ends included;
            "choice": kept where some answers are right and some are wrong.
        scores: (N, G), of G answers to each of N questions: IoU, or 1 for right and 0 for wrong.

    Returns:
        (N,) bool.

    Raises:
        UserError: an unknown kind, or a single answer to a multiple-choice question.
    """
    scores = np.asarray(scores, np.float64)
    kept: np.ndarray
    if kind == "grounding":
        iou = scores.mean(axis=1)
        kept = (iou >= IOU_RANGE[0] - TOLERANCE) & (iou <= IOU_RANGE[1] + TOLERANCE)
    elif kind == "choice":
        if scores.shape[1] < 2:
            raise UserError("a single answer is never both right and wrong; sample 2 or more")
        kept = mixed(scores)
    else:
        raise UserError(f"questions of kind {kind!r} have no filter; it is 'grounding' or 'choice'")
    return kept


def gap_filter(teacher: np.ndarray, student: np.ndarray, right: float = 0.5) -> np.ndarray:
    """The paper's choice of questions for distillation: the teacher is right, the student is not (SPEC §6).

    Args:
        teacher, student: (N, G) and (N, H) scores of their answers to N questions.
        right: from this score on an answer is right.

    Returns:
        (N,) bool: more than half of the teacher's answers are right, and less than half of the student's.
    """
    teacher_right = np.mean(np.asarray(teacher) >= right, axis=1)
    student_right = np.mean(np.asarray(student) >= right, axis=1)
    kept: np.ndarray = (teacher_right > 0.5) & (student_right < 0.5)
    return kept
