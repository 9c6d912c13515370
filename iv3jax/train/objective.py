"""Objectives: what a stage asks the loop to make small. Loop, step and plan know nothing else of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from iv3jax.models.batch import Batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.train.loss import Reduction, cross_entropy, token_weights
from iv3jax.typing import Array, Params


@dataclass(frozen=True)
class Objective:
    """Σ weights · losses / Σ weights over all rows of a step, on every device and in every accumulated part.

    Attributes:
        weights: batch → (B, T) fp32, known without the parameters.
        losses: (parameters, batch, key) → (B, T) fp32.
    """

    weights: Callable[[Batch], Array]
    losses: Callable[[Params, Batch, Array], Array]


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
