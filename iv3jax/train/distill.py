"""On-policy distillation: reverse KL(π‖teacher) on the student's own rollouts, mean over tokens (SPEC §6).

Exact over the vocabulary, over the teacher's K most likely tokens, or by the sampled token alone. All three
have the gradient of the reverse KL of each token's distribution, given what the student wrote before it.
Where that is what the teacher would hardly have written, its advice is about nothing, and may be left out
(`trusted`).

A fourth kind is what they are to be compared with: the teacher answers, and the student is fine-tuned on its
words (sequence-level distillation, Kim and Rush, arXiv 1606.07947).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iv3jax.errors import UserError, did_you_mean
from iv3jax.mcr.grammar import mask
from iv3jax.models.batch import IGNORE_LABEL
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.train.loss import LOGIT_CHUNK
from iv3jax.train.objective import Objective, Terms
from iv3jax.train.policy import (
    Chosen,
    Reading,
    Rules,
    chosen,
    chosen_of,
    importance,
    over_tokens,
    read,
)
from iv3jax.train.policy_batch import PolicyBatch, needed
from iv3jax.typing import Array, Params

TEACHER = "teacher"
"""Where a teacher's own parameters lie among the (frozen) parameters of a step."""

KINDS = ("exact", "top_k", "sampled", "sequence")


@dataclass(frozen=True)
class Teacher:
    """A model that is compared with, in the same program.

    Attributes:
        model: with the student's vocabulary; widths, depth and attention may be others.
        shared: whether it has the student's parameters, as it does where the student is it plus low-rank
            additions, or where it is the student with a privileged view. Else they are at TEACHER.
    """

    model: InternVideo3
    shared: bool = False

    def check(self, student: InternVideo3) -> None:
        """Raises:
        UserError: a teacher of another vocabulary.
        """
        own, other = (m.config.text_config.vocab_size for m in (self.model, student))
        if own != other:
            raise UserError(
                f"the teacher's vocabulary has {own} tokens, the student's {other}; they must be the same one"
            )

    def read(self, params: Params, rollouts: PolicyBatch) -> Reading:
        """The teacher's reading of the same tokens, without gradient.

        Args:
            params: all of the step.
        """
        params = jax.lax.stop_gradient(params if self.shared else params[TEACHER])
        batch = rollouts.batch if rollouts.teacher is None else rollouts.teacher
        reading = read(self.model, params, batch)
        if rollouts.teacher_index is None:
            return reading
        hidden = jnp.take_along_axis(reading.hidden, rollouts.teacher_index[..., None], axis=1)
        return Reading(self.model, reading.head, hidden)


class Compared(NamedTuple):
    """Of each label, (B, T) fp32, 0 where there is none.

    Attributes:
        logprob, entropy: as in Chosen, by all the rules.
        kl: Σ π (log π − log q) over what the grammar allows, at the rules' temperature, without top-p and
            top-k: where those leave nothing of q, there would be no end to it.
        reference: the teacher's log-probability of the label, by grammar and temperature alone; of its most
            likely tokens, −inf where the label is none of them.
    """

    logprob: Array
    entropy: Array
    kl: Array
    reference: Array


def compared(
    student: Reading, teacher: Reading, targets: Array, states: Array, rules: Rules, chunk: int = LOGIT_CHUNK
) -> Compared:
    """The exact reverse KL, in chunks that hold the logits of both.

    Args:
        targets, states, chunk: as of `policy.token_logprobs`.
    """

    def one(
        weights: Params, free: Array, hidden: Array, teachers: Array, targets: Array, states: Array
    ) -> Compared:
        allowed = mask(weights["grammar"], states) | ~free[..., None]
        logits = student.model.apply({"params": weights["student"]}, hidden, method="logits")
        theirs = teacher.model.apply({"params": weights["teacher"]}, teachers, method="logits")
        temperature = rules.sampling.temperature
        kl = reverse_kl(logits / temperature, theirs / temperature, allowed)
        reference = _logprobs(theirs / temperature, allowed)
        reference = jnp.take_along_axis(reference, targets[..., None], axis=-1)[..., 0]
        return Compared(*chosen_of(logits, allowed, targets, rules.sampling), kl, reference)

    weights = {"student": student.head, "teacher": teacher.head, "grammar": rules.grammar}
    given = (student.hidden, teacher.hidden, jnp.maximum(targets, 0), states)
    return Compared(*over_tokens(one, (0,) * 4, chunk, weights, targets != IGNORE_LABEL, *given))


