"""`iv3 bench train`: training steps of `tiny` on the digit videos, beside the same model in PyTorch.

One process, fp32, AdamW, as many threads each as the machine has cores. Both take the same samples in each
step and start from the same weights, so that their first losses agree. Ours packs samples into rows, as
training does; PyTorch has one sample a row, padded to the longest, as transformers' collators do. They take
turns; the figures are medians over the rounds. Ours draws its batches from a feed as training does, and
waiting for it counts; PyTorch is handed tensors that are ready.
"""

import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from iv3jax.bench.table import as_text
from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.verify import require_torch, torch_model
from iv3jax.data.collate import collate
from iv3jax.data.packing import pack_rows
from iv3jax.data.sample import Sample
from iv3jax.models.batch import Batch
from iv3jax.models.internvideo3 import boxed_params
from iv3jax.models.layers import Execution
from iv3jax.sharding import make_mesh, param_shardings
from iv3jax.train.config import DigitsConfig
from iv3jax.train.digits import samples
from iv3jax.train.feeds import StepFeed, place_batch
from iv3jax.train.objective import supervised
from iv3jax.train.optimizer import OptimizerConfig, make_optimizer
from iv3jax.train.state import new_state
from iv3jax.train.step import make_step

ROWS, LENGTH, CHUNKS = 8, 240, 20
ROUNDS, STEPS = 11, 6
RATE, DECAY, EPSILON, BETAS = 1e-3, 0.05, 1e-8, (0.9, 0.95)


@dataclass(frozen=True)
class Row:
    """One library's figures: tokens (without padding) a second, milliseconds of a step, padding's share."""

    name: str
    tokens_per_second: float
    step_ms: float
    padding: float
    first_loss: float


def bench_train(rounds: int = ROUNDS, steps: int = STEPS) -> dict[str, Any]:
    """Trains both for rounds · steps steps, after one that is not counted.

    Raises:
        UserError: torch or transformers is missing.
    """
    require_torch("tiny")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        export("tiny", place, random_weights=True)
        run = Execution(scan_layers=False)
        ours, theirs = _Ours(load(place, dtype=np.float32, run=run)), _Torch(place)
        times: dict[str, list[float]] = {"iv3jax": [], "PyTorch": []}
        counts: dict[str, list[int]] = {"iv3jax": [], "PyTorch": []}
        alone = [ours.alone(step) for step in range(rounds * steps + 1)]
        ready = [theirs.tensors(batch) for batch in alone]
        first = (ours.step(), theirs.step(*ready[0]))
        ours.waited = 0.0
        for number in range(rounds):
            mine = range(1 + number * steps, 1 + (number + 1) * steps)
            # Whoever goes first in one round goes second in the next.
            turns = [("iv3jax", lambda _: ours.step()), ("PyTorch", lambda i: theirs.step(*ready[i]))]
            for name, step in turns if number % 2 else reversed(turns):
                start = time.perf_counter()
                for i in mine:
                    step(i)
                times[name].append((time.perf_counter() - start) / steps)
                counts[name].append(sum(int((alone[i].segment_ids != 0).sum()) for i in mine))
        ours.close()
    rows = []
    room = {"iv3jax": len(alone) * ROWS * LENGTH, "PyTorch": sum(batch.segment_ids.size for batch in alone)}
    real = sum(int((batch.segment_ids != 0).sum()) for batch in alone)
    for (name, seconds), loss in zip(times.items(), first, strict=True):
        speed = statistics.median(n / (s * steps) for n, s in zip(counts[name], seconds, strict=True))
        rows.append(Row(name, speed, 1e3 * statistics.median(seconds), 1 - real / room[name], loss))
    return {
        "threads": os.cpu_count(),
        "rounds": rounds,
        "steps": steps,
        "ratio": rows[0].tokens_per_second / rows[1].tokens_per_second,
        "wait_share": ours.waited / (sum(times["iv3jax"]) * steps),
        "rows": [asdict(row) for row in rows],
    }


