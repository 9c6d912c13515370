"""What several tests share: tiny configs, random weights and conversations, and transformers beside us.

Nothing here asserts. torch and transformers are imported only by the functions that need them.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from iv3jax.checkpoint.files import INDEX, SINGLE
from iv3jax.checkpoint.names import insert, lookup, tensors
from iv3jax.data.positions import mrope_positions
from iv3jax.data.sample import Sample
from iv3jax.models.batch import IGNORE_LABEL, Batch
from iv3jax.models.cache import init_cache
from iv3jax.models.config import ModelConfig, TextConfig, VisionConfig
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import Execution

Item = int | tuple[str, int, int, int]
"""A part of a conversation: so many text tokens, or ("image" or "video", t, h, w) in patches."""

ATTENTIONS = ("m2la", "gqa")

IMAGE, VIDEO, START, END, TEXT = 90, 91, 92, 93, 90
"""Ids of the special tokens in the tiny configs; below TEXT everything is text."""


def tiny_config(attention: str = "m2la", **text: Any) -> ModelConfig:
    """A vision model as small as it gets, with odd sizes: three layers, n ≠ e ≠ v, two DeepStack levels."""
    shape: dict[str, Any] = dict(
        vocab_size=97,
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=3,
        max_position_embeddings=256,
        rope_theta=1e4,
        mrope_section=(2, 1, 1),
    )
    if attention == "m2la":
        shape |= dict(num_attention_heads=3, num_key_value_heads=3, head_dim=8, attention_bias=True)
        shape |= dict(kv_lora_rank=13, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10)
    else:
        shape |= dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8, use_qk_norm=True)
    tower = VisionConfig(
        depth=3,
        hidden_size=16,
        intermediate_size=20,
        num_heads=2,
        out_hidden_size=20,
        num_position_embeddings=25,
        patch_size=2,
        deepstack_visual_indexes=(0, 2),
    )
    kind = "internvideo3" if attention == "m2la" else "qwen3_vl"
    return ModelConfig(kind, TextConfig(**shape | text), tower, IMAGE, VIDEO, START, END)


def even_config(attention: str = "m2la", **text: Any) -> ModelConfig:
    """The same with heads, widths and vocabulary that a mesh of 2 or 4 by 4 or 2 divides."""
    heads = dict(num_attention_heads=4 if attention == "m2la" else 8, num_key_value_heads=4)
    config = tiny_config(
        attention, **heads | dict(vocab_size=96, hidden_size=24, intermediate_size=32) | text
    )
    assert config.vision_config is not None
    tower = replace(config.vision_config, num_heads=4, intermediate_size=24, out_hidden_size=24)
    return replace(config, vision_config=tower)


CONVERTED: dict[str, dict[str, Any]] = {
    "norms": dict(use_qk_norm=True, num_attention_heads=4, num_key_value_heads=2, head_dim=10),
    "adapters": dict(latent_adapters=True),
    "ranks": dict(kv_lora_rank_list=(5, 13, 9)),
    "frequencies": dict(
        rope_frequency_list=((0, 0, 1, 3), (2, 1, 1, 0), (4, 4, 4, 4)), head_dim=10, mrope_section=(2, 2, 1)
    ),
}
"""What a converted model has besides plain M²LA, one thing at a time, and all that can be had at once."""
CONVERTED["all"] = {key: value for own in list(CONVERTED.values()) for key, value in own.items()}
CONVERTED["components"] = dict(rope_components=2, qk_rope_head_dim=16)


table = cache(tensors)
"""The table of names of a config, traced once."""


def random_value(name: str, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """fp32 of a trained weight's size: products keep their scale, and no norm is 1, no bias 0."""
    value = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        return value * np.float32(np.prod(shape[1:]) ** -0.5)
    return np.float32(0.2) * value + np.float32(not name.endswith("bias"))


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    return {t.name: random_value(t.name, t.shape, rng) for t in table(config)}


