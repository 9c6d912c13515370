"""The small files of a model folder: config, generation, chat template, tokenizer, processor, PyTorch code.

The weights are in `write.py`.
"""

import fnmatch
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from iv3jax.checkpoint import remote_code
from iv3jax.checkpoint.dtypes import torch_name
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.checkpoint.write import Planned
from iv3jax.data.processor import NESTED, PROCESSOR_FILE, Processor, read_object
from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.paths import AnyPath

CONFIG = "config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
LEGACY_TEMPLATE = "chat_template.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

STOCK = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""transformers' own class for each model type that needs no code of ours."""

REAL_IMAGE_PAD, REAL_STOP_IDS = 151655, (151645, 151643)
"""`<|image_pad|>`, by which the real vocabulary is known, its `<|im_end|>` and `<|endoftext|>` (SPEC §5)."""

COPIED = (
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "added_tokens.json"),
    *("special_tokens_map.json", LEGACY_TEMPLATE, "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""What is copied from the source as it is, if it is there."""


def small_files(loaded: LoadedModel, planned: Mapping[str, Planned]) -> dict[str, bytes]:
    """Everything of an export but the weights, config.json last.

    Tokenizer and processor files that a source lacks are made where it has a tokenizer.json that we can
    use. What else it has of them, such as a text-only model's tokenizer without chat tokens, is copied.

    Args:
        loaded: the model; `folder` is its source, None for a model made in code.
        planned: its tensors, which say what dtype the configs name.

    Returns:
        File name → content.

    Raises:
        UserError: a file of the source that is not what its name says, or a tokenizer that does not fit.
    """
    source, config = loaded.folder, loaded.config
    found: dict[str, bytes] = {}
    tokenizer = None
    if source is not None:
        for path in source.iterdir():
            if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in COPIED) and path.is_file():
                found[path.name] = path.read_bytes()
        tokenizer = usable_tokenizer(source, config)
        found |= _text_files(source, config, tokenizer)
        if tokenizer is not None and config.vision_config is not None:
            found |= _processor_files(source, loaded.processor)
        elif tokenizer is None:
            found |= _as_they_are(source, (*NESTED, PROCESSOR_FILE))
    found[GENERATION] = _json(_generation(source, config, tokenizer))
    if config.model_type not in STOCK:
        files = remote_code.FILES[config.model_type]
        found |= {name: (remote_code.FOLDER / name).read_bytes() for name in files}
    return found | {CONFIG: _json(config_dict(config, main_dtype(planned.values())))}


def usable_tokenizer(folder: AnyPath, config: ModelConfig) -> Tokenizer | None:
    """A folder's tokenizer; None without tokenizer.json, or if a text-only model's is of another kind.

    Raises:
        UserError: the tokenizer of a model with a tower is not valid or does not fit the config.
    """
    if not (folder / TOKENIZER).exists():
        return None
    try:
        return Tokenizer.from_dir(folder, config)
    except UserError:
        if config.vision_config is not None:
            raise
        return None


