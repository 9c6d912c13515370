"""The one two-way table between our parameters and Hugging Face's tensors: names, shapes, axis order.

Our layers are stacked along a leading axis (unless they stand alone) and keep heads as an axis of their own;
theirs are one tensor a layer, (out, in), heads flattened. Each entry says how in einops' words, so both
directions are one text.

Where each layer has a rank of its own (`kv_lora_rank_list`), a file holds each layer's exact shapes. A stack
of ours has room for the largest rank: what a layer leaves over is zero and lies after the latent's numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import einops
import numpy as np

from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig, TextConfig
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
        latent: those of our axes that begin with the r numbers of a latent.
    """

    path: Path
    name: str
    pattern: str
    latent: tuple[int, ...] = ()

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
        rank: r of its layer where `kv_lora_rank_list` gives one and the tensor has an axis of latents.
        padding: how much less that is than our parameter has room for.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    entry: Entry
    index: int | None
    sizes: tuple[tuple[str, int], ...]
    rank: int | None = None
    padding: int = 0

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """Their axis order → ours (of one layer), with zeros up to the largest rank."""
        value = einops.rearrange(value, self.entry.pattern, **dict(self.sizes))
        if not self.padding:
            return value
        shape = [n + self.padding * (i in self.entry.latent) for i, n in enumerate(value.shape)]
        padded = np.zeros(shape, value.dtype)
        padded[self._kept(shape)] = value
        return padded

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Our axis order (of one layer) → theirs, without the zeros.

        Raises:
            UserError: a number that is not zero where the layer's rank leaves room.
        """
        theirs, ours = self.entry.pattern.split(" -> ")
        return einops.rearrange(self.cut(value), f"{ours} -> {theirs}", **dict(self.sizes))

    def cut(self, value: np.ndarray) -> np.ndarray:
        """Ours (of one layer) without the zeros up to the largest rank. Raises as `to_theirs` does."""
        if not self.padding:
            return value
        kept = value[self._kept(value.shape)]
        if lost := np.count_nonzero(value) - np.count_nonzero(kept):
            raise UserError(
                f"{self.name}: {lost} numbers beyond its layer's rank {self.rank} are not zero; they have no "
                "place in a file, whose ranks are kv_lora_rank_list's"
            )
        return kept

    def _kept(self, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
        """The places of our array that are a layer's own."""
        assert self.rank is not None
        unused = range(self.rank, self.rank + self.padding)
        return np.ix_(
            *(np.delete(np.arange(n), unused if i in self.entry.latent else ()) for i, n in enumerate(shape))
        )


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

    def layer(path: str, name: str, pattern: str, latent: tuple[int, ...] = ()) -> None:
        keys = (*_LAYERS, *path.split("/"))
        table.append(Entry(keys, f"{root}.layers.{{i}}.{name}", pattern, latent))

    layer("input_layernorm/scale", "input_layernorm.weight", "d -> d")
    layer("post_attention_layernorm/scale", "post_attention_layernorm.weight", "d -> d")
    for module, pattern in (
        ("gate_proj", "m d -> m d"),
        ("up_proj", "m d -> m d"),
        ("down_proj", "d m -> d m"),
    ):
        layer(f"mlp/{module}/kernel", f"mlp.{module}.weight", pattern)

    for path, pattern, latent in _attention_entries(text):
        module, kind = path.split("/")
        name = kind if kind == "bias" else "weight"
        layer(f"self_attn/{path}", f"self_attn.{module}.{name}", pattern, latent)
    vision = config.vision_config
    return table if vision is None else table + _vision_entries(len(vision.deepstack_visual_indexes))


def _attention_entries(text: TextConfig) -> list[tuple[str, str, tuple[int, ...]]]:
    """Our path inside attention, the pattern, and the axes of latents."""
    found: list[tuple[str, str, tuple[int, ...]]] = []

    def linear(module: str, weight: str, bias: str | None = None, latent: tuple[int, ...] = ()) -> None:
        found.append((f"{module}/kernel", weight, latent))
        if bias is not None:
            found.append((f"{module}/bias", bias, latent))

    heads = "(h k) -> h k" if text.attention_bias else None
    linear("q_proj", "(h k) d -> h k d", heads)
    if text.kv_lora_rank is None:
        linear("k_proj", "(h k) d -> h k d", heads)
        linear("v_proj", "(h k) d -> h k d", heads)
        if text.use_qk_norm:
            found += [(f"{norm}/scale", "k -> k", ()) for norm in ("q_norm", "k_norm")]
    else:
        linear("kv_a_proj_with_mqa", "w d -> w d", "w -> w" if text.attention_bias else None, (0,))
        linear("kv_b_proj", "(h k) r -> h k r", latent=(2,))
        if text.use_qk_norm:
            found.append(("q_norm/scale", "k -> k", ()))
            linear("q_expand", "(h k) d -> h k d")
            linear("k_norm_proj", "(g k) d -> g k d")
        if text.latent_adapters:
            found.append(("kv_adapters/kernel", "m r s -> m r s", (1, 2)))
            found.append(("kv_adapters/bias", "m r -> m r", (1,)))
    linear("o_proj", "d (h k) -> d h k", "d -> d" if text.attention_output_bias else None)
    return found


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
    ranks = config.text_config.kv_lora_rank_list
    fixed: dict[str, int] = {}
    if (vision := config.vision_config) is not None:
        side = vision.patch_size
        fixed = dict(c=vision.in_channels, t=vision.temporal_patch_size, y=side, x=side)
    found: list[Tensor] = []
    for entry in entries(config):
        shape = lookup(abstract, entry.path).shape
        count = shape[0] if entry.stacked else 1
        shape = shape[1:] if entry.stacked else shape
        theirs = _groups(entry.pattern.split(" -> ")[0])
        for i in range(count):
            path, index = entry.path, i if entry.stacked else None
            if not scan_layers and path[:2] == _LAYERS:
                path, index = (_LAYERS[0], f"{_LAYERS[1]}_{i}", *path[2:]), None
            rank, unused = None, 0
            if ranks is not None and entry.latent:
                rank, unused = ranks[i], max(ranks) - ranks[i]
            own = [size - unused * (axis in entry.latent) for axis, size in enumerate(shape)]
            sizes = _sizes(entry, own, fixed)
            their_shape = tuple(math.prod(sizes[a] for a in group.split()) for group in theirs)
            # A layer that stands alone is no larger than its own rank.
            padding = 0 if index is None else unused
            name = entry.name.format(i=i)
            found.append(Tensor(name, their_shape, path, entry, index, tuple(sizes.items()), rank, padding))
    return found


def _sizes(entry: Entry, shape: Sequence[int], fixed: Mapping[str, int]) -> dict[str, int]:
    """The length of every axis in an entry's pattern, from our shape of one layer; `fixed` is the tower's."""
    theirs, ours = entry.pattern.split(" -> ")
    sizes = {axis: fixed[axis] for axis in fixed if axis in theirs.split() and "(" in ours}
    return sizes | {a: n for a, n in zip(_groups(ours), shape, strict=True) if " " not in a}


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
