"""Low-rank additions and files: loading a base, patterns of targets, merging, PEFT's folders and back.

A folder's numbers are compared in the files' own layout: W' = W + alpha/rank·B·A, tensor by tensor.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from models.low_rank import ALPHA, RANK, joined, random_additions
from models.peers import (
    CONVERTED,
    conversation,
    even_config,
    random_tensors,
    tiny_config,
    write_folder,
)
from safetensors.numpy import load_file, save_file

from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.lora import load_adapter, merged, save_adapter
from iv3jax.checkpoint.patterns import resolve
from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import Execution
from iv3jax.models.lora import LEAVES, Lora
from iv3jax.sharding import make_mesh

PREFIX = "base_model.model."


def config_of(kind: str) -> ModelConfig:
    """A tiny config; "ranks" has a rank for each layer, "converted" all that a converted model may have."""
    if kind in CONVERTED or kind == "converted":
        return tiny_config("m2la", **CONVERTED["all" if kind == "converted" else kind])
    return even_config(kind)


def trained(folder, targets: tuple[str, ...] = ("*",), **run) -> LoadedModel:
    """A base model from a folder with additions as if they had been trained."""
    weights = run.pop("weights", None)
    loaded = load(folder, run=Execution(lora=Lora(RANK, ALPHA, targets), **run), weights=weights)
    leaves = {path: x for path, x in flatten_dict(loaded.params).items() if path[-1] not in LEAVES}
    return replace(loaded, params=joined(unflatten_dict(leaves), random_additions(loaded.model)))


def assert_same(got: LoadedModel, expected: LoadedModel) -> None:
    assert got.model == expected.model
    assert jax.tree.structure(got.params) == jax.tree.structure(expected.params)
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


@pytest.mark.parametrize("run", [dict(), dict(scan_layers=False), dict(weights="int8")])
def test_a_base_is_loaded_as_it_is_and_additions_are_new(tmp_path, run):
    config = even_config("gqa")
    write_folder(tmp_path, config, {k: v.astype(jnp.bfloat16) for k, v in random_tensors(config).items()})
    weights = run.pop("weights", None)
    lora = Lora(RANK, ALPHA, ("q_proj", "mlp.down_proj"))
    loaded = load(tmp_path, run=Execution(lora=lora, **run), weights=weights)
    plain = load(tmp_path, run=Execution(**run), weights=weights)
    leaves, others = flatten_dict(loaded.params), flatten_dict(plain.params)
    for path, value in others.items():
        np.testing.assert_array_equal(leaves[path], value)
    added = {path: x for path, x in leaves.items() if path not in others}
    assert {path[-2] for path in added} == {"q_proj", "down_proj"}
    for path, value in added.items():
        assert value.dtype == jnp.float32 and np.any(value) == (path[-1] == "lora_a"), path
    # Rank 0 is no addition.
    none = load(tmp_path, run=Execution(lora=Lora(), **run), weights=weights)
    assert_same(none, plain)


def test_targets():
    """Names of the checkpoint, whole or from a dot on; paths stay; not what is no linear layer."""
    config = tiny_config("m2la", **CONVERTED["all"])

    def targets(*patterns, **given):
        return set(resolve(Lora(RANK, ALPHA, patterns), config, **given).targets)

    attention = "language_model/layers/self_attn"
    assert targets("kv_b_proj", "model.language_model.layers.*.self_attn.q_proj") == {
        f"{attention}/kv_b_proj",
        f"{attention}/q_proj",
    }
    linears = targets("*")
    assert f"{attention}/k_norm_proj" in linears and "lm_head" in linears
    assert not any("q_expand" in path or "kv_adapters" in path or "norm/" in path for path in linears)
    assert targets(*linears) == linears and targets("lm_head", f"{attention}/o_proj") < linears
    assert targets("layers.1.mlp.*", scan_layers=False) == {
        f"language_model/layers_1/mlp/{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
    with pytest.raises(
        UserError, match=r"lora.targets: 'q_prj' names nothing in the model; did you mean 'q_proj'"
    ):
        targets("q_prj")
    with pytest.raises(UserError, match=r"lora.targets: 'q_expand' names nothing"):
        targets("q_expand")
    with pytest.raises(UserError, match=r"some of .*\*.mlp.up_proj without .*layers.1.mlp.up_proj"):
        targets("layers.0.mlp.up_proj")
    assert resolve(None, config) is None and resolve(Lora(), config) is None


@pytest.mark.medium
@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("m2la", dict()),
        ("gqa", dict(scan_layers=False)),
        ("converted", dict()),
        ("ranks", dict(scan_layers=False)),
        ("m2la", dict(weights="nf4")),
        ("gqa", dict(weights="int8")),
    ],
)
def test_adapter_and_merged_weights(tmp_path, kind, run):
    """The exported merged model is the base's files with the adapter's files' B·A added: 1e-6, all fp32.

    Over quantised kernels too: what is added to are the numbers of the original.
    """
    config, values = config_of(kind), random_tensors(config_of(kind))
    write_folder(tmp_path / "base", config, values)
    loaded = trained(tmp_path / "base", **run)
    assert loaded.model.run.weights == run.get("weights")
    save_adapter(loaded, tmp_path / "adapter")
    low = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    together = merged(loaded)
    assert together.model.run.lora is None and together.model.run.weights is None
    assert not any(path[-1] in LEAVES for path in flatten_dict(together.params))
    export(together, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == values.keys()
    changed = set()
    for name, value in values.items():
        module = PREFIX + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in low:
            a, b = low.pop(f"{module}.lora_A.weight"), low.pop(f"{module}.lora_B.weight")
            # As PEFT has them: A and B of a convolution are convolutions, B of one point.
            assert a.shape == (RANK, *value.shape[1:])
            assert b.shape == (len(value), RANK, *[1] * (value.ndim - 2))
            product = b.reshape(-1, RANK).astype(np.float64) @ a.reshape(RANK, -1)
            value = value + ALPHA / RANK * product.reshape(value.shape)
            changed.add(name)
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)
    assert not low
    odd = ("norm", "embed_tokens", "pos_embed", "bias", "q_expand", "kv_adapters")
    assert changed == {
        name for name in values if "k_norm_proj" in name or not any(word in name for word in odd)
    }


@pytest.mark.medium
@pytest.mark.parametrize("attention", ["m2la", "gqa"])
def test_merged_logits(tmp_path, attention):
    """fp32, 1e-5 of the largest; both kinds of attention, with an image."""
    config = even_config(attention)
    write_folder(tmp_path, config, random_tensors(config))
    loaded = trained(tmp_path)
    batch = collate([[conversation(config, [3, ("image", 1, 4, 4), 6])]], config, length=16)

    def logits(loaded: LoadedModel) -> np.ndarray:
        def run(params):
            hidden = loaded.model.apply({"params": params}, batch).hidden
            return loaded.model.apply({"params": params}, hidden, method="logits")

        return np.asarray(jax.jit(run)(loaded.params))

    got, expected = logits(merged(loaded)), logits(loaded)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_merging_keeps_dtype_and_mesh(tmp_path):
    """bf16: the sum in fp32, rounded once; on a mesh, where the kernels lie."""
    config = even_config("gqa")
    write_folder(tmp_path, config, {k: v.astype(jnp.bfloat16) for k, v in random_tensors(config).items()})
    loaded = trained(tmp_path, ("up_proj",))
    mesh = make_mesh(fsdp=4, tensor=2)
    save_adapter(loaded, tmp_path / "adapter")
    split = load_adapter(load(tmp_path, mesh=mesh), tmp_path / "adapter")
    module = ("language_model", "layers", "mlp", "up_proj")
    kernel, a, b = (
        np.asarray(flatten_dict(loaded.params)[*module, name], np.float32) for name in ("kernel", *LEAVES)
    )
    expected = (kernel + ALPHA / RANK * np.einsum("lor,lri->loi", b, a)).astype(jnp.bfloat16)
    one, many = (flatten_dict(merged(m).params)[*module, "kernel"] for m in (loaded, split))
    assert one.dtype == jnp.bfloat16
    np.testing.assert_allclose(one.astype(np.float32), expected.astype(np.float32), rtol=2**-7)
    assert (np.asarray(one) == expected).mean() > 0.99
    np.testing.assert_array_equal(one, many)
    assert many.sharding.is_equivalent_to(flatten_dict(split.params)[*module, "kernel"].sharding, 3)
    assert split.params["language_model"]["layers"]["mlp"]["up_proj"]["lora_a"].sharding.num_devices == 8


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["m2la", "converted"])
def test_an_adapter_comes_back(tmp_path, kind):
    """Bit for bit; also between stacked layers and those that stand alone, and in place of another."""
    config = config_of(kind)
    write_folder(tmp_path / "base", config, random_tensors(config))
    targets = ("self_attn.*", "model.visual.*", "lm_head")
    loaded = trained(tmp_path / "base", targets)
    save_adapter(loaded, tmp_path / "one")
    back = load_adapter(load(tmp_path / "base"), tmp_path / "one")
    assert_same(back, loaded)
    alone = load_adapter(load(tmp_path / "base", run=Execution(scan_layers=False)), tmp_path / "one")
    assert not alone.model.run.scan_layers
    save_adapter(alone, tmp_path / "two")
    assert_same(load_adapter(trained(tmp_path / "base", ("mlp.up_proj",)), tmp_path / "two"), loaded)
    settings = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and (settings["r"], settings["lora_alpha"]) == (RANK, ALPHA)
    held = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {f"{PREFIX}{name}.lora_{x}.weight" for name in settings["target_modules"] for x in "AB"} == set(
        held
    )


def test_adapters_in_bf16_are_read(tmp_path):
    config = even_config("gqa")
    write_folder(tmp_path, config, random_tensors(config))
    save_adapter(trained(tmp_path, ("o_proj",)), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = {name: x.astype(jnp.bfloat16) for name, x in load_file(file).items()}
    save_file(held, file)
    back = load_adapter(load(tmp_path), tmp_path / "adapter")
    got = back.params["language_model"]["layers"]["self_attn"]["o_proj"]["lora_a"]
    name = f"{PREFIX}model.language_model.layers.2.self_attn.o_proj.lora_A.weight"
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(got[2]).reshape(RANK, -1), held[name].astype(np.float32))


def test_errors(tmp_path):
    config = even_config("gqa")
    base = load(write_folder(tmp_path / "base", config, random_tensors(config)))
    with pytest.raises(UserError, match="has no low-rank additions"):
        save_adapter(base, tmp_path / "adapter")
    folder = tmp_path / "adapter"
    save_adapter(trained(tmp_path / "base", ("o_proj", "lm_head")), folder)
    with pytest.raises(UserError, match="is not empty"):
        save_adapter(trained(tmp_path / "base", ("o_proj",)), folder)
    save_adapter(trained(tmp_path / "base", ("o_proj", "lm_head")), folder, replace=True)
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    good, text = load_file(file), settings.read_text()
    for change, expected in (
        (dict(use_rslora=True), "only plain LoRA can be loaded, not use_rslora"),
        (dict(peft_type="IA3"), "not IA3"),
        (dict(init_lora_weights="pissa"), "not init_lora_weights"),
        (dict(r="many"), "not the config of a LoRA adapter"),
    ):
        settings.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(UserError, match=expected):
            load_adapter(base, folder)
    settings.write_text(text)
    layer = f"{PREFIX}model.language_model.layers.1.self_attn.o_proj"
    for change, expected in (
        ({f"{layer}.lora_A.weight": None}, "does not fit the model: .*layers.1.self_attn.o_proj.lora_A"),
        (dict.fromkeys((f"{layer}.lora_A.weight", f"{layer}.lora_B.weight")), "without .*layers.1.self_attn"),
        ({f"{PREFIX}model.nothing.lora_A.weight": np.ones(2)}, "'model.nothing' names nothing"),
        ({f"{layer}.lora_B.weight": np.ones((3, RANK))}, "does not fit the model: .*lora_B"),
    ):
        held = {name: x for name, x in (good | change).items() if x is not None}
        save_file(held, file)
        with pytest.raises(UserError, match=expected):
            load_adapter(base, folder)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_adapter(base, folder)
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors: no such file"):
        load_adapter(base, folder)
    lost = LoadedModel(
        InternVideo3(config, Execution(weights="int8", lora=Lora(2, 4.0, ("lm_head",)))), {}, None, base.mesh
    )
    with pytest.raises(
        UserError, match="int8 weights are merged with the original's, but the model has no folder"
    ):
        merged(lost)
