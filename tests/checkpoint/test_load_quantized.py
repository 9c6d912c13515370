"""Loading with `weights`: the codes of the loaded weights, anywhere, streamed; and its errors."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import (
    ATTENTIONS,
    conversation,
    difference,
    even_config,
    memory_of_load,
    random_tensors,
    wide_folder,
    write_folder,
)

from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.shapes import model_shapes
from iv3jax.cli import main
from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.models.layers import Execution
from iv3jax.models.quantized import FORMATS, quantize
from iv3jax.sharding import make_mesh


def leaves(params) -> dict[tuple[str, ...], np.ndarray]:
    """Path → array."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {tuple(key.key for key in path): np.asarray(value) for path, value in flat}


def assert_quantised(got, loose, weights: str) -> None:
    """Each kernel's codes and scales are those of the loaded kernel, all else is what was loaded."""
    got, loose = leaves(got), leaves(loose)
    for path, value in loose.items():
        if path[-1] != "kernel":
            np.testing.assert_array_equal(got.pop(path), value)
            continue
        codes, scale = (got.pop((*path[:-1], name)) for name in ("kernel_codes", "kernel_scale"))
        # Only a stack has an axis before those of its codes: (K, *out) beside (groups, *out).
        stacked = {"layers", "blocks", "deepstack_merger_list"} & set(path)
        layers = zip(value, codes, scale, strict=True) if stacked else [(value, codes, scale)]
        for layer, own_codes, own_scale in layers:
            outputs = own_scale.ndim - 1
            inputs_first = np.moveaxis(layer, range(outputs), range(-outputs, 0))
            expected = quantize(inputs_first, layer.ndim - outputs, weights)
            np.testing.assert_array_equal(own_codes, expected[0], err_msg=str(path))
            np.testing.assert_array_equal(own_scale, expected[1], err_msg=str(path))
    assert not got


@pytest.mark.parametrize(
    ("attention", "weights", "dtype", "scan_layers"),
    [
        ("m2la", "int8", jnp.float32, True),
        ("m2la", "nf4", jnp.bfloat16, True),
        ("m2la", "nf4", jnp.float32, False),
        ("gqa", "int8", jnp.bfloat16, False),
    ],
)
def test_the_codes_of_the_loaded_weights(tmp_path, attention, weights, dtype, scan_layers):
    config = even_config(attention, tie_word_embeddings=attention == "gqa")
    values = {k: v.astype(dtype) for k, v in random_tensors(config).items()}
    write_folder(tmp_path, config, values, shards=3)
    run = Execution(scan_layers=scan_layers)
    loaded = load(tmp_path, weights=weights, run=run)
    assert loaded.model.run.weights == weights and loaded.model.run.dtype == dtype
    assert_quantised(loaded.params, load(tmp_path, run=run).params, weights)


def test_codes_are_made_from_the_numbers_in_the_file(tmp_path):
    """bf16 asked for, fp32 in the file: nothing is rounded twice."""
    config = even_config()
    write_folder(tmp_path, config, random_tensors(config))
    got = leaves(load(tmp_path, weights="int8", dtype=jnp.bfloat16).params)
    full = leaves(load(tmp_path, weights="int8").params)
    for path, value in got.items():
        expected = full[path]
        np.testing.assert_array_equal(
            value, expected.astype(jnp.bfloat16) if value.dtype == jnp.bfloat16 else expected
        )


