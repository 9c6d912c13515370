"""Broken model folders: each gives one line that names the folder or file and what is wrong in it."""

import json

import numpy as np
import pytest
from models.peers import even_config, random_tensors, tiny_config, write_folder
from safetensors.numpy import save_file

from iv3jax.checkpoint.files import INDEX, SINGLE, collapse
from iv3jax.checkpoint.load import load
from iv3jax.errors import UserError

CONFIG = tiny_config("m2la")
VALUES = random_tensors(CONFIG)
FIRST = "model-00001-of-00002.safetensors"


def refusal(folder) -> str:
    """The message of the UserError that loading raises: one line that starts with a path in the folder."""
    with pytest.raises(UserError) as caught:
        load(folder)
    text = str(caught.value)
    assert text.startswith(str(folder)) and "\n" not in text
    return text.removeprefix(str(folder))


def sharded(folder, edit_index):
    """A folder of two shards whose index was edited."""
    write_folder(folder, CONFIG, VALUES, shards=2)
    index = json.loads((folder / INDEX).read_text())
    changed = edit_index(index)
    (folder / INDEX).write_text(json.dumps(index if changed is None else changed))
    return folder


def test_all_misfits_are_named_at_once(tmp_path):
    values = dict(VALUES)
    for i in range(3):
        del values[f"model.language_model.layers.{i}.mlp.up_proj.weight"]
    del values["lm_head.weight"]
    values["model.language_model.layers.1.self_attn.k_proj.weight"] = np.zeros((2, 2), np.float32)
    values["model.extra"] = np.zeros(1, np.float32)
    values["model.language_model.norm.weight"] = np.zeros(21, np.float32)
    values["model.visual.blocks.2.attn.qkv.weight"] = np.zeros((16, 48), np.float32)
    assert refusal(write_folder(tmp_path, CONFIG, values)) == (
        ": tensors do not fit config.json: "
        "4 missing: lm_head.weight, model.language_model.layers.{0-2}.mlp.up_proj.weight; "
        "2 unexpected: model.extra, model.language_model.layers.1.self_attn.k_proj.weight; "
        "2 of the wrong shape: model.language_model.norm.weight is (21,) instead of (20,), "
        "model.visual.blocks.2.attn.qkv.weight is (16, 48) instead of (48, 16)"
    )


@pytest.mark.parametrize(("name", "shards"), list(zip(sorted(VALUES)[::20], [None, 3] * 4, strict=False)))
def test_any_tensor_missing_extra_or_misshaped(tmp_path, name, shards):
    values = {k: v for k, v in VALUES.items() if k != name}
    folder = write_folder(tmp_path, CONFIG, values, shards)
    assert refusal(folder) == f": tensors do not fit config.json: 1 missing: {name}"
    write_folder(folder, CONFIG, VALUES | {f"{name}.more": VALUES[name]}, shards)
    assert refusal(folder) == f": tensors do not fit config.json: 1 unexpected: {name}.more"
    wrong = VALUES[name][None]
    write_folder(folder, CONFIG, VALUES | {name: wrong}, shards)
    assert refusal(folder) == (
        f": tensors do not fit config.json: 1 of the wrong shape: {name} is {wrong.shape} "
        f"instead of {VALUES[name].shape}"
    )


def test_gqa_tensors_under_an_m2la_config(tmp_path):
    config = even_config("m2la")
    text = refusal(write_folder(tmp_path, config, random_tensors(even_config("gqa"))))
    for part in (
        "layers.{0-2}.self_attn.kv_b_proj.weight",
        "layers.{0-2}.self_attn.k_norm.weight",
        "q_proj.weight is",
    ):
        assert part in text


@pytest.mark.parametrize("content", [b'{"weight_map": {', b"", b"\xff\xfe\x00", b"not json"])
def test_index_that_is_no_json(tmp_path, content):
    write_folder(tmp_path, CONFIG, VALUES, shards=2)
    (tmp_path / INDEX).write_bytes(content)
    assert refusal(tmp_path).startswith(f"/{INDEX}: not valid JSON (")


