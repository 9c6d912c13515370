"""Loading: what lies in the files arrives bit for bit, on one device and on a mesh, never twice in memory."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import even_config, memory_of_load, random_tensors, to_theirs, wide_folder, write_folder

from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.save import save
from iv3jax.errors import UserError
from iv3jax.models.presets import PRESETS
from iv3jax.sharding import make_mesh

BITS = {2: np.uint16, 4: np.uint32}


def assert_same_bits(params, config, values) -> None:
    """Our parameters hold exactly these tensors, dtype included."""
    got = to_theirs(params, config)
    assert got.keys() == values.keys()
    for name, value in values.items():
        assert got[name].dtype == value.dtype, name
        kind = BITS[value.itemsize]
        np.testing.assert_array_equal(
            np.ascontiguousarray(got[name]).view(kind), value.view(kind), err_msg=name
        )


@pytest.mark.parametrize(
    ("attention", "dtype", "shards", "mesh"),
    [
        ("m2la", jnp.float32, None, None),
        ("m2la", jnp.bfloat16, 3, None),
        ("m2la", jnp.float32, 3, {"fsdp": 4, "tensor": 2}),
        ("m2la", jnp.bfloat16, None, {"fsdp": 2, "tensor": 4}),
        ("gqa", jnp.bfloat16, 3, {"data": 2, "fsdp": 2, "context": 2}),
        ("gqa", jnp.float32, 5, {"fsdp": 2, "tensor": 4}),
    ],
)
def test_bit_equal(tmp_path, attention, dtype, shards, mesh):
    config = even_config(attention, tie_word_embeddings=attention == "gqa")
    values = {k: v.astype(dtype) for k, v in random_tensors(config).items()}
    write_folder(tmp_path, config, values, shards)
    loaded = load(tmp_path, mesh=None if mesh is None else make_mesh(**mesh))
    assert loaded.config == config
    assert loaded.model.run.dtype == loaded.model.run.param_dtype == dtype
    assert_same_bits(loaded.params, config, values)
    kernel = loaded.params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert len(kernel.sharding.device_set) == (1 if mesh is None else 8)
    sizes = {"fsdp": 1, "context": 1, "tensor": 1} | (mesh or {})
    parts = sizes["fsdp"] * sizes["context"], sizes["tensor"]
    assert kernel.addressable_shards[0].data.shape == (3, 32 // parts[1], 24 // parts[0])


def test_dtype_asked_for(tmp_path):
    """fp32 in the file, bf16 asked for: every number rounded to nearest even."""
    config = even_config()
    values = random_tensors(config)
    loaded = load(write_folder(tmp_path, config, values), dtype=jnp.bfloat16)
    assert_same_bits(loaded.params, config, {k: v.astype(jnp.bfloat16) for k, v in values.items()})


def test_what_may_be_left_out_or_over(tmp_path):
    """A tied checkpoint may still hold lm_head, and old ones hold the rotary frequencies: both pass."""
    config = even_config("gqa", tie_word_embeddings=True)
    values = random_tensors(config)
    more = {
        "lm_head.weight": values["model.language_model.embed_tokens.weight"],
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    assert_same_bits(load(write_folder(tmp_path, config, values | more)).params, config, values)


@pytest.mark.medium
def test_save_and_load(tmp_path):
    """What `save` writes loads as the same model, numbers and tokenizer files."""
    loaded = load("tiny", random_weights=True)
    save(loaded, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.config == loaded.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, loaded.params))
    assert again.processor.tokenizer.encode("seven") == loaded.processor.tokenizer.encode("seven")
    save(again, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.medium
def test_preset_on_a_mesh_has_the_numbers_of_one_device():
    one = load("tiny", random_weights=True)
    many = load("tiny", random_weights=True, mesh=make_mesh(fsdp=4, tensor=2))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool(np.allclose(a, b, atol=1e-6)), one.params, many.params)
    )
    assert many.params["lm_head"]["kernel"].addressable_shards[0].data.shape == (256, 32)


def test_sources_that_are_no_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for source, message in (
        (tmp_path / "absent", f"neither a folder nor a preset ({', '.join(PRESETS)})"),
        ("hugemodel", "neither a folder nor a preset"),
        (file, "a file; a model is a folder with config.json and safetensors"),
        ("tiny", "a preset is a shape without weights; name a model folder, or ask for random weights"),
        (tmp_path, "config.json: no such file"),
    ):
        with pytest.raises(UserError) as caught:
            load(source)
        text = str(caught.value)
        assert text.startswith(str(source)) and message in text and "\n" not in text
    with pytest.raises(UserError, match="random weights are for presets"):
        load(tmp_path, random_weights=True)


@pytest.mark.medium
def test_peak_memory_while_streaming(tmp_path):
    """The host never holds more than the arrays and one stacked parameter, mapped pages of files included.

    240 MB in five files, the largest parameter 42 MB. Slack is 40 MB, for the tensor being read and for
    threads and allocator: 271 MB are seen of 322 allowed; two copies would take 480.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("reads a process's peak memory from Linux's /proc")
    sizes = memory_of_load(wide_folder(tmp_path / "wide"))
    assert sizes["arrays"] > 200e6
    assert sizes["grown"] <= sizes["arrays"] + sizes["largest"] + 40e6
