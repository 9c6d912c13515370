"""A conversion under way: what it is, where its steps lie, and the source's own pass over the tokens.

Every step is a folder of `work.Work`, so that a run that was stopped goes on after its last finished step:

    source_i    the calibration tokens' hidden states before the source's layer i
    split_i     which part of layer i's keys keeps RoPE, and what the calibration tokens say of it (split.py)
    metric_i    what an error of layer i's content and values costs, from the last layer to the first
                (metric.py)
    layer_i     layer i converted: tensors, the tokens' hidden states after it, its line of the report
                (latent.py)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.conversion import measure, passes
from iv3jax.conversion.calibration import Calibration
from iv3jax.conversion.config import ConvertConfig, Plan
from iv3jax.conversion.methods import Method, method
from iv3jax.conversion.source import Source
from iv3jax.conversion.stream import Stream, embedded, stored
from iv3jax.conversion.work import Work, save_arrays
from iv3jax.models.config import TextConfig

Array = np.ndarray
Say = Callable[[str, int, str], None]
"""Tells of progress: the stage, the layer that is done, and a note."""


@dataclass(frozen=True)
class Conversion:
    """One conversion under way: what it is, and where its steps lie."""

    source: Source
    config: ConvertConfig
    plan: Plan
    stream: Stream
    held_out: tuple[int, ...]
    work: Work

    @property
    def text(self) -> TextConfig:
        """The source's decoder."""
        return self.plan.text

    @property
    def method(self) -> Method:
        """How each step is done."""
        return method(self.config.method)

    @property
    def fitted(self) -> tuple[int, ...]:
        """The batches that fits see."""
        return tuple(i for i in range(len(self.stream.batches)) if i not in self.held_out)

    def params(self, layer: int) -> Any:
        """A source layer's parameters in fp32, on the devices."""
        return jax.tree.map(jnp.asarray, self.source.layer(layer, np.dtype(np.float32)))

    def hidden(self, step: str) -> Callable[[int], jax.Array]:
        """The hidden states that a step holds, by batch."""
        return partial(stored, self.work.arrays(step))

    def forget(self, step: str, prefix: str) -> None:
        """Frees the disk of a finished step's arrays that nothing needs any more."""
        for path in self.work.path(step).glob(f"{prefix}_*.npy"):
            path.unlink()


def begin(source: Source, calibration: Calibration, work: Work) -> Stream:
    """The tokens before the first layer, from the work folder if they are there."""
    if not work.done("source_0"):
        with work.step("source_0") as folder:
            for b, (hidden, levels) in enumerate(embedded(source, calibration.batches)):
                save_arrays(folder, {f"hidden_{b}": np.asarray(hidden, np.float32)})
                if levels is not None:
                    save_arrays(folder, {f"deepstack_{b}": levels})
    arrays = work.arrays("source_0")
    deepstack = tuple(arrays.get(f"deepstack_{b}") for b in range(len(calibration.batches)))
    return Stream(source.config, calibration.batches, deepstack)


def run_source(run: Conversion, say: Say) -> None:
    """The calibration tokens through the source, kept before each layer and after the last."""
    layers = run.text.num_hidden_layers
    for i in range(1, layers + 1):
        if run.work.done(f"source_{i}"):
            continue
        params, before = run.params(i - 1), run.hidden(f"source_{i - 1}")
        with run.work.step(f"source_{i}") as folder:
            for b in range(len(run.stream.batches)):
                after = passes.source_layer(run.text, params, before(b), jnp.int32(i - 1), run.stream.rows(b))
                save_arrays(folder, {f"hidden_{b}": np.asarray(after)})
        say("source", i - 1, "")


def moments(run: Conversion, params: Any, targets: Any, hidden: Any) -> measure.Moments:
    """Of the batches that fits see.

    Args:
        params: the source layer's.
        targets, hidden: batch → hidden states from which what is wanted and what there is come
            (`measure.sums`).
    """

    def found() -> Iterator[tuple[measure.Moments, float]]:
        for b in run.fitted:
            modality = run.stream.modality(b)
            batch = measure.sums(run.text, run.plan.cached, params, targets(b), hidden(b), modality)
            yield batch, float(jnp.sum(modality >= 0))

    return measure.mean(found())
