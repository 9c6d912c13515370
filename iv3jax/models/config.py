"""Model configs: frozen dataclasses read from and written to a Hugging Face `config.json`.

Field names are the checkpoint's. Fields that we do not use are kept in `extra` and written back, and a
config that was read and not changed is written back as it was.
No jax here, and no shapes of parameters: those follow from the modules.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from iv3jax.errors import UserError
from iv3jax.paths import PathArgument, make_path

MODEL_TYPES = {
    "internvideo3": "vision and M²LA",
    "internvideo3_text": "text only, M²LA",
    "qwen3_vl": "vision and GQA with q/k norm",
    "qwen3": "text only, GQA with q/k norm",
    "qwen2": "text only, GQA with q/k/v biases",
    "llama": "text only, GQA",
}
"""The `model_type` values that can be read, and what each means."""


def _extra() -> Any:
    return field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class TextConfig:
    """The decoder. With `kv_lora_rank` its attention is M²LA, without it GQA.

    `use_qk_norm`, `attention_bias` and `attention_output_bias` follow from the model type where the
    file does not say. `mrope_section` None means plain RoPE over one position.

    What M²LA may have besides SPEC §2 (a converted model, SPEC §3):
        use_qk_norm: the query passes its norm and then a fixed expansion, q/k norm of `head_dim` numbers; of
            the key's norm one factor a token and group is cached, which multiplies the group's logits.
        kv_lora_rank_list: the rank of each layer; `kv_lora_rank` is the largest of them.
        latent_adapters: a latent is mapped when it is written, by one affine map for text and one for vision.
        rope_components: K, how many pairs turn by each of the e/2K frequencies; pair j by frequency
            j mod e/2K.
        rope_frequency_list: of each layer, which of the head_dim / 2 frequencies each of its e/2 pairs turns
            by, where they are chosen. `mrope_section` is then of all of those frequencies.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    use_qk_norm: bool = False
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    kv_lora_rank_list: tuple[int, ...] | None = None
    latent_adapters: bool = False
    rope_components: int = 1
    rope_frequency_list: tuple[tuple[int, ...], ...] | None = None
    extra: Mapping[str, Any] = _extra()

    @property
    def rope_dim(self) -> int:
        """Twice the number of RoPE's frequencies: M²LA's e/K, the head's for GQA or where they are listed."""
        whole = self.kv_lora_rank is None or self.rope_frequency_list is not None
        return self.head_dim if whole else self.qk_rope_head_dim // self.rope_components

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer, the widest if ranks differ: r+e for M²LA, 2·G·head_dim for GQA.

        With `use_qk_norm` M²LA caches G fp32 numbers more.
        """
        if self.kv_lora_rank is None:
            return 2 * self.num_key_value_heads * self.head_dim
        return self.kv_lora_rank + self.qk_rope_head_dim

    def of_layer(self, layer: int) -> "TextConfig":
        """The config that a layer has by itself: its own rank and no list of ranks, its own frequencies."""
        own: dict[str, Any] = {}
        if self.kv_lora_rank_list is not None:
            own |= dict(kv_lora_rank=self.kv_lora_rank_list[layer], kv_lora_rank_list=None)
        if self.rope_frequency_list is not None:
            own |= dict(rope_frequency_list=(self.rope_frequency_list[layer],))
        return dataclasses.replace(self, **own)


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen3-VL vision tower (SPEC §4)."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    in_channels: int = 3
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    deepstack_visual_indexes: tuple[int, ...] = ()
    extra: Mapping[str, Any] = _extra()

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch row: channels · temporal patch · patch²."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: decoder, and tower unless it is text-only (`vision_config` None).

    `source` is the content of the `config.json` this was read from, empty for one made in code.
    """

    model_type: str
    text_config: TextConfig
    vision_config: VisionConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    extra: Mapping[str, Any] = _extra()
    source: Mapping[str, Any] = _extra()

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Reads the contents of a `config.json`; `source` names it in errors.

        Raises:
            UserError: unknown `model_type`, a missing or mistyped field, or a feature no module computes.
        """
        config = ModelConfig._from_dict(data, source)
        return dataclasses.replace(config, source=copy.deepcopy(dict(data)))

    @staticmethod
    def _from_dict(data: Mapping[str, Any], source: str) -> "ModelConfig":
        model_type = data.get("model_type")
        if model_type not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise UserError(f"{source}: model_type {model_type!r} is not one of {known}")
        if model_type in ("internvideo3", "qwen3_vl"):
            for part in ("text_config", "vision_config"):
                if not isinstance(data.get(part), Mapping):
                    raise UserError(f"{source}: {part} is missing or not an object")
            text = dict(data["text_config"])
            # transformers writes the tie at either level; the outer one wins there too.
            text["tie_word_embeddings"] = data.get(
                "tie_word_embeddings", text.get("tie_word_embeddings", False)
            )
            _refuse(data["vision_config"], _VISION_SUPPORT, f"{source}: vision_config")
            vision = _read(VisionConfig, data["vision_config"], f"{source}: vision_config")
            used = {"model_type", "text_config", "vision_config", "tie_word_embeddings", *_TOKEN_IDS}
            ids = {k: _typed(_FIELDS[k], data[k], source) for k in _TOKEN_IDS if data.get(k) is not None}
            extra = {k: v for k, v in data.items() if k not in used}
            config = ModelConfig(
                model_type, _read_text(text, model_type, f"{source}: text_config"), vision, **ids, extra=extra
            )
            if vision.out_hidden_size != config.text_config.hidden_size:
                raise UserError(
                    f"{source}: vision_config.out_hidden_size {vision.out_hidden_size} differs from "
                    f"text_config.hidden_size {config.text_config.hidden_size}"
                )
            return config
        return ModelConfig(model_type, _read_text(data, model_type, source))

    @staticmethod
    def from_file(path: PathArgument) -> "ModelConfig":
        """Reads a `config.json`, or the one inside a model folder, local or on a store."""
        path = make_path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; a model folder holds a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(data, dict):
            raise UserError(f"{path}: holds no JSON object")
        return ModelConfig.from_dict(data, str(path))

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` for this config, in JSON's types.

        A config that was read is written as it stood there, every key and value: what a file leaves
        unsaid, says twice or says as null is its own affair. One that was made or changed in code is
        written anew, with the unknown fields of the file it came from.
        """
        if self.source and ModelConfig._from_dict(self.source, "config.json") == self:
            return copy.deepcopy(dict(self.source))
        text = _write_text(self)
        if self.vision_config is None:
            # A config made from that of another type has that type among its unknown fields.
            return {"model_type": self.model_type} | {k: v for k, v in text.items() if k != "model_type"}
        vision = _write(self.vision_config)
        return {
            "model_type": self.model_type,
            **self.extra,
            "text_config": text,
            "vision_config": vision,
            "tie_word_embeddings": self.text_config.tie_word_embeddings,
            **{k: getattr(self, k) for k in _TOKEN_IDS},
        }


