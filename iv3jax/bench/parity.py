"""`iv3 parity`: this code against golden outputs of the authors' own, one row per compared quantity.

The form of the cases is that of the golden folder's README: safetensors with inputs and expected outputs.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.data.collate import collate
from iv3jax.data.positions import mrope_positions
from iv3jax.data.sample import Sample
from iv3jax.data.sampling import sample_indices, temporal_patch_times, timestamp_text
from iv3jax.data.sizes import image_size, video_size
from iv3jax.errors import UserError
from iv3jax.models.batch import IGNORE_LABEL, Batch
from iv3jax.models.config import ModelConfig
from iv3jax.models.layers import Execution
from iv3jax.train.loss import cross_entropy, reduced, token_weights
from iv3jax.typing import Array, Params

KINDS = ("image", "video")


@dataclass(frozen=True)
class Row:
    """One compared quantity: where from, what, and how far apart."""

    case: str
    quantity: str
    difference: float
    shape: tuple[int, ...]


def model_parity(folder: str | Path, cases: list[str | Path], implementation: str | None = None) -> list[Row]:
    """Compares a model folder with golden cases, in fp32, through the named kernels (Execution).

    Raises:
        UserError: a case that cannot be read or lacks an input.
    """
    loaded = load(folder, dtype=jnp.float32, run=Execution(implementation=implementation))
    rows: list[Row] = []
    with jax.default_matmul_precision("highest"):
        for case in cases:
            values = _read_case(case)
            computed = _computed(loaded, values, str(case))
            wanted = [name for name in computed if name in values]
            if not wanted:
                raise UserError(f"{case}: holds no expected output; known are {', '.join(computed)}")
            for name in wanted:
                rows.append(_row(str(case), name, computed[name], values[name]))
    return rows


def _row(case: str, name: str, got: np.ndarray, expected: np.ndarray) -> Row:
    if got.shape != expected.shape:
        raise UserError(f"{case}: {name} has shape {expected.shape}, but this model gives {got.shape}")
    difference = np.max(np.abs(got - expected.astype(np.float64)), initial=0.0)
    return Row(case, name, float(difference), expected.shape)


def _read_case(path: str | Path) -> dict[str, np.ndarray]:
    try:
        values = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None
    for name in ("input_ids", "position_ids"):
        if name not in values:
            raise UserError(f"{path}: lacks the input {name}")
    return values


def case_samples(values: dict[str, np.ndarray], config: ModelConfig) -> list[Sample]:
    """The samples of a golden case: its pack, cut at `cu_seqlens`, with their own patches.

    Visual features go, in order of appearance, to the positions of the image and video tokens.
    """
    length = values["input_ids"].shape[1]
    bounds = values.get("cu_seqlens", np.array([0, length]))
    labels = values.get("labels_shifted", np.full((1, length), IGNORE_LABEL))
    tokens = {"image": config.image_token_id, "video": config.video_token_id}
    grids = {
        kind: [(int(t), int(h), int(w)) for t, h, w in values.get(f"grid_thw_{kind}", ())] for kind in KINDS
    }
    used = {kind: 0 for kind in KINDS}
    merge = _merge(config) ** 2
    samples = []
    for start, stop in pairwise(bounds):
        at = slice(int(start), int(stop))
        ids = values["input_ids"][0, at]
        mine: list[tuple[int, int, int]] = []
        patches = [np.zeros((0, config.vision_config.patch_dim if config.vision_config else 0), np.float32)]
        left = 0
        for kind in (k for token in ids for k in KINDS if token == tokens[k]):
            if left == 0:
                grid = grids[kind].pop(0)
                count = int(np.prod(grid))
                mine.append(grid)
                patches.append(values[f"pixel_values_{kind}"][used[kind] : used[kind] + count])
                used[kind] += count
                left = count // merge
            left -= 1
        samples.append(
            Sample(
                ids.astype(np.int32),
                values["position_ids"][:, 0, at].astype(np.int32),
                labels[0, at].astype(np.int32),
                np.concatenate(patches),
                tuple(mine),
                (),
            )
        )
    return samples


def _computed(loaded: LoadedModel, values: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    """Everything a case may hold, computed by us."""
    config = loaded.config
    try:
        samples = case_samples(values, config)
    except (KeyError, IndexError):
        raise UserError(f"{case}: its vision tokens do not fit its grids and pixel values") from None
    batch = collate([samples], config, length=values["input_ids"].shape[1])
    computed = jax.tree.map(np.asarray, _forward(loaded.model, loaded.params, batch))
    tokens, levels = computed.pop("tokens", None), computed.pop("deepstack", ())
    if tokens is not None and batch.visual_index is not None:
        for kind, token_id in zip(KINDS, (config.image_token_id, config.video_token_id), strict=True):
            at = batch.visual_index[0][batch.input_ids[0] == token_id]
            computed[f"features_{kind}"] = tokens[0, at]
            computed |= {f"deepstack_{kind}_{k}": level[0, at] for k, level in enumerate(levels)}
    computed["position_ids"] = np.concatenate(
        [
            mrope_positions(
                s.input_ids, config.image_token_id, config.video_token_id, s.grids, _merge(config)
            )
            for s in samples
        ],
        axis=1,
    )[:, None]
    return computed


@partial(jax.jit, static_argnums=0)
def _forward(model: Any, params: Params, batch: Batch) -> dict[str, Array]:
    visual = model.apply({"params": params}, batch, method="encode")
    out, kept = model.apply({"params": params}, batch, visual, mutable=["intermediates"])
    hidden = kept["intermediates"]["language_model"]["layers"]["hidden"][0]
    assert batch.labels is not None  # collate always makes them
    losses = cross_entropy(model, params, out.hidden, batch.labels)
    result = {
        "hidden_after_layer_0": hidden[0],
        "hidden_after_last_layer": hidden[-1],
        "logits": model.apply({"params": params}, out.hidden, method="logits"),
    }
    for name in ("token", "square"):
        weights = token_weights(batch.labels, batch.segment_ids, name)
        result[f"loss_{name}"] = reduced(losses, weights)[None]
    if visual is not None:
        result["tokens"] = visual.tokens
        result["deepstack"] = visual.deepstack
    return result


def _merge(config: ModelConfig) -> int:
    return 1 if config.vision_config is None else config.vision_config.spatial_merge_size


def processing_parity(path: str | Path) -> list[Row]:
    """Compares the processing tables of a golden JSON file: one row a table, its difference the wrong rows.

    Raises:
        UserError: a file or table that cannot be read.
    """
    try:
        tables = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    checks = {"image_resize": _image_row, "video_resize": _video_row, "sampling": _sampling_row}
    if not isinstance(tables, dict) or not tables or (unknown := set(tables) - set(checks)):
        raise UserError(f"{path}: holds tables other than {', '.join(checks)}: {', '.join(sorted(unknown))}")
    rows = []
    for name, entries in tables.items():
        try:
            wrong = sum(not checks[name](dict(entry)) for entry in entries)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: a row of {name} lacks {error}") from None
        rows.append(Row(str(path), name, float(wrong), (len(entries),)))
    return rows


def _image_row(row: dict[str, Any]) -> bool:
    expected = row.pop("expect")
    return _size_or_refusal(image_size, row) == expected


def _video_row(row: dict[str, Any]) -> bool:
    expected = row.pop("expect")
    return _size_or_refusal(video_size, row) == expected


def _size_or_refusal(size: Callable[..., tuple[int, int]], row: dict[str, Any]) -> list[int] | None:
    """The size as the tables write it: null for a refused one."""
    try:
        return list(size(**row))
    except UserError:
        return None


def _sampling_row(row: dict[str, Any]) -> bool:
    rate = row["source_fps"]
    indices = sample_indices(row["total_frames"], rate, row["fps"], row["min_frames"], row["max_frames"])
    texts = [timestamp_text(t) for t in temporal_patch_times(indices / rate)]
    first, last = len(row["first"]), len(row["last"])
    got = {
        "num_indices": len(indices),
        "index_sum": int(indices.sum()),
        "first": indices[:first].tolist(),
        "last": indices[-last:].tolist(),
        "timestamps_text_first": texts[: len(row["timestamps_text_first"])],
        "timestamps_text_last": texts[-len(row["timestamps_text_last"]) :],
    }
    return all(row[name] == value for name, value in got.items())
