"""Objectives: what a stage asks the loop to make small. Loop, step and plan know nothing else of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from iv3jax.models.batch import Batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.train.loss import Reduction, cross_entropy, token_weights
from iv3jax.typing import Array, Params

Terms = tuple[Array, Mapping[str, Array]]
"""(B, T) fp32 losses, and other terms of each token by name, (B, T) fp32 each."""


@dataclass(frozen=True)
class Objective:
    """Σ weights · losses / Σ weights over all rows of a step, on every device and in every accumulated part.

    Attributes:
        weights: batch → (B, T) fp32, known without the parameters. A batch is a Batch, or a PolicyBatch in
            the stages that learn from rollouts.
        losses: (parameters, batch, key) → (B, T) fp32.
        terms: the same with other terms beside the losses, whose means, weighted alike, are logged; None
            where there are no others.
    """

    weights: Callable[[Any], Array]
    losses: Callable[[Params, Any, Array], Array]
    terms: Callable[[Params, Any, Array], Terms] | None = None

    def all_terms(self, params: Params, batch: Any, key: Array) -> Terms:
        """`terms`, or `losses` and no others."""
        if self.terms is not None:
            return self.terms(params, batch, key)
        return self.losses(params, batch, key), {}


def supervised(model: InternVideo3, reduction: str = "token") -> Objective:
    """Cross-entropy of the labelled tokens (SPEC §5), for continued pretraining and fine-tuning.

    Args:
        reduction: "token", "sample" or "square".
    """

    def weights(batch: Batch) -> Array:
        if batch.labels is None:
            raise ValueError("a batch without labels has no loss")
        return token_weights(batch.labels, batch.segment_ids, cast(Reduction, reduction))

    def losses(params: Params, batch: Batch, _: Array) -> Array:
        hidden = model.apply({"params": params}, batch).hidden
        assert batch.labels is not None, "weights() has refused it"
        return cross_entropy(model, params, hidden, batch.labels)

    return Objective(weights, losses)