@pytest.mark.parametrize(
    "content", [{}, [], 3, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}]
)
def test_index_without_weight_map(tmp_path, content):
    folder = sharded(tmp_path, lambda _: content)
    assert refusal(folder) == f"/{INDEX}: has no weight_map of tensor names to files"


def test_index_that_names_an_absent_shard(tmp_path):
    folder = sharded(tmp_path, lambda _: None)
    (folder / FIRST).unlink()
    assert refusal(folder) == f"/{FIRST}: no such file, though {INDEX} names it"


def test_index_that_names_tensors_a_shard_does_not_hold(tmp_path):
    def edit(index):
        for i in range(3):
            index["weight_map"][f"model.language_model.layers.{i}.mlp.gate_proj.weight"] = FIRST
        index["weight_map"]["zebra"] = FIRST

    lost = refusal(sharded(tmp_path, edit))
    assert lost.startswith(f"/{FIRST}: does not hold model.language_model.layers.")
    assert lost.endswith(f"mlp.gate_proj.weight, zebra, though {INDEX} says so")


def test_index_that_leaves_a_tensor_out(tmp_path):
    folder = sharded(tmp_path, lambda index: index["weight_map"].pop("lm_head.weight") and None)
    assert refusal(folder) == ": tensors do not fit config.json: 1 missing: lm_head.weight"


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_safetensors(tmp_path, keep):
    """Cut in the length, in the header, in the numbers: an interrupted download."""
    path = write_folder(tmp_path, CONFIG, VALUES) / SINGLE
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    assert refusal(tmp_path).startswith(f"/{SINGLE}: not a whole safetensors file (")


def test_truncated_shard(tmp_path):
    path = sharded(tmp_path, lambda _: None) / FIRST
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(tmp_path).startswith(f"/{FIRST}: not a whole safetensors file (")


def test_no_weights_at_all(tmp_path):
    (write_folder(tmp_path, CONFIG, VALUES) / SINGLE).unlink()
    assert refusal(tmp_path) == f": holds neither {SINGLE} nor {INDEX}"


def test_dtype_that_no_one_computes_in(tmp_path):
    write_folder(tmp_path, CONFIG, {k: v.astype(np.int8) for k, v in VALUES.items()})
    assert "embed_tokens.weight has dtype I8; supported are F32, BF16, F16" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "/config.json: not valid JSON ("),
        ("[]", "/config.json: holds no JSON object"),
        (
            json.dumps(CONFIG.to_dict() | {"model_type": "gpt2"}),
            "/config.json: model_type 'gpt2' is not one of",
        ),
        (json.dumps({"model_type": "llama", "vocab_size": 5}), "/config.json.hidden_size is missing"),
    ],
)
def test_config(tmp_path, content, message):
    folder = write_folder(tmp_path, CONFIG, VALUES)
    (folder / "config.json").write_text(content)
    assert refusal(folder).startswith(message)


def test_a_config_of_another_size_names_every_tensor_it_changes(tmp_path):
    save_file(VALUES, write_folder(tmp_path, tiny_config("m2la", v_head_dim=12), VALUES) / SINGLE)
    text = refusal(tmp_path)
    assert "6 of the wrong shape" in text
    for i in range(3):
        assert f"layers.{i}.self_attn.kv_b_proj.weight is (48, 13) instead of (54, 13)" in text
        assert f"layers.{i}.self_attn.o_proj.weight is (20, 30) instead of (20, 36)" in text


def test_collapse():
    names = ["a.0.w", "a.1.w", "a.2.w", "a.7.w", "b.3.w", "norm", "a.9.b.1.c"]
    assert collapse(names) == "a.{0-2,7}.w, b.3.w, norm, a.9.b.1.c"