@pytest.mark.medium
@pytest.mark.parametrize(
    ("attention", "weights", "mesh", "scan_layers"),
    [
        ("m2la", "int8", {"fsdp": 4, "tensor": 2}, True),
        ("m2la", "nf4", {"fsdp": 2, "tensor": 4}, False),
        ("gqa", "nf4", {"fsdp": 4, "tensor": 2}, True),
        ("gqa", "int8", {"data": 2, "context": 2, "tensor": 2}, False),
    ],
)
def test_a_mesh_holds_and_computes_the_same(tmp_path, attention, weights, mesh, scan_layers):
    """fp32 logits, 1e-4 on order 1: sums run in another order. Codes are split as kernels are."""
    config = even_config(attention)
    write_folder(tmp_path, config, random_tensors(config))
    run = Execution(scan_layers=scan_layers)
    one = load(tmp_path, weights=weights, run=run)
    many = load(tmp_path, weights=weights, run=run, mesh=make_mesh(**mesh))
    for path, value in leaves(one.params).items():
        np.testing.assert_array_equal(leaves(many.params)[path], value)
    layers = many.params["language_model"]
    mlp = (layers["layers"] if scan_layers else layers["layers_1"])["mlp"]["down_proj"]
    packed = 2 if weights == "nf4" else 1
    parts = mesh["tensor"] * packed, mesh.get("fsdp", 1) * mesh.get("context", 1)
    assert mlp["kernel_codes"].addressable_shards[0].data.shape[-2:] == (32 // parts[0], 24 // parts[1])
    assert mlp["kernel_scale"].addressable_shards[0].data.shape[-2:] == (1, 24 // parts[1])
    samples = [conversation(config, [2, ("video", 2, 4, 4), 3], seed) for seed in range(4)]
    batch = collate([[s] for s in samples], config, length=32)

    def logits(loaded):
        def run(params):
            hidden = loaded.model.apply({"params": params}, batch).hidden
            return loaded.model.apply({"params": params}, hidden, method="logits")

        with jax.set_mesh(loaded.mesh):
            return jax.jit(run)(loaded.params)

    assert difference(logits(many), logits(one)) <= 1e-4


@pytest.mark.medium
def test_a_preset_with_random_codes():
    loaded = load("tiny", random_weights=True, weights="nf4")
    assert loaded.params["lm_head"]["kernel_codes"].shape == (64, 512)
    assert sum(x.nbytes for x in jax.tree.leaves(loaded.params)) < model_shapes("tiny").weight_bytes / 2


@pytest.mark.parametrize(
    ("attention", "weights", "expected"),
    [("m2la", "int8", 10.25e9), ("m2la", "nf4", 5.96e9), ("gqa", "int8", 9.52e9), ("gqa", "nf4", 5.58e9)],
)
def test_8b_fits_a_device_of_16_gb(attention, weights, expected):
    """Weights and a cache of 32 K tokens leave 3 GB and more for activations."""
    shapes = model_shapes("internvideo3_8b" if attention == "m2la" else "qwen3_vl_8b", weights)
    assert shapes.weight_bytes == pytest.approx(expected, rel=1e-3)
    assert shapes.weight_bytes + 32768 * shapes.cache_bytes_per_token < 15e9


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bytes_are_those_of_the_arrays(tmp_path, attention):
    config = even_config(attention)
    values = {k: v.astype(jnp.bfloat16) for k, v in random_tensors(config).items()}
    write_folder(tmp_path, config, values)
    for weights in (None, *FORMATS):
        held = sum(x.nbytes for x in jax.tree.leaves(load(tmp_path, weights=weights).params))
        assert model_shapes(tmp_path, weights).weight_bytes == held


def test_errors(tmp_path, capsys):
    config = even_config()
    values = random_tensors(config)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    values[name][3, 4] = np.nan
    folder = write_folder(tmp_path / "model", config, values)
    with pytest.raises(UserError, match="weights 'int4' are not one of int8, nf4"):
        load(folder, weights="int4")
    with pytest.raises(UserError) as caught:
        load(folder, weights="nf4")
    text = str(caught.value)
    assert str(folder) in text and f"{name}: holds weights that are not finite" in text and "\n" not in text
    for argv in (["ask", "clip.mp4", "what?", "--model", str(folder)], ["shapes", "tiny"]):
        assert main([*argv, "--weights", "int4"]) == 2
        assert capsys.readouterr().err == "iv3: error: weights 'int4' are not one of int8, nf4\n"


@pytest.mark.medium
def test_peak_memory_while_streaming(tmp_path):
    """The host never holds more than the quantised arrays, one parameter and the largest tensor as it lies.

    240 MB of fp32 with embeddings and head of 41 MB each become 67 MB; slack is 40 MB, as in test_load.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("reads a process's peak memory from Linux's /proc")
    sizes = memory_of_load(wide_folder(tmp_path / "wide"), weights="nf4")
    largest = 16000 * 640 * 4
    assert sizes["arrays"] < 70e6
    assert sizes["grown"] <= sizes["arrays"] + largest + 40e6
