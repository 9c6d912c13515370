"""assemble: a whole model or nothing; untouched tensors bit for bit; the same bytes from the same steps."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import IO

import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import even_config, random_tensors, write_folder
from safetensors.numpy import load_file

from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.files import TensorFiles
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.target import LocalTarget
from iv3jax.conversion.assemble import assemble, save_tensors
from iv3jax.conversion.source import Source
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, init_params
from iv3jax.models.presets import preset
from iv3jax.sharding import make_mesh

GQA = even_config("gqa")
LATENT = dict(kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, attention_bias=True)
RICH = dict(kv_lora_rank_list=(7, 10, 9), latent_adapters=True)


def target_of(config: ModelConfig, **text) -> ModelConfig:
    """A converted model's config."""
    kind = "internvideo3" if config.vision_config else "internvideo3_text"
    own = replace(config.text_config, use_qk_norm=False, **{**LATENT, **text})
    return replace(config, model_type=kind, text_config=own)


def write_steps(folder: Path, values: dict[str, np.ndarray]) -> list[Path]:
    """One step for each layer's attention."""
    steps = []
    for i in range(3):
        steps.append(folder / f"layer_{i:02}")
        steps[-1].mkdir(parents=True)
        part = f".layers.{i}.self_attn."
        save_tensors(steps[-1], {name: value for name, value in values.items() if part in name})
    return steps


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (GQA, {}),
        (GQA, RICH),
        (even_config("gqa", tie_word_embeddings=True), {}),
        (ModelConfig("qwen2", replace(GQA.text_config, mrope_section=None, attention_bias=True)), RICH),
    ],
    ids=["vision", "ranks and adapters", "tied", "text only"],
)
def test_the_folder_holds_the_steps_and_the_rest_of_the_source(source, text, tmp_path):
    if source.vision_config is None:
        source = replace(source, text_config=replace(source.text_config, use_qk_norm=False))
    old = random_tensors(source)
    # Of both dtypes, so that nothing is cast on the way.
    old |= {name: value.astype(jnp.bfloat16) for name, value in old.items() if "mlp" in name}
    config = target_of(source, **text)
    new = random_tensors(config, seed=1)
    steps = write_steps(tmp_path / "work", new)
    opened = Source.open(write_folder(tmp_path / "in", source, old, shards=2))
    done = assemble(opened, config, steps, tmp_path / "out", extra_files={"conversion.json": b"{}\n"})

    assert sorted(done.files) == sorted(contents(tmp_path / "out"))
    assert contents(tmp_path / "out")["conversion.json"] == b"{}\n"
    meant = {name: new[name] if "self_attn" in name else old[name] for name in new}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == meant.keys()
    for name, value in meant.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name].view(np.uint8), value.view(np.uint8), err_msg=name)
    loaded = load(tmp_path / "out")
    assert loaded.config == config

    again = assemble(
        opened, config, reversed(steps), tmp_path / "again", extra_files={"conversion.json": b"{}\n"}
    )
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert replace(again, folder=done.folder) == done


@pytest.mark.medium
def test_tokenizer_and_processor_files_come_along(tmp_path):
    config = preset("tiny_gqa")
    model, mesh = InternVideo3(config), make_mesh()
    params = init_params(model, jnp.zeros(2, jnp.uint32))
    export(LoadedModel(model, params, TINY_FOLDER, mesh), tmp_path / "in")
    source = Source.open(tmp_path / "in")
    target = target_of(config, kv_lora_rank=40, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32)
    steps = write_steps(tmp_path / "work", random_tensors(target))
    done = assemble(source, target, steps, tmp_path / "out", max_shard_size="500KB")
    assert sum(name.endswith(".safetensors") for name in done.files) > 2
    assert {"tokenizer.json", "preprocessor_config.json", "modeling_internvideo3.py"} <= set(done.files)
    written, meant = load(tmp_path / "out").processor, load(tmp_path / "in").processor
    assert replace(written, tokenizer=meant.tokenizer, config=config) == meant


@pytest.fixture
def converted(tmp_path) -> tuple[Source, ModelConfig, list[Path]]:
    config = target_of(GQA)
    source = Source.open(write_folder(tmp_path / "in", GQA, random_tensors(GQA)))
    return source, config, write_steps(tmp_path / "work", random_tensors(config))


def test_whole_or_not_at_all(converted, tmp_path, monkeypatch):
    out, before = tmp_path / "out", sorted(tmp_path.iterdir())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        assemble(*converted, tmp_path / "taken")
    with pytest.raises(UserError, match="is no size"):
        assemble(*converted, out, max_shard_size="huge")

    opened, read = Path.open, TensorFiles.read

    def full(path: Path, mode: str = "r", *how, **options) -> IO:
        if mode == "wb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *how, **options)

    def interrupted(target: LocalTarget) -> None:
        raise KeyboardInterrupt("stopped")

    def damaged(files: TensorFiles, name: str) -> np.ndarray:
        return read(files, name) * (files.folder.suffix != ".part")

    for owner, method, instead, error in (
        (Path, "open", full, "out: cannot be written: No space left on device"),
        (LocalTarget, "finish", interrupted, "stopped"),
        (TensorFiles, "read", damaged, "reads back with other numbers"),
    ):
        with monkeypatch.context() as patch, pytest.raises((UserError, KeyboardInterrupt), match=error):
            patch.setattr(owner, method, instead)
            assemble(*converted, out)
        assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "taken"])
    assemble(*converted, out)


def test_steps_that_do_not_make_a_model(converted, tmp_path):
    source, config, steps = converted
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn.* only"):
        assemble(source, config, steps[:2], tmp_path / "out")
    with pytest.raises(ValueError, match="is there already"):
        assemble(source, config, [*steps, steps[0]], tmp_path / "out")
    with pytest.raises(ValueError, match=r"kv_a_proj_with_mqa.* is \(18,.* instead of \(19,"):
        assemble(source, target_of(GQA, kv_lora_rank=11), steps, tmp_path / "out")
    assert not (tmp_path / "out").exists()