_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_FIELDS = {item.name: item for item in dataclasses.fields(ModelConfig)}
_M2LA_TYPES = ("internvideo3", "internvideo3_text")
_M2LA_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# Derived from the model type, so never a key of the file; use_qk_norm is one where the type is M²LA's.
_DERIVED = ("use_qk_norm", "attention_output_bias", "mrope_section", "extra")


def _read(cls: type, data: Mapping[str, Any], source: str) -> Any:
    """Builds a dataclass from the keys it knows, the others going to `extra`."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        if item.name == "extra":
            continue
        value = data.get(item.name)
        if value is None:
            if item.default is dataclasses.MISSING:
                raise UserError(f"{source}.{item.name} is missing")
            continue
        values[item.name] = _typed(item, value, source)
    values["extra"] = {k: v for k, v in data.items() if k not in values}
    return cls(**values)


def _typed(item: dataclasses.Field, value: Any, source: str) -> Any:
    """Checks one JSON value against the field's annotation."""
    kind = str(item.type)
    integer = isinstance(value, int) and not isinstance(value, bool)
    if "tuple" in kind:
        if "tuple[tuple" in kind:
            if _lists(value, list | tuple) and all(_lists(own, int) for own in value):
                return tuple(tuple(own) for own in value)
        elif _lists(value, int):
            return tuple(value)
    elif "bool" in kind:
        if isinstance(value, bool):
            return value
    elif "float" in kind:
        if isinstance(value, float) or integer:
            return float(value)
    elif integer and value >= (0 if item.default == 0 else 1):
        return value
    raise UserError(f"{source}.{item.name} is {value!r}, which is no valid value ({_kind_name(kind)})")


