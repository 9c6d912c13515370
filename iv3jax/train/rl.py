"""Reinforcement learning on rollouts: group-relative advantages, clipped ratios, a pull home (SPEC §6).

GSPO, GRPO, DAPO, Dr.GRPO and RLOO are choices of the same terms. Every loss is one of tokens, and the loop
(step.py) divides by the weights of the whole step, on every device and in every accumulated part. Which
rollouts to learn from is in rl_filter.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iv3jax.errors import UserError, did_you_mean
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.train.distill import Teacher, compared
from iv3jax.train.objective import Objective
from iv3jax.train.objective import Terms as ObjectiveTerms
from iv3jax.train.policy import Rules, chosen, importance, read
from iv3jax.train.policy_batch import PolicyBatch, needed
from iv3jax.typing import Array, Params


class _Kind(NamedTuple):
    """What a kind chooses.

    Attributes:
        baseline: "scaled": (r − mean) / (std + ε); "mean": r − mean; "others": r − mean of the others.
        sequence: whether the ratio is the sequence's, a geometric mean of its tokens', or each token's own.
        clip_low, clip_high: how far below and above 1 a ratio counts.
        reduction: of the tokens' losses. "sequences": mean over each sequence's tokens, then over sequences;
            "tokens": mean over all tokens; "sums": sum over each sequence's tokens, then mean over sequences;
            "constant": such sums, each divided by a constant.
    """

    baseline: str
    sequence: bool
    clip_low: float
    clip_high: float
    reduction: str


KINDS = {
    "gspo": _Kind("scaled", True, 3e-4, 4e-4, "sequences"),
    "grpo": _Kind("scaled", False, 0.2, 0.2, "sequences"),
    "dapo": _Kind("scaled", False, 0.2, 0.28, "tokens"),
    "dr_grpo": _Kind("mean", False, 0.2, 0.2, "constant"),
    "rloo": _Kind("others", False, 0.2, 0.2, "sums"),
}

KLS = ("k2", "exact", "none")

EPSILON = 1e-4
"""Added to a group's standard deviation: far above what rounding makes of equal rewards."""


@dataclass(frozen=True)
class RLConfig:
    """How rollouts are learned from.

    Attributes:
        kind: of KINDS.
        clip_low, clip_high: ratios below 1 − clip_low and above 1 + clip_high earn nothing more; 0: the
            kind's own.
        kl: to the reference: "k2" of the sampled tokens, "exact" over the vocabulary, or "none".
        beta: its weight.
        truncation: the most that a token counts for being likelier now than when it was sampled.
        constant: tokens that "dr_grpo" divides each rollout's sum by, such as the longest rollout's.
    """

    kind: str = "gspo"
    clip_low: float = 0.0
    clip_high: float = 0.0
    kl: str = "k2"
    beta: float = 0.01
    truncation: float = 2.0
    constant: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("kl", self.kl, KLS)):
            if value not in known:
                near = did_you_mean(value, known)
                raise UserError(f"{name} {value!r} is not one of {', '.join(known)}{near}")
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise UserError(f"clip_low {self.clip_low} must be in [0, 1) and clip_high {self.clip_high} ≥ 0")
        if self.beta < 0:
            raise UserError(f"beta {self.beta} must be 0 or more")
        if self.truncation < 1:
            raise UserError(f"truncation {self.truncation} must be 1 or more")
        if (self.kind == "dr_grpo") != (self.constant > 0):
            raise UserError(
                f'constant {self.constant}: kind="dr_grpo" needs one above 0, no other kind has one'
            )

    @property
    def low(self) -> float:
        """The clip below 1 that holds."""
        return self.clip_low or KINDS[self.kind].clip_low

    @property
    def high(self) -> float:
        """The clip above 1 that holds."""
        return self.clip_high or KINDS[self.kind].clip_high


