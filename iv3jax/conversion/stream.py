"""The calibration tokens on their way through the layers (JAX): embedded, passed on, and led back.

Hidden states live on the disk between layers (work.py); here they are batches on whatever devices there are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from iv3jax.conversion.passes import Rows
from iv3jax.conversion.source import Source
from iv3jax.models.batch import Batch
from iv3jax.models.config import ModelConfig
from iv3jax.models.decoder import gather_visual
from iv3jax.models.layers import Execution, RMSNorm
from iv3jax.models.rope import decoder_rope
from iv3jax.models.vision import VisionTower, VisualFeatures
from iv3jax.sharding import make_mesh
from iv3jax.typing import Array, Params

HEAD_TOKENS = 1024
"""Tokens whose logits exist at one time."""


@dataclass(frozen=True)
class Stream:
    """Where the calibration tokens stand, batch by batch; hidden states are given and taken as NumPy.

    Attributes:
        config: the source's.
        batches: as `calibration.Calibration` has them.
        deepstack: (levels, B, N, D) of each batch, or None for one without vision.
    """

    config: ModelConfig
    batches: tuple[Batch, ...]
    deepstack: tuple[np.ndarray | None, ...]

    def rows(self, index: int) -> Rows:
        """Everything but the hidden states of one batch, on the devices."""
        batch, text = self.batches[index], self.config.text_config
        rope = decoder_rope(jnp.asarray(batch.positions), text.head_dim, text.rope_theta, text.mrope_section)
        deepstack = self.deepstack[index]
        seen = deepstack is not None and batch.visual_index is not None
        return Rows(
            spread(rope),
            spread(batch.segment_ids),
            spread(batch.visual_index) if seen else None,
            jnp.asarray(deepstack, jnp.float32) if seen else None,
        )

    def modality(self, index: int) -> Array:
        """(B, T) of one batch: 0 text, 1 vision, −1 padding."""
        batch = self.batches[index]
        vision = 0 if batch.visual_index is None else (batch.visual_index >= 0).astype(np.int32)
        return spread(np.where(batch.segment_ids != 0, vision, -1).astype(np.int32))

    @property
    def tokens(self) -> int:
        """How many there are, without padding."""
        return sum(int(np.sum(batch.segment_ids != 0)) for batch in self.batches)


def spread(x: Any) -> Any:
    """A tree of arrays (rows, …) with their rows over all devices, where they divide."""
    devices = jax.devices()
    mesh = make_mesh(devices, data=len(devices), fsdp=1)

    def place(x: Array) -> Array:
        split = len(x) % len(devices) == 0
        spec = PartitionSpec("data") if split else PartitionSpec()
        return jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec))

    return jax.tree.map(place, x)


def embedded(source: Source, batches: Sequence[Batch]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Hidden states (B, T, D) before the first layer, and DeepStack's levels, of each batch."""
    table = source.embedding(np.dtype(np.float32))
    tower, vision = source.tower(np.dtype(np.float32)), source.config.vision_config
    run = Execution()
    for batch in batches:
        hidden = table[np.asarray(batch.input_ids)]
        if batch.patches is None or tower is None or vision is None:
            yield hidden, None
            continue
        apply = jax.jit(partial(VisionTower(vision, run).apply, {"params": tower}))
        visual: VisualFeatures = apply(batch.patches, batch.patch_coords, batch.patch_segment_ids)
        seen = np.asarray(gather_visual(visual.tokens, jnp.asarray(batch.visual_index)))
        hidden = np.where(np.asarray(batch.visual_index)[..., None] >= 0, seen, hidden)
        deepstack = np.asarray(visual.deepstack)
        yield hidden, deepstack if len(deepstack) else None


@dataclass(frozen=True)
class Head:
    """What follows the last layer.

    Attributes:
        norm: the final norm's parameters. table: (V, D). epsilon: of the norm.
    """

    norm: Params
    table: Array
    epsilon: float

    @staticmethod
    def of(source: Source) -> "Head":
        """The source's, which a conversion keeps."""
        f32 = np.dtype(np.float32)
        epsilon = source.config.text_config.rms_norm_eps
        return Head(source.final_norm(f32), jnp.asarray(source.head(f32)), epsilon)

    def log_loss(self, hidden: Array, batch: Batch) -> tuple[float, int]:
        """The sum of −log p of each text token that follows another of its sample, and their number."""
        labels, counted = next_tokens(batch)
        total = 0.0
        for rows in _pieces(hidden.shape):
            total += float(
                _log_loss(self.norm, self.table, self.epsilon, hidden[rows], labels[rows], counted[rows])
            )
        return total, int(counted.sum())

    def gradient(self, hidden: Array, batch: Batch, rng: Array) -> np.ndarray:
        """Of the same loss by the hidden states, with labels that the model itself draws (Fisher)."""
        _, counted = next_tokens(batch)
        found = [
            np.asarray(
                _drawn_gradient(
                    self.norm,
                    self.table,
                    self.epsilon,
                    hidden[rows],
                    counted[rows],
                    jax.random.fold_in(rng, i),
                )
            )
            for i, rows in enumerate(_pieces(hidden.shape))
        ]
        return np.concatenate(found)


def next_tokens(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) the token after each, and whether it is text of the same sample."""
    ids, segments = np.asarray(batch.input_ids), np.asarray(batch.segment_ids)
    labels = np.roll(ids, -1, axis=1)
    same = (segments == np.roll(segments, -1, axis=1)) & (segments != 0)
    if batch.visual_index is not None:
        same &= np.roll(np.asarray(batch.visual_index), -1, axis=1) < 0
    same[:, -1] = False
    return labels, same


def _pieces(shape: tuple[int, ...]) -> Iterable[slice]:
    step = max(1, HEAD_TOKENS // shape[1])
    return [slice(i, i + step) for i in range(0, shape[0], step)]


def _log_probabilities(norm: Params, table: Array, epsilon: float, hidden: Array) -> Array:
    x = RMSNorm(hidden.shape[-1], epsilon).apply({"params": norm}, hidden)
    return jax.nn.log_softmax(x @ table.T, axis=-1)


@partial(jax.jit, static_argnums=2)
def _log_loss(
    norm: Params, table: Array, epsilon: float, hidden: Array, labels: Array, counted: Array
) -> Array:
    found = jnp.take_along_axis(_log_probabilities(norm, table, epsilon, hidden), labels[..., None], axis=-1)
    return -jnp.sum(jnp.where(counted, found[..., 0], 0))


@partial(jax.jit, static_argnums=2)
def _drawn_gradient(
    norm: Params, table: Array, epsilon: float, hidden: Array, counted: Array, rng: Array
) -> Array:
    def loss(hidden: Array) -> Array:
        scores = _log_probabilities(norm, table, epsilon, hidden)
        drawn = jax.random.categorical(rng, jax.lax.stop_gradient(scores))
        found = jnp.take_along_axis(scores, drawn[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(counted, found, 0))

    return jax.grad(loss)(hidden)


def stored(hidden: Mapping[str, np.ndarray], index: int) -> Array:
    """A batch's hidden states from the arrays of a step, fp32 on the devices."""
    return spread(np.asarray(hidden[f"hidden_{index}"], np.float32))