class _Ours:
    """The step that `iv3 train` compiles, and its feed."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded, self._mesh = loaded, make_mesh(jax.devices()[:1])
        config = OptimizerConfig(
            kind="adamw", learning_rate=RATE, warmup=0.0, decay=0.0, weight_decay=DECAY, eps=EPSILON
        )
        boxed = boxed_params(loaded.model)
        optimizer = make_optimizer(config, 1000, boxed)
        places = param_shardings(boxed, self._mesh)
        self._step = jax.jit(make_step(optimizer, supervised(loaded.model), 1, places), donate_argnums=0)
        params = jax.device_put(loaded.params, places, may_alias=False)
        self._state = new_state(params, optimizer, 0, self._mesh)
        self._feed = StepFeed(self._batch_at)
        self.waited = 0.0

    def _rows(self, step: int) -> list[list[Sample]]:
        stream = samples(np.random.default_rng([1, step]), self._loaded.processor, DigitsConfig(), 1.0)
        return pack_rows(stream, ROWS, LENGTH, CHUNKS)

    def _batch_at(self, step: int) -> Batch:
        return self._collated(self._rows(step), LENGTH)

    def alone(self, step: int) -> Batch:
        """A step's samples with a row for each, padded to the longest."""
        rows = [[sample] for row in self._rows(step) for sample in row]
        return self._collated(rows, max(len(sample) for (sample,) in rows))

    def _collated(self, rows: list[list[Sample]], length: int) -> Batch:
        return collate(rows, self._loaded.config, length=length, chunks=CHUNKS, chunk_patches=4)

    def step(self) -> float:
        """One step with the feed's next batch → its loss."""
        fed = next(self._feed)
        self.waited += fed.waited
        with jax.set_mesh(self._mesh):
            self._state, metrics = self._step(self._state, {}, place_batch(fed.batch, self._mesh))
        return float(metrics.loss)

    def close(self) -> None:
        """Ends the feed."""
        self._feed.close()


class _Torch:
    """The exported folder's own code in training mode, with torch's AdamW and the same two groups."""

    def __init__(self, folder: Path) -> None:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        self._config = load(folder).config
        self._model = torch_model(folder, self._config).train()
        decayed = [p for p in self._model.parameters() if p.ndim > 1]
        others = [p for p in self._model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON)

    def tensors(self, batch: Batch) -> tuple[dict[str, Any], Any]:
        """A batch of ours as the arguments of the model, and its labels."""
        import torch

        assert batch.patches is not None and batch.patch_segment_ids is not None
        assert batch.visual_index is not None
        rows = len(batch.input_ids)
        real = batch.patch_segment_ids.reshape(rows, -1) != 0
        pixels = batch.patches.reshape(rows, real.shape[1], -1)[real].astype(np.float32) / 127.5 - 1
        per_video = real.sum(axis=1) // 4
        kinds = np.where(batch.visual_index >= 0, 2, 0)
        return {
            "input_ids": torch.tensor(batch.input_ids, dtype=torch.long),
            "attention_mask": torch.tensor(batch.segment_ids != 0, dtype=torch.long),
            "position_ids": torch.tensor(batch.positions, dtype=torch.long),
            "pixel_values_videos": torch.tensor(pixels),
            "video_grid_thw": torch.tensor([[int(t), 2, 2] for t in per_video]),
            "mm_token_type_ids": torch.tensor(kinds, dtype=torch.int),
        }, torch.tensor(batch.labels, dtype=torch.long)

    def step(self, inputs: dict[str, Any], labels: Any) -> float:
        """One step → its loss."""
        import torch

        logits = self._model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return float(loss.detach())


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people."""
    table = Table(
        title=f"training `tiny`, {ROWS} packed rows of {LENGTH} tokens a step, fp32, "
        f"{result['threads']} threads",
        caption=f"medians of {result['rounds']} rounds of {result['steps']} steps; {result['ratio']:.2f}× "
        f"PyTorch; waiting for data {result['wait_share']:.1%} of our time",
    )
    table.add_column("")
    for head in ("tokens/s", "ms a step", "padding", "first loss"):
        table.add_column(head, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_ms']:.1f}",
            f"{row['padding']:.0%}",
            f"{row['first_loss']:.5f}",
        )
    return as_text(table, 110)
