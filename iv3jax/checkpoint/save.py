"""Our parameters → a Hugging Face model folder with one safetensors file."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from iv3jax.checkpoint.files import SINGLE
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.checkpoint.names import lookup, tensors


def save(loaded: LoadedModel, folder: str | Path) -> Path:
    """Writes config, tokenizer and processor files and all tensors, replacing an older folder of that name.

    The folder appears whole or not at all: it is written beside its place and then renamed.
    """
    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    values: dict[str, np.ndarray] = {}
    for tensor in tensors(loaded.config, loaded.model.run.scan_layers):
        ours = lookup(loaded.params, tensor.path)
        value = np.asarray(jax.device_get(ours if tensor.index is None else ours[tensor.index]))
        values[tensor.name] = np.ascontiguousarray(tensor.to_theirs(value))
    save_file(values, part / SINGLE, metadata={"format": "pt"})
    text = json.dumps(loaded.config.to_dict(), indent=2)
    (part / "config.json").write_text(text + "\n", encoding="utf-8")
    loaded.processor.save(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder
