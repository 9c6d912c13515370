"""The optimiser: Muon for the matrices, Adam for everything else."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import optax
from optax import contrib

from iv3jax.typing import Params


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon with a constant learning rate, then a linear decay to zero.

    Attributes:
        learning_rate: of Muon, for the kernels.
        adam_learning_rate: of Adam, for embeddings, norms and biases.
        warmup, decay: shares of the steps at the start and at the end.
        clip: largest global norm of the gradient.
    """

    learning_rate: float = 0.01
    adam_learning_rate: float = 0.003
    warmup: float = 0.02
    decay: float = 0.7
    clip: float = 1.0


def make_optimizer(config: OptimizerConfig, steps: int, boxed: Params) -> optax.GradientTransformation:
    """The transformation for a run of `steps` over parameters with these logical axes (`boxed_params`)."""

    def schedule(peak: float) -> optax.Schedule:
        warm, down = (round(steps * share) for share in (config.warmup, config.decay))
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, warm),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, 0.0, down),
            ],
            [warm, steps - down],
        )

    def dimensions(path: tuple, box: nn.LogicallyPartitioned) -> contrib.MuonDimensionNumbers | None:
        if path[-1].key != "kernel" or "lm_head" in (p.key for p in path):
            return None
        if {"q_expand", "kv_adapters"} & {p.key for p in path}:
            # A matrix for each head or modality.
            return contrib.MuonDimensionNumbers(len(box.names) - 1, len(box.names) - 2)
        first = int(box.names[0] == "layers")
        # Inputs come last; only those of an output projection are two axes, heads and their dims.
        inputs = len(box.names) - (2 if box.names[-1] == "head_dim" else 1)
        return contrib.MuonDimensionNumbers(tuple(range(inputs, len(box.names))), tuple(range(first, inputs)))

    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    numbers: Any = jax.tree_util.tree_map_with_path(dimensions, boxed, is_leaf=is_box)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        contrib.muon(
            schedule(config.learning_rate),
            adam_learning_rate=schedule(config.adam_learning_rate),
            muon_weight_dimension_numbers=numbers,
            consistent_rms=None,
        ),
    )
