"""`iv3 export --verify`: a model folder in PyTorch and here, logit by logit. Needs the extra `export`."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.checkpoint.folder import STOCK
from iv3jax.checkpoint.load import load
from iv3jax.data.collate import collate, round_up_bucket
from iv3jax.data.positions import mrope_positions
from iv3jax.data.sample import Sample
from iv3jax.errors import UserError
from iv3jax.models.batch import IGNORE_LABEL, Batch
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.paths import PathArgument, StorePath, make_path
from iv3jax.typing import Array, Params

TOLERANCE = 2e-4
"""The largest difference of two logits that passes, in fp32 on values of order 1 to 10."""

Part = int | tuple[str, int, int, int]
"""A part of a prompt: so many text tokens, or ("image" or "video", t, h, w) in units of merged patches."""

_PROMPTS: dict[str, Sequence[Part]] = {
    "text": (24,),
    "image": (5, ("image", 1, 2, 3), 7),
    "video": (3, ("video", 3, 2, 2), 6),
}


@dataclass(frozen=True)
class Compared:
    """One prompt: its tokens, and the largest difference of a logit (infinite where one is not finite)."""

    prompt: str
    tokens: int
    difference: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within TOLERANCE."""
        return self.difference <= TOLERANCE


def require_torch(folder: PathArgument) -> None:
    """Raises UserError where `verify` could not run: without the libraries, or on a store."""
    if isinstance(make_path(folder), StorePath):
        raise UserError(f"{folder}: transformers reads local folders only; export to one to verify")
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise UserError(f"--verify needs {' and '.join(missing)}; pip install 'iv3jax[export]'")


def verify(folder: str | Path) -> list[Compared]:
    """Loads a folder with transformers and with `load`, both in fp32, and compares logits of some prompts.

    The prompts are random tokens, and random pixels where the model has a tower: a text, an image, a video.
    An InternVideo3 runs the code in the folder. Both models are in memory at once, in fp32.

    Raises:
        UserError: see `require_torch` and `load`; or transformers finds tensors missing, left over or of
            another shape.
    """
    require_torch(folder)
    loaded = load(folder, dtype=jnp.float32)
    theirs = torch_model(Path(folder), loaded.config)
    results = []
    for seed, (name, parts) in enumerate(_PROMPTS.items()):
        if name != "text" and loaded.config.vision_config is None:
            continue
        sample = _prompt(loaded.config, parts, seed)
        tokens = len(sample.input_ids)
        batch = collate([[sample]], loaded.config, length=round_up_bucket(tokens))
        # Otherwise accelerators round fp32 products to fewer bits.
        with jax.default_matmul_precision("highest"):
            ours = np.asarray(_logits(loaded.model, loaded.params, batch))[0, :tokens]
        results.append(
            Compared(name, tokens, _difference(ours, _torch_logits(theirs, loaded.config, sample)))
        )
    return results


@partial(jax.jit, static_argnums=0)
def _logits(model: InternVideo3, params: Params, batch: Batch) -> Array:
    """(B, T, vocab_size) fp32."""
    hidden = model.apply({"params": params}, batch).hidden
    return model.apply({"params": params}, hidden, method="logits")


def torch_model(folder: Path, config: ModelConfig) -> Any:
    """A model folder in transformers, in fp32 and for inference; an InternVideo3 runs the code in the folder.

    Raises:
        UserError: tensors are missing, left over or of another shape.
    """
    import torch
    import transformers

    stock = STOCK.get(config.model_type)
    kind = transformers.AutoModelForCausalLM if stock is None else getattr(transformers, stock)
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=stock is None, output_loading_info=True
        )
    finally:
        transformers.utils.logging.enable_progress_bar()
    if odd := {kind: sorted(map(str, names)) for kind, names in report.items() if names}:
        raise UserError(f"{folder}: transformers loads it with {odd}")
    return model.eval()


def _torch_logits(model: Any, config: ModelConfig, sample: Sample) -> np.ndarray:
    """(T, vocab_size) of one prompt."""
    import torch

    ids = sample.input_ids
    inputs = {"input_ids": torch.tensor(ids[None], dtype=torch.long)}
    if sample.grids:
        kind = np.where(ids == config.image_token_id, 1, np.where(ids == config.video_token_id, 2, 0))
        inputs["mm_token_type_ids"] = torch.tensor(kind[None], dtype=torch.int)
        names = ("pixel_values", "image_grid_thw") if 1 in kind else ("pixel_values_videos", "video_grid_thw")
        inputs |= {names[0]: torch.tensor(sample.patches), names[1]: torch.tensor(sample.grids)}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0].float().numpy()


def _prompt(config: ModelConfig, parts: Sequence[Part], seed: int) -> Sample:
    """Random text and at most one image or video, each of whose temporal patches follows two text tokens."""
    rng = np.random.default_rng(seed)
    vision = config.vision_config
    merge = 1 if vision is None else vision.spatial_merge_size
    special = (config.image_token_id, config.video_token_id, config.vision_start_token_id)
    # Ids above the first special token may have a meaning of their own, such as the other kind of pad.
    text = min([config.text_config.vocab_size, *(special if vision is not None else ())])
    ids: list[int] = []
    patches, grids = np.zeros((0, 0), np.float32), []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(0, text, part).tolist()
            continue
        kind, t, h, w = part
        pad = config.image_token_id if kind == "image" else config.video_token_id
        for _ in range(t):
            ids += rng.integers(0, text, 2).tolist()
            ids += [config.vision_start_token_id, *[pad] * (h * w), config.vision_end_token_id]
        assert vision is not None
        grids.append((t, h * merge, w * merge))
        patches = rng.uniform(-1, 1, (t * h * w * merge**2, vision.patch_dim)).astype(np.float32)
    input_ids = np.array(ids, np.int32)
    positions = mrope_positions(input_ids, config.image_token_id, config.video_token_id, grids, merge)
    labels = np.full(len(ids), IGNORE_LABEL, np.int32)
    return Sample(input_ids, positions, labels, patches, tuple(grids), ())


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - theirs).max())
