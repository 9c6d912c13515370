"""Rollouts as a batch to learn from: what sampling knew of each token, as arrays beside the model's Batch.

All arrays of tokens are aligned like labels: at t they are about the token that t predicts, t + 1 of the row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from iv3jax.models.batch import IGNORE_LABEL, LOGICAL_AXES, Batch
from iv3jax.models.batch import Array as AnyArray
from iv3jax.typing import Array


class PolicyBatch(NamedTuple):
    """Rollouts to learn from, one a row.

    Attributes:
        batch: what the policy reads; its labels are the tokens that it chose freely, and IGNORE_LABEL on
            prompt, observations, forced tokens and all that follows the end: these alone are learned from.
        states: (B, T) int32, the grammar's state before the label.
        sampler: (B, T) fp32, the labels' log-probabilities as the sampler had them.
        old: (B, T) fp32, the same as the trainer had them before its first update; GSPO clips at less than
            what sampler and trainer differ by.
        advantages: (B,) fp32 of each row, or None for distillation.
        reference: (B, T) fp32 log-probabilities of the reference model or the teacher, or None. By grammar
            and temperature only (Rules.unfiltered): any one distribution does, but a top-p that makes room
            for each label is not one.
        teacher: what a teacher reads where it sees something else than the policy, such as more frames.
        teacher_index: (B, T) int32, where in the teacher's row the same token is predicted; 0 without label.
        top_ids: (B, T, K) int32, the teacher's K most likely tokens, or None.
        top_logprobs: (B, T, K) fp32, theirs, up to a constant; −inf for fewer than K.
    """

    batch: Batch
    states: AnyArray
    sampler: AnyArray
    old: AnyArray
    advantages: AnyArray | None = None
    reference: AnyArray | None = None
    teacher: Batch | None = None
    teacher_index: AnyArray | None = None
    top_ids: AnyArray | None = None
    top_logprobs: AnyArray | None = None

    @property
    def labels(self) -> Array:
        """(B, T) int32, the batch's."""
        return needed(self.batch.labels, "labels")

    @property
    def free(self) -> Array:
        """(B, T) bool, where the policy chose the next token freely: SPEC §6's mask m."""
        return self.labels != IGNORE_LABEL


_TOKENS = ("batch", "sequence")

POLICY_AXES = PolicyBatch(
    batch=LOGICAL_AXES,
    states=_TOKENS,
    sampler=_TOKENS,
    old=_TOKENS,
    advantages=("batch",),
    reference=_TOKENS,
    teacher=LOGICAL_AXES,
    teacher_index=_TOKENS,
    top_ids=(*_TOKENS, None),
    top_logprobs=(*_TOKENS, None),
)
"""The logical axes of each field (`sharding.RULES`)."""


def each_field(function: Callable[[Any, tuple[str | None, ...]], Any], batch: Any, axes: Any = None) -> Any:
    """A Batch or PolicyBatch with `function` of each array that it has, and of that array's logical axes."""
    if batch is None:
        return None
    if not hasattr(batch, "_fields"):
        return function(batch, axes)
    axes = axes or (POLICY_AXES if isinstance(batch, PolicyBatch) else LOGICAL_AXES)
    pairs = zip(batch, axes, strict=True)
    return type(batch)(*(each_field(function, value, own) for value, own in pairs))


def needed(field: AnyArray | None, name: str) -> Array:
    """A field of a PolicyBatch that the objective at hand cannot do without."""
    if field is None:
        raise ValueError(f"a batch without {name} does not fit this objective")
    return jnp.asarray(field)


def policy_batch(
    batch: Batch, free: Array, states: Array, logprobs: Array, advantages: Array | None = None
) -> PolicyBatch:
    """A batch of rollouts from what is known of each token, everything moved to where the token is predicted.

    Args:
        batch: the rollouts. free: (B, T) bool, tokens that were the policy's choice.
        states, logprobs: (B, T), of each token: the grammar's state before it, and what the sampler gave it.
        advantages: (B,), as in PolicyBatch.

    Returns:
        `old` is the sampler's: replace it by the trainer's where a ratio to it matters.
    """
    free = _following(free, False)
    labels = jnp.where(free, _following(batch.input_ids, 0), IGNORE_LABEL).astype(jnp.int32)
    sampler = jnp.where(free, _following(logprobs, 0), 0.0)
    states = jnp.where(free, _following(states, 0), 0)
    return PolicyBatch(batch._replace(labels=labels), states, sampler, sampler, advantages)


def _following(x: Array, last: float) -> Array:
    """(B, T), at t what x is at t + 1."""
    return jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1)), constant_values=last)