def _lists(value: Any, kind: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, kind) for v in value)


def _kind_name(kind: str) -> str:
    lists = (("tuple[tuple", "a list of lists of integers"), ("tuple", "a list of integers"))
    for word, name in (*lists, ("bool", "true or false"), ("float", "a number")):
        if word in kind:
            return name
    return "a positive integer"


def _read_text(data: Mapping[str, Any], model_type: str, source: str) -> TextConfig:
    """The decoder's fields, with what each model type leaves unsaid filled in."""
    data = dict(data)
    _refuse(data, _TEXT_SUPPORT, source)
    rope = _rope(data, source)
    if rope.get("mrope_section") and not rope.get("mrope_interleaved", False):
        raise UserError(f"{source}: mrope_interleaved must be true; sections in blocks are not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise UserError(f"{source}: rope type {kind!r} is not supported; only plain RoPE and M-RoPE are")
    values = {k: v for k, v in data.items() if k not in _DERIVED}
    if "rope_theta" not in values and "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if values.get("rope_theta") is None:
        values["rope_theta"] = 10000.0 if model_type in ("llama", "qwen2", "qwen3") else 5e6
    width, heads = data.get("hidden_size"), data.get("num_attention_heads")
    values.setdefault("num_key_value_heads", heads)
    if values.get("head_dim") is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        values["head_dim"] = width // heads
    latent = model_type in _M2LA_TYPES
    if latent:
        for key in _M2LA_FIELDS:
            if not data.get(key):
                raise UserError(f"{source}.{key} is missing; model_type {model_type} means M²LA")
        values["use_qk_norm"] = data.get("use_qk_norm")
    else:
        _refuse(data, _M2LA_ONLY, source)
        for key in (*_M2LA_FIELDS, *_M2LA_ONLY):
            values.pop(key, None)
    if model_type == "qwen2":
        values["attention_bias"] = True
    config: TextConfig = _read(TextConfig, values, source)
    if latent:
        _check_latent(config, source)
    section = rope.get("mrope_section") if model_type == "internvideo3_text" else None
    if model_type in ("internvideo3", "qwen3_vl"):
        section = rope.get("mrope_section", (24, 20, 20))
    if section is not None:
        integers = isinstance(section, list | tuple) and all(isinstance(v, int) for v in section)
        if not integers or len(section) != 3 or sum(section) != config.rope_dim // 2:
            raise UserError(
                f"{source}: mrope_section {section!r} must be three numbers that sum to half the "
                f"rotary dim, {config.rope_dim // 2}"
            )
        section = tuple(section)
    return dataclasses.replace(
        config,
        mrope_section=section,
        use_qk_norm=config.use_qk_norm if latent else model_type in ("qwen3", "qwen3_vl"),
        attention_output_bias=config.attention_bias and model_type in ("llama", "qwen3", "qwen3_vl"),
        extra={k: v for k, v in data.items() if k in config.extra},
    )


def _check_latent(config: TextConfig, source: str) -> None:
    """What must hold between the numbers of an M²LA decoder."""
    e, components = config.qk_rope_head_dim, config.rope_components
    if e % (2 * components):
        raise UserError(
            f"{source}.qk_rope_head_dim {e} is no multiple of 2·rope_components = {2 * components}, "
            "the dims that turn by one frequency"
        )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if config.use_qk_norm and heads % groups:
        raise UserError(
            f"{source}.num_attention_heads {heads} is no multiple of num_key_value_heads {groups}, "
            "which use_qk_norm needs"
        )
    _check_frequencies(config, source)
    ranks = config.kv_lora_rank_list
    if ranks is None:
        return
    if len(ranks) != config.num_hidden_layers:
        raise UserError(
            f"{source}.kv_lora_rank_list has {len(ranks)} ranks for "
            f"num_hidden_layers = {config.num_hidden_layers}; it needs one for each layer"
        )
    if min(ranks) < 1:
        raise UserError(f"{source}.kv_lora_rank_list holds {min(ranks)}; a rank is 1 or more")
    if max(ranks) != config.kv_lora_rank:
        raise UserError(
            f"{source}.kv_lora_rank {config.kv_lora_rank} is not the largest rank of kv_lora_rank_list, "
            f"which is {max(ranks)}"
        )


def _check_frequencies(config: TextConfig, source: str) -> None:
    """What must hold for `rope_frequency_list`, if it is there."""
    listed = config.rope_frequency_list
    if listed is None:
        return
    name = f"{source}.rope_frequency_list"
    if config.rope_components != 1:
        raise UserError(f"{name} says what every pair turns by; leave rope_components out")
    if len(listed) != config.num_hidden_layers:
        raise UserError(
            f"{name} has {len(listed)} lists for num_hidden_layers = {config.num_hidden_layers}; it needs "
            "one for each layer"
        )
    pairs, half = config.qk_rope_head_dim // 2, config.head_dim // 2
    for own in listed:
        if len(own) != pairs:
            raise UserError(
                f"{name} has a list of {len(own)} frequencies; qk_rope_head_dim means {pairs} pairs"
            )
        if not all(0 <= f < half for f in own):
            raise UserError(
                f"{name} holds {list(own)}; a frequency is one of head_dim / 2 = {half}, from 0 on"
            )


def _rope(data: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """RoPE's settings: `rope_parameters`, theta included, since transformers 5, `rope_scaling` before."""
    for key in ("rope_parameters", "rope_scaling"):
        if value := data.get(key):
            if not isinstance(value, Mapping):
                raise UserError(f"{source}.{key} is {value!r}, which is no object")
            return value
    return {}


# What the modules compute, where the wider families have a choice; the first value means unsaid.
_TEXT_SUPPORT: dict[str, tuple] = {
    "hidden_act": (None, "silu"),
    "q_lora_rank": (None,),
    "qk_latent_layernorm": (None, False),
    "rope_interleave": (None, True),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
}
# What only M²LA has.
_M2LA_ONLY: dict[str, tuple] = {
    "kv_lora_rank_list": (None,),
    "latent_adapters": (None, False),
    "rope_components": (None, 1),
    "rope_frequency_list": (None,),
}
_VISION_SUPPORT: dict[str, tuple] = {"hidden_act": (None, "gelu_pytorch_tanh")}


def _refuse(data: Mapping[str, Any], supported: Mapping[str, tuple], source: str) -> None:
    """Features that no module here computes are never ignored silently."""
    for key, values in supported.items():
        if data.get(key) not in values:
            raise UserError(f"{source}.{key} = {data[key]!r} is not supported (only {values[-1]!r})")


def _write(config: Any) -> dict[str, Any]:
    """A dataclass as JSON values, its unknown fields first."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "extra"}
    return {**config.extra, **{k: _plain(v) for k, v in values.items()}}


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _write_text(config: ModelConfig) -> dict[str, Any]:
    """The decoder's part of `config.json`: what was read, and RoPE where every reader looks for it."""
    text = config.text_config
    values = {k: v for k, v in _write(text).items() if k not in _DERIVED}
    if text.kv_lora_rank is None:
        for key in (*_M2LA_FIELDS, *_M2LA_ONLY):
            values.pop(key)
    else:
        values.update(q_lora_rank=None, qk_latent_layernorm=False, rope_interleave=True)
        values["use_qk_norm"] = text.use_qk_norm
    if config.model_type == "qwen2":
        values.pop("attention_bias")
    rope: dict[str, Any] = {"rope_type": "default"}
    if text.mrope_section is not None:
        rope.update(mrope_section=list(text.mrope_section), mrope_interleaved=True)
    parameters = text.extra.get("rope_parameters")
    if parameters is not None:
        values["rope_parameters"] = {**parameters, **rope, "rope_theta": text.rope_theta}
    if text.mrope_section is not None and (parameters is None or "rope_scaling" in text.extra):
        values["rope_scaling"] = {**(text.extra.get("rope_scaling") or {}), **rope}
    return values
