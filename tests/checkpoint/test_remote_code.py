"""The PyTorch code that an exported folder carries, in transformers, against our own model.

fp32, 2e-4 on logits of order 1; about 1e-6 is seen.
"""

import ast
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoint.remote import add_code, modules  # noqa: F401
from models.peers import (
    conversation,
    difference,
    forward,
    random_tensors,
    tiny_config,
    to_ours,
    torch_inputs,
    write_folder,
)
from safetensors.numpy import load_file

from iv3jax.checkpoint import remote_code
from iv3jax.checkpoint.load import load
from iv3jax.data.collate import collate
from iv3jax.generate.generate import generate
from iv3jax.models.internvideo3 import InternVideo3

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-4
LENGTH = 160
CASES = {
    "text": [19],
    "long text": [150],
    "image": [3, ("image", 1, 4, 8), 4],
    "videos": [2, ("video", 3, 4, 6), 3, ("video", 1, 8, 4), 1, ("video", 2, 4, 4), 2],
    "mixed": [1, ("video", 2, 8, 6), 5, ("image", 1, 6, 4), ("image", 1, 4, 4), ("video", 1, 4, 6), 3],
}
ALLOWED = {"torch", "transformers", "numpy", "PIL", "av"} | set(sys.stdlib_module_names)


def torch_model(folder: Path, auto: str = "AutoModelForCausalLM", **options):
    """The model of a folder, which must hold exactly the tensors it needs."""
    model, found = getattr(transformers, auto).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(found.values()), found
    return model.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model with odd sizes (n ≠ e ≠ v, two DeepStack levels): ours, its parameters, and in torch."""
    config = tiny_config()
    values = random_tensors(config)
    # Never generated, so that what is generated holds no placeholder.
    values["lm_head.weight"][config.image_token_id :] = 0
    folder = add_code(write_folder(tmp_path_factory.mktemp("odd"), config, values))
    return InternVideo3(config), to_ours(values, config), torch_model(folder)


def padded(inputs: list[dict], pad: int = 0) -> dict:
    """Conversations as one left-padded batch, with the mask: `generate` would guess it from the ids."""
    length = max(row["input_ids"].shape[1] for row in inputs)
    batch = {"input_ids": [], "attention_mask": []}
    for row in inputs:
        ids = row["input_ids"]
        space = (length - ids.shape[1], 0)
        batch["input_ids"].append(torch.nn.functional.pad(ids, space, value=pad))
        batch["attention_mask"].append(torch.nn.functional.pad(torch.ones_like(ids), space))
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            if name in row:
                batch.setdefault(name, []).append(row[name])
    return {name: torch.cat(parts) for name, parts in batch.items()}


def test_files_import_nothing_else():
    """They run alone, in a folder far from ours."""
    held = {path.name for path in remote_code.FOLDER.glob("*.py")} - {"__init__.py"}
    assert held == set().union(*remote_code.FILES.values())
    for files in remote_code.FILES.values():
        names = {Path(name).stem for name in files}
        for name, node in _statements(files):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, name
            elif isinstance(node, ast.ImportFrom):
                top = str(node.module).split(".")[0]
                assert top in (names if node.level else ALLOWED), f"{name}: {top}"


def _statements(files: tuple[str, ...]) -> Iterator[tuple[str, ast.AST]]:
    for name in files:
        for node in ast.walk(ast.parse((remote_code.FOLDER / name).read_text(encoding="utf-8"))):
            yield name, node


@pytest.mark.medium
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits(pair, attention):
    """Every case alone, absorbed and expanded, without a cache, and all as one padded batch."""
    ours, params, theirs = pair
    theirs.set_attn_implementation(attention)
    samples = [conversation(ours.config, items, seed) for seed, items in enumerate(CASES.values())]
    expected = forward(ours, params, collate([[s] for s in samples], ours.config, length=LENGTH))["logits"]
    inputs = [torch_inputs(ours.config, sample) for sample in samples]
    with torch.no_grad():
        batch = theirs(**padded(inputs)).logits
        for row, (name, single) in enumerate(zip(CASES, inputs, strict=True)):
            tokens = len(samples[row])
            wanted = np.asarray(expected)[row, :tokens]
            for use_cache in (False, True):
                got = theirs(**single, use_cache=use_cache).logits[0]
                assert difference(got, wanted) <= TOLERANCE, (name, use_cache)
            assert difference(batch[row, -tokens:], wanted) <= TOLERANCE, name
    theirs.set_attn_implementation("sdpa")


def test_positions(pair):
    ours, _, theirs = pair
    samples = [conversation(ours.config, items, seed) for seed, items in enumerate(CASES.values())]
    batch = padded([torch_inputs(ours.config, sample) for sample in samples])
    grids = batch["image_grid_thw"], batch["video_grid_thw"]
    got = theirs.model.positions(batch["input_ids"], LENGTH, batch["attention_mask"], None, *grids)
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(got[:, row, -len(sample) :].numpy(), sample.positions)


def test_chunks_over_a_cache(pair):
    """A prompt with vision fed in pieces, on growing and fixed caches; r+e numbers kept a token and layer."""
    ours, _, theirs = pair
    text = ours.config.text_config
    head, tail = (
        torch_inputs(ours.config, conversation(ours.config, items, 5))
        for items in ([3, ("video", 2, 4, 8), 70], [4, ("image", 1, 8, 4), 6, 2])
    )
    whole = padded([{**head, **tail, "input_ids": torch.cat([head["input_ids"], tail["input_ids"]], 1)}])
    count = whole["input_ids"].shape[1]
    with torch.no_grad():
        expected = theirs(**whole, use_cache=False).logits
        fixed = transformers.StaticCache(config=theirs.config.text_config, max_cache_len=count + 3)
        for cache, slots in ((transformers.DynamicCache(), count), (fixed, count + 3)):
            parts = [theirs(**head, past_key_values=cache), theirs(**tail, past_key_values=cache)]
            got = torch.cat([part.logits for part in parts], dim=1)
            assert difference(got, expected) <= TOLERANCE
            numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
            assert numbers == text.num_hidden_layers * slots * text.cache_width
        single = [theirs(input_ids=head["input_ids"][:, :1], use_cache=True)]
        for index in range(1, 3):
            single.append(
                theirs(input_ids=head["input_ids"][:, index : index + 1], past_key_values=single[0][1])
            )
        assert difference(torch.cat([s.logits for s in single], 1), expected[:, :3]) <= TOLERANCE


@pytest.mark.medium
def test_greedy_tokens(pair):
    """32 tokens of every case: alone, with each cache and without, as a padded batch, and ours."""
    ours, params, theirs = pair
    samples = [conversation(ours.config, items, seed) for seed, items in enumerate(CASES.values())]
    batch = collate([[s] for s in samples], ours.config, length=LENGTH)
    expected = generate(ours, params, batch, max_new_tokens=32, stop_ids=[]).tokens
    inputs = [padded([torch_inputs(ours.config, sample)]) for sample in samples]
    options = dict(max_new_tokens=32, do_sample=False, pad_token_id=0)
    for name, single, tokens in zip(CASES, inputs, expected, strict=True):
        start = single["input_ids"].shape[1]
        for cache in ({}, {"use_cache": False}):
            got = theirs.generate(**single, **options, **cache)[0, start:].tolist()
            assert got == tokens, (name, cache)
    for cache in ({}, {"cache_implementation": "static"}):
        got = theirs.generate(**padded(inputs), **options, **cache)[:, -32:].tolist()
        assert got == expected, cache


def test_several_answers_and_a_second_turn(pair):
    """Beams repeat the pixels of their own row, and a kept cache goes on where vision left its positions."""
    ours, _, theirs = pair
    inputs = [
        padded([torch_inputs(ours.config, conversation(ours.config, items, 3))])
        for items in ([2, ("image", 1, 4, 8), ("image", 1, 4, 4), 3], [9], [1, ("image", 1, 8, 6), 4])
    ]
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    beams = options | dict(num_beams=3, num_return_sequences=2)
    batch = theirs.generate(**padded(inputs), **beams)[:, -6:]
    alone = torch.cat([theirs.generate(**single, **beams)[:, -6:] for single in inputs])
    assert batch.tolist() == alone.tolist()

    cache = transformers.DynamicCache()
    first = theirs.generate(**inputs[0], **options, past_key_values=cache)
    ids = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kept = theirs.generate(**longer, past_key_values=cache, **options)
    assert kept.tolist() == theirs.generate(**inputs[0] | longer, **options).tolist()


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_again(tmp_path, tied):
    """transformers writes what it and we read again; keys that nobody knows stay; training runs."""
    config = tiny_config(tie_word_embeddings=tied)
    values = random_tensors(config)
    folder = add_code(write_folder(tmp_path / "first", config, values))
    written = json.loads((folder / "config.json").read_text())
    written["invented"] = {"a": 1}
    written["text_config"]["invented"] = 2
    del written["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(written))

    model = torch_model(folder, "AutoModelForImageTextToText")
    assert type(model).__name__ == remote_code.ARCHITECTURES["internvideo3"]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert type(transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == (
        "InternVideo3Model"
    )
    model.save_pretrained(tmp_path / "second")
    again = torch_model(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "config.json").read_text())
    assert saved["invented"] == {"a": 1} and saved["text_config"]["invented"] == 2
    ours = load(tmp_path / "second")
    assert ours.config == config
    sample = conversation(config, CASES["mixed"], 1)
    inputs = torch_inputs(config, sample)
    batch = collate([[sample]], config, length=LENGTH)
    expected = np.asarray(forward(ours.model, ours.params, batch)["logits"])[0, : len(sample)]
    again.gradient_checkpointing_enable()
    loss = again.train()(**inputs, labels=inputs["input_ids"])
    assert difference(loss.logits[0].detach(), expected) <= TOLERANCE
    loss.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in again.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", ["text", "video", "packed"])
def test_golden(golden, tmp_path, case):
    """The authors' module and positions; a pack is its samples one by one."""
    folder = shutil.copytree(golden / "m2la", tmp_path / "m2la")
    model = torch_model(add_code(folder))
    values = load_file(golden / "m2la" / "cases" / f"{case}.safetensors")
    merge = model.config.vision_config.spatial_merge_size**2
    bounds = values.get("cu_seqlens", np.array([0, values["input_ids"].shape[1]])).ravel().tolist()
    used = {"image": 0, "video": 0}
    for start, stop in itertools.pairwise(bounds):
        ids = values["input_ids"][:, start:stop]
        inputs = {"input_ids": torch.tensor(ids, dtype=torch.long)}
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if f"grid_thw_{kind}" not in values:
                continue
            grids = values[f"grid_thw_{kind}"].reshape(-1, 3)
            tokens = int((ids == getattr(model.config, f"{kind}_token_id")).sum())
            sizes = grids.prod(-1).cumsum() // merge
            here = (sizes > used[kind]) & (sizes <= used[kind] + tokens)
            if tokens:
                rows = values[f"pixel_values_{kind}"][used[kind] * merge :][: tokens * merge]
                inputs |= {pixels: torch.tensor(rows), grid: torch.tensor(grids[here], dtype=torch.long)}
            used[kind] += tokens
        with torch.no_grad():
            got = model(**inputs).logits[0]
        assert difference(got, values["logits"][0, start:stop]) <= TOLERANCE
        grids = inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
        positions = model.model.positions(inputs["input_ids"], stop - start, None, None, *grids)
        np.testing.assert_array_equal(positions, values["position_ids"][:, :, start:stop])


def test_wrong_vision_is_refused(pair):
    ours, _, theirs = pair
    inputs = torch_inputs(ours.config, conversation(ours.config, CASES["image"]))
    with pytest.raises(ValueError, match="the text holds 7 image tokens, but the images given make 8"):
        theirs(**{**inputs, "input_ids": inputs["input_ids"][:, :-6]})
    with pytest.raises(ValueError, match="more vision tokens than the images and videos given"):
        theirs.generate(**{**inputs, "input_ids": inputs["input_ids"].repeat(2, 1)}, max_new_tokens=1)
    with pytest.raises(ValueError, match="pixels of images need image_grid_thw"):
        theirs(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