def advantages(rewards: Array, kind: str) -> Array:
    """(P, G) rewards of P groups → (P, G) fp32 advantages, each relative to its group.

    Raises:
        UserError: a group of one, which has nothing to be relative to.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    if (group := rewards.shape[1]) < 2:
        raise UserError(f"a group of {group} rollouts has no mean to compare with; make it 2 or more")
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    baseline = KINDS[kind].baseline
    if baseline == "scaled":
        return centred / (jnp.std(rewards, axis=1, keepdims=True) + EPSILON)
    # r − (Σ − r) / (G − 1) = (r − mean) · G / (G − 1)
    return centred * (group / (group - 1)) if baseline == "others" else centred


class Terms(NamedTuple):
    """Of each token, (B, T) fp32, 0 where not free.

    Attributes:
        losses: what is made small.
        ratio: new to old probability, of the token or its sequence.
        clipped: 1 where the ratio has left the clip on the side on which it has no gradient.
        kl: as it is in the losses, before beta.
        correction: min(old / sampler's probability, truncation).
    """

    losses: Array
    ratio: Array
    clipped: Array
    kl: Array
    correction: Array


def policy_weights(config: RLConfig, free: Array) -> Array:
    """(B, T) fp32 weights whose sum over the whole step is what its losses are divided by.

    That is the number of free tokens for "dapo", else the number of rows that have any.
    """
    weights = free.astype(jnp.float32)
    if KINDS[config.kind].reduction == "tokens":
        return weights
    return weights / _count(free)


def policy_losses(config: RLConfig, logprob: Array, rollouts: PolicyBatch, kl: Array | None = None) -> Terms:
    """The terms of each token.

    Args:
        logprob: (B, T) fp32 of the labels, with gradient.
        rollouts: with advantages, and with reference for kl="k2".
        kl: (B, T) fp32, for kl="exact".
    """
    kind, free = KINDS[config.kind], rollouts.free
    advantage = needed(rollouts.advantages, "advantages")[:, None]
    change = jnp.where(free, logprob - rollouts.old, 0.0)
    if kind.sequence:
        # Each token has the sequence's ratio, and of its gradient the own part, so that the mean of the
        # tokens has the sequence's loss and gradient, and a token may be corrected by itself.
        mean = jnp.sum(change, axis=1, keepdims=True) / _count(free)
        change = jax.lax.stop_gradient(mean) + change - jax.lax.stop_gradient(change)
    ratio = jnp.exp(change)
    bounded = jnp.clip(ratio, 1 - config.low, 1 + config.high)
    gain = jnp.minimum(ratio * advantage, bounded * advantage)
    correction = importance(rollouts.old, rollouts.sampler, free, config.truncation)
    losses = -correction * gain
    if config.kl == "k2":
        reference = needed(rollouts.reference, "reference")
        kl = k2(logprob, reference, rollouts.sampler, free, config.truncation)
    kl = jnp.zeros_like(losses) if config.kl == "none" else needed(kl, "KL")
    losses += config.beta * kl
    if kind.reduction in ("sums", "constant"):
        losses *= _count(free) / (config.constant or 1)
    clipped = (ratio * advantage > bounded * advantage).astype(jnp.float32)
    return Terms(*(jnp.where(free, x, 0.0) for x in (losses, ratio, clipped, kl, correction)))


def k2(logprob: Array, reference: Array, sampler: Array, free: Array, most: float) -> Array:
    """(B, T) d²/2 with d = log π − log q: its gradient is, expected over samples of π, that of KL(π‖q).

    Weighted by how much likelier the token has become since it was sampled, `most` at most, because the
    samples must be π's. The probability of what came before it is taken as it was.
    """
    difference = jnp.where(free, logprob - reference, 0.0)
    return importance(logprob, sampler, free, most) * jnp.square(difference) / 2


def _count(free: Array) -> Array:
    """(B, 1) fp32, the free tokens of each row, at least 1."""
    return jnp.maximum(jnp.sum(free, axis=1, keepdims=True), 1).astype(jnp.float32)


def reinforcement(
    model: InternVideo3, config: RLConfig, rules: Rules, reference: Teacher | None = None
) -> Objective:
    """The objective of a batch of rollouts (PolicyBatch).

    Args:
        rules: those the rollouts were sampled by.
        reference: for kl="exact", compared without top-p and top-k; "k2" has its log-probabilities in the
            batch.

    Raises:
        UserError: kl="exact" without a reference, or with one of another vocabulary.
    """
    if config.kl == "exact":
        if reference is None:
            raise UserError('kl="exact" needs a reference model beside the policy')
        reference.check(model)

    def weights(batch: PolicyBatch) -> Array:
        return policy_weights(config, batch.free)

    def terms(params: Params, batch: PolicyBatch, _: Array) -> ObjectiveTerms:
        reading, labels = read(model, params, batch.batch), batch.labels
        if config.kl == "exact":
            assert reference is not None, "refused above"
            theirs = reference.read(params, batch)
            logprob, entropy, kl, _ = compared(reading, theirs, labels, batch.states, rules)
        else:
            (logprob, entropy), kl = chosen(reading, labels, batch.states, rules), None
        found = policy_losses(config, logprob, batch, kl)._asdict()
        return found.pop("losses"), found | {"entropy": entropy}

    def losses(params: Params, batch: PolicyBatch, key: Array) -> Array:
        return terms(params, batch, key)[0]

    return Objective(weights, losses, terms)