def config_dict(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of an export: the source's, with the dtype and the classes of what is written.

    An `auto_map` of the source names code that is not in the export, so it is replaced or left out.
    """
    data = config.to_dict()
    for part in (data, data.get("text_config"), data.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and part.get(key) is not None:
                part[key] = torch_name(dtype)
    if data.get("dtype") is None and data.get("torch_dtype") is None:
        data["dtype"] = torch_name(dtype)
    data.pop("auto_map", None)
    if config.model_type in STOCK:
        if not data.get("architectures"):
            data["architectures"] = [STOCK[config.model_type]]
    else:
        data["architectures"] = [remote_code.ARCHITECTURES[config.model_type]]
        data["auto_map"] = dict(remote_code.AUTO_MAP[config.model_type])
    return data


def main_dtype(planned: Iterable[Planned]) -> str:
    """The dtype of most bytes, in safetensors' words."""
    count: Counter[str] = Counter()
    for tensor in planned:
        count[tensor.dtype] += tensor.nbytes
    return count.most_common(1)[0][0]


def _text_files(source: AnyPath, config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and the chat template: the source's, ours where it has none."""
    found = _as_they_are(source, (TOKENIZER, TEMPLATE))
    settings = read_object(source / TOKENIZER_CONFIG)
    has_template = TEMPLATE in found or "chat_template" in settings or (source / LEGACY_TEMPLATE).exists()
    if tokenizer is not None and not has_template:
        found[TEMPLATE] = remote_code.CHAT_TEMPLATE.encode()
    if tokenizer is not None and not settings:
        settings = remote_code.tokenizer_config(config)
        del settings["processor_class"]
    # It would name code of the source's, which is not in the export.
    settings.pop("auto_map", None)
    if settings and config.vision_config is not None:
        settings["processor_class"] = _processor_class(config)
    return found | ({TOKENIZER_CONFIG: _json(settings)} if settings else {})


def _as_they_are(source: AnyPath, names: Iterable[str]) -> dict[str, bytes]:
    """Those of the files that the source has."""
    return {name: (source / name).read_bytes() for name in names if (source / name).exists()}


def _processor_class(config: ModelConfig) -> str:
    return (
        "Qwen3VLProcessor" if config.model_type in STOCK else remote_code.PROCESSOR_CONFIG["processor_class"]
    )


def _processor_files(source: AnyPath, processor: Processor) -> dict[str, bytes]:
    """The two preprocessor files, and processor_config.json: our processor's, else the source's."""
    found = {name: json.loads(content) for name, content in processor.files(source).items() if name in NESTED}
    # What transformers 5 nests there would win over the two files, where the sizes are stated.
    own = {k: v for k, v in read_object(source / PROCESSOR_FILE).items() if k not in NESTED.values()}
    for data in (*found.values(), own):
        data.pop("auto_map", None)
    if processor.config.model_type not in STOCK:
        own |= remote_code.PROCESSOR_CONFIG
    for data in found.values():
        data["processor_class"] = _processor_class(processor.config)
    return {name: _json(data) for name, data in (found | ({PROCESSOR_FILE: own} if own else {})).items()}


def _generation(source: AnyPath | None, config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json: the source's, and the stop ids among the ends of generation in any case."""
    data = {} if source is None else read_object(source / GENERATION)
    stated = [part.get("eos_token_id") for part in (data, config.extra, config.text_config.extra)]
    own: Any = next((value for value in stated if value is not None), [])
    stops: tuple[int, ...] = (
        REAL_STOP_IDS if config.vision_config and config.image_token_id == REAL_IMAGE_PAD else ()
    )
    if tokenizer is not None:
        stops = tokenizer.stop_ids
        data.setdefault("pad_token_id", tokenizer.token_id("<|endoftext|>"))
    ends = dict.fromkeys([*(own if isinstance(own, list) else [own]), *stops])
    return data | ({"eos_token_id": list(ends)} if ends else {})


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def check_folder(folder: AnyPath, loaded: LoadedModel) -> None:
    """Reads the small files of an export as `load` does.

    Raises:
        UserError: the config or the processor differs from the model's.
    """
    if ModelConfig.from_file(folder) != loaded.config:
        raise UserError(f"{folder}: config.json reads back as another config")
    tokenizer = usable_tokenizer(folder, loaded.config)
    if tokenizer is None:
        return
    written, meant = Processor.from_dir(folder, loaded.config), loaded.processor
    if tokenizer.to_json() != meant.tokenizer.to_json():
        raise UserError(f"{folder}: {TOKENIZER} reads back as another tokenizer")
    if replace(written, tokenizer=meant.tokenizer, add_vision_id=meant.add_vision_id) != meant:
        raise UserError(f"{folder}: the preprocessor files read back as other settings")