def reverse_kl(logits: Array, teacher: Array, allowed: Array) -> Array:
    """KL(π‖q) of (…, N) logits each, both renormalised over those allowed (…, N) bool → (…)."""
    student = _logprobs(logits, allowed)
    each = jnp.exp(student) * (student - _logprobs(teacher, allowed))
    return jnp.sum(jnp.where(allowed, each, 0.0), axis=-1)


def _logprobs(logits: Array, allowed: Array) -> Array:
    """Of (…, N) logits over those allowed (…, N) bool; 0 for the others."""
    logits = jnp.where(allowed, logits, -jnp.inf)
    return jnp.where(allowed, logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True), 0.0)


class TopK(NamedTuple):
    """The teacher's most likely tokens (B, T, K), as PolicyBatch has them."""

    ids: Array
    logprobs: Array


def teacher_top_k(
    teacher: Reading, targets: Array, states: Array, rules: Rules, k: int, chunk: int = LOGIT_CHUNK
) -> TopK:
    """What a teacher sends that is not part of the step: its K most likely tokens wherever there is a label.

    Of those the grammar allows, at the rules' temperature; −inf for what is not allowed.
    """

    def one(weights: Params, free: Array, hidden: Array, states: Array) -> tuple[Array, ...]:
        logits = teacher.model.apply({"params": weights["head"]}, hidden, method="logits")
        allowed = mask(weights["grammar"], states) | ~free[..., None]
        left = jnp.where(allowed, logits / rules.sampling.temperature, -jnp.inf)
        values, ids = jax.lax.top_k(jax.nn.log_softmax(left), k)
        return ids, values

    weights = {"head": teacher.head, "grammar": rules.grammar}
    given = (teacher.hidden, states)
    return TopK(*over_tokens(one, (1, 1), chunk, weights, targets != IGNORE_LABEL, *given))


def top_k_kl(
    student: Reading, targets: Array, states: Array, top: TopK, rules: Rules, chunk: int = LOGIT_CHUNK
) -> Compared:
    """The reverse KL over the teacher's most likely tokens alone, both sides renormalised over them."""

    def one(
        weights: Params,
        free: Array,
        hidden: Array,
        targets: Array,
        states: Array,
        ids: Array,
        theirs: Array,
    ) -> Compared:
        logits = student.model.apply({"params": weights["head"]}, hidden, method="logits")
        allowed = mask(weights["grammar"], states) | ~free[..., None]
        ours = jnp.take_along_axis(logits, ids, axis=-1) / rules.sampling.temperature
        kl = reverse_kl(ours, theirs, (theirs > -jnp.inf) | ~free[..., None])
        reference = jnp.max(jnp.where(ids == targets[..., None], theirs, -jnp.inf), axis=-1)
        return Compared(*chosen_of(logits, allowed, targets, rules.sampling), kl, reference)

    weights = {"head": student.head, "grammar": rules.grammar}
    given = (student.hidden, jnp.maximum(targets, 0), states, top.ids, top.logprobs)
    return Compared(*over_tokens(one, (0,) * 4, chunk, weights, targets != IGNORE_LABEL, *given))


def sampled_losses(logprob: Array, reference: Array, sampler: Array, free: Array, most: float) -> Array:
    """(B, T) losses of the advantage −(log π − log q) of each sampled token, 0 where not free.

    The value is an estimate of the KL; its gradient is (log π − log q)·∇log π, never that of the difference
    itself, whose expectation is 0. Weighted as k2 is (rl.k2) once π is not the sampler any more.
    """
    advantage = -jax.lax.stop_gradient(jnp.where(free, logprob - reference, 0.0))
    change = jnp.where(free, logprob, 0.0)
    ratio = jnp.exp(change - jax.lax.stop_gradient(change))
    return -importance(logprob, sampler, free, most) * ratio * advantage