def to_ours(values: dict[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """Hugging Face's tensors as our nested dict."""
    parts: dict[tuple[str, ...], list[np.ndarray]] = {}
    stacked = {}
    for tensor in table(config):
        parts.setdefault(tensor.path, []).append(tensor.to_ours(values[tensor.name]))
        stacked[tensor.path] = tensor.index is not None
    params: dict[str, Any] = {}
    for path, layers in parts.items():
        insert(params, path, jax.numpy.asarray(np.stack(layers) if stacked[path] else layers[0]))
    return params


def to_theirs(tree: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our nested dict, of parameters or of their gradients, under Hugging Face's names."""
    found = {}
    for tensor in table(config):
        value = np.asarray(lookup(tree, tensor.path))
        found[tensor.name] = tensor.to_theirs(value if tensor.index is None else value[tensor.index])
    return found


def random_model(config: ModelConfig, seed: int = 0, **run: Any) -> tuple[InternVideo3, dict[str, Any]]:
    """A model and random weights for it."""
    return InternVideo3(config, Execution(**run)), to_ours(random_tensors(config, seed), config)


def write_folder(
    folder: Path, config: ModelConfig, values: dict[str, np.ndarray], shards: int | None = None
) -> Path:
    """A model folder: config.json and one safetensors file, or so many shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    if shards is None:
        save_file(values, folder / SINGLE)
        return folder
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        names = list(values)[k::shards]
        save_file({name: values[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def wide_folder(folder: Path) -> Path:
    """240 MB of fp32 in five files of a GQA model, the largest tensors of 41 MB: for tests of peak memory."""
    config = even_config(
        "gqa",
        vocab_size=16000,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=8,
        head_dim=64,
        mrope_section=(16, 8, 8),
    )
    assert config.vision_config is not None
    config = replace(config, vision_config=replace(config.vision_config, out_hidden_size=640))
    return write_folder(folder, config, random_tensors(config), shards=5)


_LOAD = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
import jax
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.names import tensors
from iv3jax.models.config import ModelConfig

def peak():
    # Not ru_maxrss: a new process starts with its parent's.
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024

# What tracing and the first array take is not the checkpoint's.
tensors(ModelConfig.from_file({folder!r}))
jax.numpy.ones(3).block_until_ready()
before = peak()
arrays = jax.tree.leaves(jax.block_until_ready(load({folder!r}, weights={weights!r}).params))
sizes = [x.nbytes for x in arrays]
print(json.dumps(dict(grown=peak() - before, arrays=sum(sizes), largest=max(sizes))))
"""


def memory_of_load(folder: Path, weights: str | None = None) -> dict[str, int]:
    """Loads a folder in a new process: bytes that its peak grows by, of all arrays and of the largest."""
    root = Path(__file__).parents[2]
    script = _LOAD.format(root=str(root), tests=str(root / "tests"), folder=str(folder), weights=weights)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def conversation(config: ModelConfig, items: Sequence[Item], seed: int = 0) -> Sample:
    """Random text with images and videos; a video's temporal patches stand apart, each after two text tokens.

    Loss is taken on the next token wherever that is text.
    """
    rng = np.random.default_rng(seed)
    vision = config.vision_config
    merge = 1 if vision is None else vision.spatial_merge_size
    patch_dim = 0 if vision is None else vision.patch_dim
    first_special = min(config.image_token_id, config.text_config.vocab_size)
    ids: list[int] = []
    patches, grids = [np.zeros((0, patch_dim), np.float32)], []

    def text(count: int) -> None:
        ids.extend(rng.integers(0, first_special, count).tolist())

    for item in items:
        if isinstance(item, int):
            text(item)
            continue
        kind, t, h, w = item
        token = config.image_token_id if kind == "image" else config.video_token_id
        for _ in range(t):
            text(0 if kind == "image" else 2)
            vision_tokens = [token] * (h * w // merge**2)
            ids += [config.vision_start_token_id, *vision_tokens, config.vision_end_token_id]
        patches.append(rng.uniform(-1, 1, (t * h * w, patch_dim)).astype(np.float32))
        grids.append((t, h, w))
    input_ids = np.array(ids, np.int32)
    follows = np.append(input_ids[1:], IGNORE_LABEL)
    return Sample(
        input_ids,
        mrope_positions(input_ids, config.image_token_id, config.video_token_id, grids, merge),
        np.where(follows < first_special, follows, IGNORE_LABEL).astype(np.int32),
        np.concatenate(patches),
        tuple(grids),
        (),
    )


@partial(jax.jit, static_argnums=0)
def forward(model: InternVideo3, params: Any, batch: Any) -> dict[str, Any]:
    """Everything compared: `layers` (L, B, T, D), `hidden` after the final norm, `logits`, tower outputs."""
    visual = model.apply({"params": params}, batch, method="encode")
    out, kept = model.apply({"params": params}, batch, visual, mutable=["intermediates"])
    result = {
        "layers": kept["intermediates"]["language_model"]["layers"]["hidden"][0],
        "hidden": out.hidden,
        "logits": model.apply({"params": params}, out.hidden, method="logits"),
    }
    if visual is not None:
        result |= {"tokens": visual.tokens, "deepstack": visual.deepstack}
    return result


@partial(jax.jit, static_argnums=0)
def encode(model: InternVideo3, params: Any, batch: Any) -> Any:
    """The tower's VisualFeatures."""
    return model.apply({"params": params}, batch, method="encode")


def columns(batch: Batch, start: int, stop: int) -> Batch:
    """Some of the tokens of a batch, without its pixels."""
    return Batch(
        batch.input_ids[:, start:stop],
        batch.positions[:, :, start:stop],
        batch.segment_ids[:, start:stop],
        visual_index=batch.visual_index[:, start:stop],
    )


def in_chunks(model, params, batch: Batch, bounds: list[int], capacity: int):
    """Hidden states and the cache of a batch fed piece by piece through a cache."""
    visual = encode(model, params, batch)
    rows = len(batch.input_ids)
    cache_ = init_cache(model.config.text_config, rows, capacity, jnp.float32, model.run.scan_layers)
    step = jax.jit(lambda part, cache_: model.apply({"params": params}, part, visual, cache_))
    hidden = []
    for start, stop in pairwise(bounds):
        out = step(columns(batch, start, stop), cache_)
        cache_ = out.cache
        hidden.append(out.hidden)
    return jnp.concatenate(hidden, axis=1), cache_


def difference(got: Any, expected: Any) -> float:
    """The largest absolute difference; infinite where shapes differ or something is not finite."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape or not (np.isfinite(got).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.max(np.abs(got - expected), initial=0.0))


def tree_difference(got: Any, expected: Any) -> float:
    """The same over all leaves of two trees of one structure."""
    return max(jax.tree.leaves(jax.tree.map(difference, got, expected)))


def shapes_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shape of every array that the equations of a jaxpr make, those of nested jaxprs included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")}
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, list | tuple) else [parameter]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= shapes_in(inner)
    return found


def randomise(torch_model: Any, seed: int) -> Any:
    """Gives every weight of a torch model a `random_value`, in place."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in torch_model.named_parameters():
            parameter.copy_(torch.from_numpy(random_value(name, tuple(parameter.shape), rng)))
    return torch_model.eval()


def torch_inputs(config: ModelConfig, sample: Sample) -> dict[str, Any]:
    """A conversation as the arguments of transformers' Qwen3-VL."""
    import torch

    ids = sample.input_ids
    kinds = np.where(ids == config.image_token_id, 1, np.where(ids == config.video_token_id, 2, 0))
    inputs = {"input_ids": torch.tensor(ids[None], dtype=torch.long)}
    if not sample.grids:
        return inputs
    inputs["mm_token_type_ids"] = torch.tensor(kinds[None], dtype=torch.int)
    visual = kinds[kinds > 0]
    assert config.vision_config is not None
    merge = config.vision_config.spatial_merge_size**2
    parts: dict[int, tuple[list, list]] = {1: ([], []), 2: ([], [])}
    patches = tokens = 0
    for t, h, w in sample.grids:
        grids, values = parts[int(visual[tokens])]
        grids.append([t, h, w])
        values.append(sample.patches[patches : patches + t * h * w])
        patches, tokens = patches + t * h * w, tokens + t * h * w // merge
    for kind, name, grid in (
        (1, "pixel_values", "image_grid_thw"),
        (2, "pixel_values_videos", "video_grid_thw"),
    ):
        grids, values = parts[kind]
        if grids:
            inputs[name] = torch.tensor(np.concatenate(values))
            inputs[grid] = torch.tensor(grids)
    return inputs


def torch_forward(torch_model: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """`layers` (L, T, D), taken where the next layer or the final norm takes them; `logits` (T, vocab)."""
    import torch

    decoder = getattr(torch_model.model, "language_model", torch_model.model)
    entering: list[Any] = []

    def hook(module: Any, args: tuple, kwargs: dict) -> None:
        entering.append((args[0] if args else kwargs["hidden_states"])[0])

    modules = [*decoder.layers[1:], decoder.norm]
    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    with torch.no_grad():
        logits = torch_model(**inputs, use_cache=False).logits[0]
    for handle in hooks:
        handle.remove()
    return {"layers": torch.stack(entering).numpy(), "logits": logits.numpy()}
