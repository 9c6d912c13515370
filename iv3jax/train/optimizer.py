"""The optimisers: Muon for the matrices with Adam for everything else, or AdamW for all; and their schedules.

What is frozen is not here: an optimiser is made for the parameters it trains (trainable.py).
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from optax import contrib

from iv3jax.errors import UserError
from iv3jax.models.attention import MATRICES
from iv3jax.typing import Params


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients.

    Attributes:
        kind: "muon": Muon for kernels, Adam for embeddings, norms, biases, the head and low-rank additions;
            "adamw": AdamW for all.
        learning_rate: the highest. adam_learning_rate: that of Adam beside Muon.
        final_learning_rate: at the end of the run; Adam's beside Muon is as much lower.
        schedule: after the warm-up, "constant_linear" stays and then falls in a straight line, "cosine" falls
            in half a wave.
        warmup, decay: shares of the steps, of the straight rise from 0 and of the straight fall.
        weight_decay: AdamW's, times the learning rate; as in transformers' trainer, not of norms and biases.
        b1, b2, eps: AdamW's. Adam beside Muon has optax's, 0.9, 0.999 and 1e-8.
        clip: largest global norm of the gradient; 0: any.
        moment_dtype: of the first moment, "float32" or "bfloat16". The second has the parameter's own: in
            bf16 it would stand still wherever a step changes it by less than 1/256.
    """

    kind: str = "muon"
    learning_rate: float = 0.01
    adam_learning_rate: float = 0.003
    final_learning_rate: float = 0.0
    schedule: str = "constant_linear"
    warmup: float = 0.02
    decay: float = 0.7
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    moment_dtype: str = "float32"

    def __post_init__(self) -> None:
        choices = {
            "kind": ("muon", "adamw"),
            "schedule": ("constant_linear", "cosine"),
            "moment_dtype": ("float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"optimizer.{name} {value!r} is not one of {', '.join(allowed)}")
        falling = self.decay if self.schedule == "constant_linear" else 0.0
        if self.warmup < 0 or falling < 0 or self.warmup + falling > 1:
            raise UserError(f"optimizer.warmup {self.warmup} and decay {falling} are no shares of the steps")
        if self.kind == "muon" and self.weight_decay:
            raise UserError(
                "optimizer.weight_decay is AdamW's; set optimizer.kind to adamw, or weight_decay to 0"
            )


def learning_rate(config: OptimizerConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Steps done → learning rate, for a run of `steps`.

    Args:
        peak: the highest, if not `config.learning_rate`; the final one is then scaled likewise.
    """
    peak = config.learning_rate if peak is None else peak
    final = peak * (config.final_learning_rate / config.learning_rate if config.learning_rate else 0.0)
    warm = round(steps * config.warmup)
    if config.schedule == "cosine":
        falling = optax.cosine_decay_schedule(peak, max(1, steps - warm), final / peak if peak else 0.0)
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), falling], [warm])
    down = round(steps * config.decay)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warm),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, final, down),
        ],
        [warm, steps - down],
    )


def make_optimizer(config: OptimizerConfig, steps: int, boxed: Params) -> optax.GradientTransformation:
    """The transformation for a run of `steps`.

    Args:
        boxed: the parameters to train and no others, with their logical axes (`boxed_params`, `split`).
    """
    moments = jnp.dtype(config.moment_dtype)
    if config.kind == "adamw":
        rule = optax.adamw(
            learning_rate(config, steps),
            config.b1,
            config.b2,
            config.eps,
            mu_dtype=moments,
            weight_decay=config.weight_decay,
            mask=_mapped(lambda path, _: path[-1].key not in ("scale", "bias"), boxed),
        )
    else:
        rule = contrib.muon(
            learning_rate(config, steps),
            adam_learning_rate=learning_rate(config, steps, config.adam_learning_rate),
            muon_weight_dimension_numbers=_mapped(_matrix, boxed),
            mu_dtype=moments,
            consistent_rms=None,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(), rule)


def _matrix(path: tuple, box: nn.LogicallyPartitioned) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are a matrix's inputs and outputs; None for what is Adam's."""
    keys = {p.key for p in path}
    if path[-1].key != "kernel" or "lm_head" in keys:
        return None
    if MATRICES & keys:
        return contrib.MuonDimensionNumbers(len(box.names) - 1, len(box.names) - 2)
    first = int(box.names[0] == "layers")
    # Inputs come last; only those of an output projection are two axes, heads and their dims.
    inputs = len(box.names) - (2 if box.names[-1] == "head_dim" else 1)
    return contrib.MuonDimensionNumbers(tuple(range(inputs, len(box.names))), tuple(range(first, inputs)))


def _mapped(function: Any, boxed: Params) -> Any:
    """function(path, box) of every parameter."""
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(function, boxed, is_leaf=is_box)
