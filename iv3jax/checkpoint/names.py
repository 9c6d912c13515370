"""The one two-way table between our parameters and Hugging Face's tensors: names, shapes, axis order.

Our layers are stacked along a leading axis (unless they stand alone) and keep heads as an axis of their own;
theirs are one tensor a layer, (out, in), heads flattened. Each entry says how in einops' words, so both
directions are one text.
"""

import math
from dataclasses import dataclass
from typing import Any

import einops
import numpy as np

from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.sharding import unbox

Path = tuple[str, ...]

_LAYERS = ("language_model", "layers")


@dataclass(frozen=True)
class Entry:
    """One of our parameters and its tensors.

    Attributes:
        path: keys in our nested dict.
        name: their name; `{i}` is the layer where our parameter stacks several.
        pattern: their axes → ours, in einops' notation, the stacking axis left out.
    """

    path: Path
    name: str
    pattern: str

    @property
    def stacked(self) -> bool:
        """Whether our parameter holds one of their tensors for each layer."""
        return "{i}" in self.name


@dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint and where it goes.

    Attributes:
        name: its name in the file.
        shape: its shape in the file.
        path: keys in our nested dict.
        entry: the table entry it belongs to.
        index: which layer of our stacked parameter, None if that is not stacked.
        sizes: length of every axis in the entry's pattern.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    entry: Entry
    index: int | None
    sizes: tuple[tuple[str, int], ...]

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """Their axis order → ours (of one layer)."""
        return einops.rearrange(value, self.entry.pattern, **dict(self.sizes))

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Our axis order (of one layer) → theirs."""
        theirs, ours = self.entry.pattern.split(" -> ")
        return einops.rearrange(value, f"{ours} -> {theirs}", **dict(self.sizes))


def entries(config: ModelConfig) -> list[Entry]:
    """The table for one config."""
    text = config.text_config
    root = "model.language_model" if config.vision_config is not None else "model"
    table = [
        Entry(("embed_tokens", "embedding"), f"{root}.embed_tokens.weight", "v d -> v d"),
        Entry(("language_model", "norm", "scale"), f"{root}.norm.weight", "d -> d"),
    ]
    if not text.tie_word_embeddings:
        table.append(Entry(("lm_head", "kernel"), "lm_head.weight", "v d -> v d"))

    def layer(path: str, name: str, pattern: str) -> None:
        keys = (*_LAYERS, *path.split("/"))
        table.append(Entry(keys, f"{root}.layers.{{i}}.{name}", pattern))

    layer("input_layernorm/scale", "input_layernorm.weight", "d -> d")
    layer("post_attention_layernorm/scale", "post_attention_layernorm.weight", "d -> d")
    for module, pattern in (
        ("gate_proj", "m d -> m d"),
        ("up_proj", "m d -> m d"),
        ("down_proj", "d m -> d m"),
    ):
        layer(f"mlp/{module}/kernel", f"mlp.{module}.weight", pattern)

    def attention(module: str, weight: str, bias: str | None) -> None:
        layer(f"self_attn/{module}/kernel", f"self_attn.{module}.weight", weight)
        if bias is not None:
            layer(f"self_attn/{module}/bias", f"self_attn.{module}.bias", bias)

    has_bias = text.attention_bias
    attention("q_proj", "(h k) d -> h k d", "(h k) -> h k" if has_bias else None)
    if text.kv_lora_rank is None:
        for module in ("k_proj", "v_proj"):
            attention(module, "(h k) d -> h k d", "(h k) -> h k" if has_bias else None)
        if text.use_qk_norm:
            layer("self_attn/q_norm/scale", "self_attn.q_norm.weight", "k -> k")
            layer("self_attn/k_norm/scale", "self_attn.k_norm.weight", "k -> k")
    else:
        attention("kv_a_proj_with_mqa", "w d -> w d", "w -> w" if has_bias else None)
        attention("kv_b_proj", "(h k) r -> h k r", None)
    attention("o_proj", "d (h k) -> d h k", "d -> d" if text.attention_output_bias else None)
    vision = config.vision_config
    return table if vision is None else table + _vision_entries(len(vision.deepstack_visual_indexes))


def _vision_entries(deepstack_levels: int) -> list[Entry]:
    table: list[Entry] = []

    def module(path: str, name: str, weight: str, bias: str | None = None) -> None:
        keys = ("visual", "tower", *path.split("/"))
        table.append(Entry(keys, f"model.visual.{name}.weight", weight))
        if bias is not None:
            table.append(Entry((*keys[:-1], "bias"), f"model.visual.{name}.bias", bias))

    module("patch_embed/kernel", "patch_embed.proj", "o c t y x -> o (c t y x)", "o -> o")
    module("pos_embed/embedding", "pos_embed", "n d -> n d")
    for norm in ("norm1", "norm2"):
        module(f"blocks/{norm}/scale", f"blocks.{{i}}.{norm}", "d -> d", "d -> d")
    module(
        "blocks/qkv/kernel",
        "blocks.{i}.attn.qkv",
        "(three h k) d -> three h k d",
        "(three h k) -> three h k",
    )
    module("blocks/proj/kernel", "blocks.{i}.attn.proj", "d (h k) -> d h k", "d -> d")
    mergers = {"blocks": "blocks.{i}.mlp", "merger": "merger"}
    if deepstack_levels:
        mergers["deepstack_merger_list"] = "deepstack_merger_list.{i}"
    for merger, prefix in mergers.items():
        for linear in ("linear_fc1", "linear_fc2"):
            module(f"{merger}/{linear}/kernel", f"{prefix}.{linear}", "o i -> o i", "o -> o")
        if merger != "blocks":
            module(f"{merger}/norm/scale", f"{prefix}.norm", "d -> d", "d -> d")
    return table


def tensors(config: ModelConfig, scan_layers: bool = True) -> list[Tensor]:
    """Every tensor a checkpoint of this config holds, in the table's order. No memory is used.

    `scan_layers` says which form our parameters have (`Execution.scan_layers`): a decoder layer that
    stands alone has a path of its own, and no tensor of it is part of a stack.
    """
    abstract = unbox(boxed_params(InternVideo3(config)))
    fixed: dict[str, int] = {}
    if (vision := config.vision_config) is not None:
        side = vision.patch_size
        fixed = dict(c=vision.in_channels, t=vision.temporal_patch_size, y=side, x=side)
    found: list[Tensor] = []
    for entry in entries(config):
        shape = lookup(abstract, entry.path).shape
        count = shape[0] if entry.stacked else 1
        shape = shape[1:] if entry.stacked else shape
        theirs, ours = entry.pattern.split(" -> ")
        sizes = {axis: fixed[axis] for axis in fixed if axis in theirs.split() and "(" in ours}
        sizes |= {a: s for a, s in zip(_groups(ours), shape, strict=True) if " " not in a}
        their_shape = tuple(math.prod(sizes[a] for a in group.split()) for group in _groups(theirs))
        for i in range(count):
            path, index = entry.path, i if entry.stacked else None
            if not scan_layers and path[:2] == _LAYERS:
                path, index = (_LAYERS[0], f"{_LAYERS[1]}_{i}", *path[2:]), None
            name = entry.name.format(i=i)
            found.append(Tensor(name, their_shape, path, entry, index, tuple(sizes.items())))
    return found


def _groups(side: str) -> list[str]:
    """'d (h k)' → ['d', 'h k']: one text for each axis of an array."""
    groups: list[str] = []
    inside = False
    for word in side.replace("(", "( ").replace(")", " )").split():
        if word in "()":
            inside = word == "("
            if inside:
                groups.append("")
        elif inside:
            groups[-1] = f"{groups[-1]} {word}".strip()
        else:
            groups.append(word)
    return groups


def lookup(tree: Any, path: Path) -> Any:
    """The leaf at a path of keys."""
    for key in path:
        tree = tree[key]
    return tree


def insert(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Puts a leaf at a path of keys, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