def trusted(reference: Array, free: Array, least: float) -> Array:
    """(B, T) bool: the free tokens before which the teacher gives each free one a probability of `least`.

    The first that it does not counts still: there the student is set right. What follows it is a text that
    the teacher would not have come to, such as looks at a time that was misread.

    Args:
        reference: (B, T), the teacher's log-probabilities of the free tokens; a row is one rollout.
    """
    strange = free & (jnp.where(free, reference, 0.0) < jnp.log(least))
    return free & (jnp.cumsum(strange, axis=1) - strange == 0)


@dataclass(frozen=True)
class DistillConfig:
    """How a teacher is learned from.

    Attributes:
        kind: "exact", with the teacher in the step; "top_k", with its most likely tokens in the batch;
            "sampled", with its log-probabilities of the sampled tokens in the batch; or "sequence", with
            rollouts of the teacher's own instead of the student's.
        teacher: a model folder, hub id or run, of any attention and size, with the student's tokenizer;
            empty: the model as the run began, which then needs `frames`.
        frames: temporal patches of the overview that the teacher sees; 0: as many as the student.
        room: tokens that its prompt may have beyond the student's, for these.
        top: for "top_k", how many tokens.
        truncation: for "sampled", the most that a token counts for being likelier now than when it was
            sampled.
        trust: what follows a token that the teacher gives a smaller probability is not learned from
            (`trusted`), but for "sequence", whose tokens are the teacher's; 0: all is.
    """

    kind: str = "exact"
    teacher: str = ""
    frames: int = 0
    room: int = 0
    top: int = 64
    truncation: float = 2.0
    trust: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = did_you_mean(self.kind, KINDS)
            raise UserError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}{near}")
        if self.truncation < 1:
            raise UserError(f"truncation {self.truncation} must be 1 or more")
        if not 0 <= self.trust < 1:
            raise UserError(f"trust {self.trust} must be 0 or more and below 1")
        for name, least in (("frames", 0), ("room", 0), ("top", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} {value} must be {least} or more")


def distillation(
    model: InternVideo3, config: DistillConfig, rules: Rules, teacher: Teacher | None = None
) -> Objective:
    """The objective of a batch of rollouts (PolicyBatch): mean over their free tokens, 0 where not trusted.

    Args:
        rules: those the rollouts were sampled by. teacher: for kind="exact".

    Raises:
        UserError: kind="exact" without a teacher, or with one of another vocabulary.
    """
    if config.kind == "exact":
        if teacher is None:
            raise UserError('kind="exact" needs a teacher beside the student')
        teacher.check(model)

    def weights(batch: PolicyBatch) -> Array:
        return batch.free.astype(jnp.float32)

    def terms(params: Params, batch: PolicyBatch, _: Array) -> Terms:
        reading, labels = read(model, params, batch.batch), batch.labels
        if config.kind in ("sampled", "sequence"):
            found: Chosen = chosen(reading, labels, batch.states, rules)
            if config.kind == "sequence":
                return jnp.where(batch.free, -found.logprob, 0.0), {"entropy": found.entropy}
            reference = needed(batch.reference, "reference")
            losses = sampled_losses(found.logprob, reference, batch.sampler, batch.free, config.truncation)
            return kept(losses, found.entropy, reference, batch.free)
        if config.kind == "top_k":
            top = TopK(needed(batch.top_ids, "top_ids"), needed(batch.top_logprobs, "top_logprobs"))
            seen = top_k_kl(reading, labels, batch.states, top, rules)
        else:
            assert teacher is not None, "refused above"
            seen = compared(reading, teacher.read(params, batch), labels, batch.states, rules)
        return kept(seen.kl, seen.entropy, seen.reference, batch.free)

    def kept(losses: Array, entropy: Array, reference: Array, free: Array) -> Terms:
        counted = trusted(reference, free, config.trust)
        return jnp.where(counted, losses, 0.0), {"entropy": entropy, "trusted": counted.astype(jnp.float32)}

    def losses(params: Params, batch: PolicyBatch, key: Array) -> Array:
        return terms(params, batch, key)[0]

    return Objective(weights, losses, terms)
