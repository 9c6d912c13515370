"""The policy as the trainer sees it: log-probabilities of sampled tokens, by the rules they were sampled by.

Grammar mask, temperature, top-k and top-p are applied again as in sampling, without which every ratio of
probabilities is biased (SPEC §6). What is made small of them is in rl.py and distill.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iv3jax.errors import UserError
from iv3jax.generate.sampling import Sampling, filtered
from iv3jax.mcr.grammar import Grammar, mask
from iv3jax.models.batch import IGNORE_LABEL, Batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.parts import mapped
from iv3jax.sharding import MESH_AXES, with_weights
from iv3jax.train.loss import LOGIT_CHUNK, logit_inputs
from iv3jax.typing import Array, Params


@dataclass(frozen=True, eq=False)
class Rules:
    """How tokens are chosen: what the grammar allows, and by which part of the distribution.

    Raises:
        UserError: a temperature of 0, by which nothing is chosen at random and nothing can be learned.
    """

    grammar: Grammar
    sampling: Sampling

    def __post_init__(self) -> None:
        if self.sampling.temperature == 0:
            raise UserError("temperature is 0 (greedy); sample with 1 to learn from what is sampled")

    @property
    def unfiltered(self) -> "Rules":
        """The same without top-p and top-k."""
        return Rules(self.grammar, Sampling(self.sampling.temperature))


class Chosen(NamedTuple):
    """Of each label, (B, T) fp32, 0 where there is none.

    Attributes:
        logprob: its log-probability.
        entropy: of the distribution it was chosen from, in nats; it has no gradient.
    """

    logprob: Array
    entropy: Array


def token_logprobs(
    model: InternVideo3,
    params: Params,
    batch: Batch,
    targets: Array,
    states: Array,
    rules: Rules,
    chunk: int = LOGIT_CHUNK,
) -> Chosen:
    """Log-probabilities of the targets under the rules they were sampled by.

    Args:
        batch: what the model reads. targets: (B, T) int32, the next token, or IGNORE_LABEL.
        states: (B, T) int32, the grammar's state before the target.
        chunk: tokens of each row whose logits exist at one time; a chunk without targets costs nothing.
    """
    return chosen(read(model, params, batch), targets, states, rules, chunk)


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model made of a batch, before there are logits.

    Attributes:
        head: the parameters that logits are made of. hidden: (B, T, D).
    """

    model: InternVideo3
    head: Params
    hidden: Array


def read(model: InternVideo3, params: Params, batch: Batch) -> Reading:
    """One pass over a batch."""
    return Reading(model, *logit_inputs(model, params, model.apply({"params": params}, batch).hidden))


def chosen(reading: Reading, targets: Array, states: Array, rules: Rules, chunk: int = LOGIT_CHUNK) -> Chosen:
    """`token_logprobs` of what has been read."""

    def one(weights: Params, free: Array, hidden: Array, targets: Array, states: Array) -> Chosen:
        logits = reading.model.apply({"params": weights["head"]}, hidden, method="logits")
        allowed = mask(weights["grammar"], states) | ~free[..., None]
        return chosen_of(logits, allowed, targets, rules.sampling)

    weights = {"head": reading.head, "grammar": rules.grammar}
    given = (reading.hidden, jnp.maximum(targets, 0), states)
    return Chosen(*over_tokens(one, (0, 0), chunk, weights, targets != IGNORE_LABEL, *given))


def chosen_of(logits: Array, allowed: Array, targets: Array, sampling: Sampling) -> Chosen:
    """Of (…, V) fp32 logits, of which some are `allowed` (…, V) bool, and (…) targets among them.

    A target stays whatever its probability: rounding may move it across the edge of the top-p.
    """
    scaled = logits / sampling.temperature
    # By the logits as they are: what is kept has no gradient, and no backward pass through a sort.
    known = jax.lax.stop_gradient(jnp.where(allowed, logits, -jnp.inf))
    kept = filtered(known, sampling) > -jnp.inf
    kept |= allowed & (targets[..., None] == jnp.arange(logits.shape[-1]))
    left = jnp.where(kept, scaled, -jnp.inf)
    total = jax.nn.logsumexp(left, axis=-1)
    logprob = jnp.take_along_axis(left, targets[..., None], axis=-1)[..., 0] - total
    every = jnp.where(kept, scaled - total[..., None], 0.0)
    entropy = -jnp.sum(jnp.where(kept, jnp.exp(every) * every, 0.0), axis=-1)
    return Chosen(logprob, jax.lax.stop_gradient(entropy))


def over_tokens(
    one: Callable[..., tuple[Array, ...]],
    axes: tuple[int, ...],
    chunk: int,
    weights: Params,
    free: Array,
    *tokens: Array,
) -> tuple[Array, ...]:
    """Something of each free token that takes its logits, of `chunk` tokens of each row at a time.

    Nothing of a chunk is kept for the backward pass, and one without free tokens is not computed.

    Args:
        one: (weights, free, *tokens), (B, chunk, …) each → two or more results (B, chunk, …). It must not
            close over arrays.
        axes: how many axes each result has behind those of the tokens.
        weights: a pytree of arrays, whole on every device but for what the tensor axis splits.
        free: (B, T) bool. tokens: (B, T, …) each.

    Returns:
        (B, T, …) each, 0 where not free.
    """
    # Tensor-parallel heads keep their part of the vocabulary.
    over = tuple(axis for axis in MESH_AXES if axis != "tensor")
    places = ("batch", "sequence")
    inputs = [(*places, *(None,) * (x.ndim - 2)) for x in (free, *tokens)]
    outputs = [(*places, *(None,) * more) for more in axes]
    function = partial(_of_a_device, one, chunk)
    out: tuple[Array, ...] = with_weights(function, weights, inputs, outputs, free, *tokens, over=over)
    return out


def _of_a_device(
    one: Callable[..., tuple[Array, ...]], chunk: int, weights: Params, *tokens: Array
) -> tuple[Array, ...]:
    """One device's tokens, free first."""
    rows, length = tokens[0].shape
    chunk = min(chunk, length)

    def parts(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -length % chunk), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def some(weights: Params, tokens: tuple[Array, ...]) -> tuple[Array, ...]:
        def masked(x: Array) -> Array:
            return jnp.where(tokens[0].reshape(rows, chunk, *(1,) * (x.ndim - 2)), x, 0)

        return tuple(masked(x) for x in one(weights, *tokens))

    def none(weights: Params, tokens: tuple[Array, ...]) -> tuple[Array, ...]:
        shapes = jax.eval_shape(some, weights, tokens)
        return tuple(jnp.zeros(x.shape, x.dtype) for x in shapes)

    def part(weights: Params, tokens: tuple[Array, ...]) -> tuple[Array, ...]:
        out: tuple[Array, ...] = jax.lax.cond(jnp.any(tokens[0]), some, none, weights, tokens)
        return out

    found = mapped(part, weights, tuple(parts(x) for x in tokens))
    return tuple(x.swapaxes(0, 1).reshape(rows, -1, *x.shape[3:])[:, :length] for x in found)


def importance(new: Array, old: Array, free: Array, most: float) -> Array:
    """(B, T) fp32 min(new / old probability, most), without gradient, 1 where not free.

    Args:
        new, old: log-probabilities (B, T) of the labels.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.where(free, new - old, 0.0)), most))
