"""The GQA checkpoint that a conversion starts from, read piece by piece; nothing is kept in memory.

Names, shapes and axis orders are the checkpoint table's (checkpoint/names.py).
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iv3jax.checkpoint.dtypes import DTYPES, cast, common
from iv3jax.checkpoint.files import TensorFiles, check
from iv3jax.checkpoint.hub import model_folder
from iv3jax.checkpoint.load import check_dtypes, check_tie
from iv3jax.checkpoint.names import Path, Tensor, insert, tensors
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.paths import AnyPath, PathArgument
from iv3jax.typing import Params

TARGETS = {
    "qwen3_vl": "internvideo3",
    "qwen3": "internvideo3_text",
    "qwen2": "internvideo3_text",
    "llama": "internvideo3_text",
}
"""The `model_type` values that can be converted → what each becomes."""


@dataclass(frozen=True)
class Source:
    """A model folder with grouped-query attention.

    Attributes:
        folder: where it lies.
        config: its config.
        files: its safetensors, known to fit the config.
    """

    folder: AnyPath
    config: ModelConfig
    files: TensorFiles

    @staticmethod
    def open(source: PathArgument) -> "Source":
        """Reads the config and the headers of a folder, local or on a store, or of a model of the hub.

        Raises:
            UserError: as `load`; a preset, M²LA, or a bias of `o_proj`, which M²LA has not.
        """
        folder = model_folder(source)
        if folder is None:
            raise UserError(f"{source}: a preset is a shape without weights; name a model folder to convert")
        config = ModelConfig.from_file(folder)
        text = config.text_config
        if text.kv_lora_rank is not None:
            raise UserError(f"{folder}: is M²LA already (model_type {config.model_type}); name a GQA model")
        if text.attention_output_bias:
            raise UserError(
                f"{folder}/config.json: attention_bias is true, which gives a {config.model_type} a bias of "
                "o_proj, for which M²LA has no place; such a model cannot be converted"
            )
        files, expected = TensorFiles(folder), tensors(config, scan_layers=False)
        ignored = [r".*\.rotary_emb\.inv_freq"]
        if text.tie_word_embeddings:
            ignored.append(r"lm_head\.weight")
        check(files, expected, ignored)
        check_dtypes(files, expected, None)
        if text.tie_word_embeddings and "lm_head.weight" in files.names:
            check_tie(files, expected)
        return Source(folder, config, files)

    @cached_property
    def _tensors(self) -> list[Tensor]:
        return tensors(self.config, scan_layers=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        sizes = [math.prod(t.shape) * DTYPES[self.files.dtype(t.name)].itemsize for t in self._tensors]
        return sum(sizes)

    def fingerprint(self) -> str:
        """Of the weights: names, dtypes and shapes, and the bytes of all norms and biases.

        Reading all of an 8B's bytes would take longer than a layer's conversion.
        """
        found = hashlib.sha256()
        for tensor in self._tensors:
            found.update(f"{tensor.name} {self.files.dtype(tensor.name)} {tensor.shape}".encode())
        for tensor in (t for t in self._tensors if len(t.shape) == 1):
            found.update(self.files.read(tensor.name).tobytes())
        return found.hexdigest()

    @property
    def target_type(self) -> str:
        """The `model_type` of what it becomes."""
        return TARGETS[self.config.model_type]

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the tensors that no conversion changes: all but those inside `self_attn`."""
        return tuple(tensor.name for tensor in self._tensors if "self_attn" not in tensor.path)

    def layer(self, index: int, dtype: np.dtype | None = None) -> Params:
        """One layer's parameters, as `DecoderLayer(config.text_config).apply({"params": …})` takes them.

        Args:
            index: which of `num_hidden_layers`, from 0.
            dtype: of all its arrays; None keeps each tensor's own.

        Raises:
            UserError: a number that does not fit the dtype.
        """
        return self._read(("language_model", f"layers_{index}"), dtype)

    def embedding(self, dtype: np.dtype | None = None) -> np.ndarray:
        """(vocab_size, D)."""
        return self._read(("embed_tokens",), dtype)["embedding"]

    def final_norm(self, dtype: np.dtype | None = None) -> Params:
        """The parameters of the last `RMSNorm`."""
        return self._read(("language_model", "norm"), dtype)

    def head(self, dtype: np.dtype | None = None) -> np.ndarray:
        """(vocab_size, D): what hidden states are multiplied with; the embeddings if they are tied."""
        if self.config.text_config.tie_word_embeddings:
            return self.embedding(dtype)
        return self._read(("lm_head",), dtype)["kernel"]

    def tower(self, dtype: np.dtype | None = None) -> Params | None:
        """The parameters of `VisionTower`; None for a text-only model."""
        return None if self.config.vision_config is None else self._read(("visual",), dtype)

    def _read(self, below: Path, dtype: np.dtype | None) -> dict[str, Any]:
        """All parameters whose paths start with these keys, which are cut off."""
        stacks: dict[Path, list[Tensor]] = {}
        for tensor in self._tensors:
            if tensor.path[: len(below)] == below:
                stacks.setdefault(tensor.path[len(below) :], []).append(tensor)
        if not stacks:
            raise ValueError(f"{self.folder} has no parameters below {'/'.join(below)}")
        found: dict[str, Any] = {}
        for path, parts in stacks.items():
            insert(found, path, self._stacked(parts, dtype))
        return found

    def _stacked(self, parts: list[Tensor], dtype: np.dtype | None) -> np.ndarray:
        """One parameter from its tensors; several dtypes become the one that holds them all, as in `load`."""
        if dtype is None:
            dtype = DTYPES[common(self.files.dtype(tensor.name) for tensor in parts)]
        values = []
        for tensor in parts:
            try:
                values.append(tensor.to_ours(cast(self.files.read(tensor.name), dtype)))
            except OverflowError as error:
                raise UserError(f"{self.folder}: {tensor.name}: {error}") from None
        return values[0] if parts[0].index is None else np.stack(values)
