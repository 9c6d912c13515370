"""The exported folder: every bit of every tensor, and what its small files say and keep."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from models.peers import conversation, even_config, forward, random_tensors, table, tiny_config, write_folder
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import iv3jax
from iv3jax.checkpoint.export import export, summary
from iv3jax.checkpoint.files import INDEX, SINGLE, TensorFiles
from iv3jax.checkpoint.folder import main_dtype
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.write import plan
from iv3jax.data.collate import collate
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.models.config import ModelConfig, TextConfig
from iv3jax.models.layers import Execution
from iv3jax.sharding import make_mesh

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
BITS = {2: np.uint16, 4: np.uint32}


def text_only(kind: str, **changes) -> ModelConfig:
    """A decoder without a tower, of sizes that 2 and 4 devices divide."""
    text = TextConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
    )
    return ModelConfig(kind, replace(text, **changes))


CONFIGS = {
    "m2la": even_config("m2la"),
    "gqa": even_config("gqa"),
    "gqa, tied": even_config("gqa", tie_word_embeddings=True),
    "odd sizes": tiny_config("m2la"),
    "qwen3": text_only("qwen3", use_qk_norm=True),
    "qwen2": text_only("qwen2", attention_bias=True, tie_word_embeddings=True),
    "llama": text_only("llama"),
}


def random_bits(config: ModelConfig, dtypes: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of random bits, so with NaNs of all payloads, infinities and subnormals.

    `dtypes` is one for all, "norms F32" for BF16 elsewhere, or "mixed": one of three for each tensor.
    """
    rng = np.random.default_rng(seed)

    def pick(name: str) -> str:
        if dtypes == "norms F32":
            return "F32" if "norm" in name else "BF16"
        return str(rng.choice(list(DTYPES))) if dtypes == "mixed" else dtypes

    values = {}
    for tensor in table(config):
        dtype = np.dtype(DTYPES[pick(tensor.name)])
        bits = rng.integers(0, 2 ** (8 * dtype.itemsize), tensor.shape, BITS[dtype.itemsize])
        values[tensor.name] = bits.view(dtype)
    return values


def assert_same(folder: Path, values: dict[str, np.ndarray]) -> None:
    """The files of a folder, read by safetensors itself, hold exactly these tensors."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held = load_file(path)
        assert not held.keys() & found.keys()
        found |= held
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        kind = BITS[value.itemsize]
        np.testing.assert_array_equal(found[name].view(kind), value.view(kind), err_msg=name)


@pytest.mark.parametrize("dtypes", [*DTYPES, "norms F32", "mixed"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_round_trip(tmp_path, name, dtypes):
    """Hugging Face → iv3jax → Hugging Face: every tensor bit for bit in its own dtype."""
    values = random_bits(CONFIGS[name], dtypes)
    done = export(write_folder(tmp_path / "in", CONFIGS[name], values, shards=3), tmp_path / "out")
    assert_same(tmp_path / "out", values)
    assert done.tensors == len(values) and done.nbytes == sum(v.nbytes for v in values.values())
    assert sorted(done.files) == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert load(tmp_path / "out").config == CONFIGS[name]


@pytest.mark.parametrize("dtypes", ["BF16", "mixed"])
@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_round_trip_over_eight_devices(tmp_path, dtypes, mesh, scan_layers):
    """Parameters in parts, stacked or layer by layer: no part is lost, none written twice."""
    config = CONFIGS["m2la"]
    values = random_bits(config, dtypes)
    folder = write_folder(tmp_path / "in", config, values)
    loaded = load(folder, mesh=make_mesh(**mesh), run=Execution(scan_layers=scan_layers))
    export(loaded, tmp_path / "out", max_shard_size=20_000)
    assert_same(tmp_path / "out", values)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_golden_folders(golden, tmp_path):
    """PyTorch's own files come back as the same tensors, and config.json with all it said."""
    for name in ("m2la", "gqa"):
        iv3jax.export(golden / name, tmp_path / name, max_shard_size="200KB")
        assert_same(tmp_path / name, load_file(golden / name / "model.safetensors"))
        data = json.loads((golden / name / "config.json").read_text())
        written = json.loads((tmp_path / name / "config.json").read_text())
        ours = {"architectures", "auto_map", "dtype"} if name == "m2la" else {"architectures", "dtype"}
        assert {k: v for k, v in written.items() if k not in ours} == {
            k: v for k, v in data.items() if k not in ours
        }


def test_shards_and_index(tmp_path):
    """Files of at most the size asked for, a larger tensor alone; layers in order; a complete index."""
    config = tiny_config("m2la")
    values = random_tensors(config)
    limit = 20_000
    assert max(v.nbytes for v in values.values()) < limit
    export(write_folder(tmp_path / "in", config, values), tmp_path / "out", max_shard_size=limit)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert index["weight_map"].keys() == values.keys() and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values())
    sizes = []
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert all(index["weight_map"][name] == file for name in held)
        sizes.append(sum(v.nbytes for v in held.values()))
    assert max(sizes) <= limit
    # Greedy: the next file's first tensor did not fit any more.
    assert all(a + max(v.nbytes for v in values.values()) > limit for a in sizes[:-1])
    # A layer lies in one file or two neighbours, as readers that load layer by layer want it.
    for i in range(3):
        of_layer = {f for name, f in index["weight_map"].items() if f"language_model.layers.{i}." in name}
        numbers = sorted(files.index(f) for f in of_layer)
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
    export(tmp_path / "in", tmp_path / "small", max_shard_size=10)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) == len(values)
    assert_same(tmp_path / "small", values)
    export(tmp_path / "in", tmp_path / "one")
    assert (tmp_path / "one" / SINGLE).exists() and not (tmp_path / "one" / INDEX).exists()


@pytest.mark.parametrize("word", ["bfloat16", "float16", "float32"])
def test_dtype_asked_for(tmp_path, word):
    """Every number rounded to nearest even, and the configs say so."""
    config = even_config()
    values = random_tensors(config)
    values = {k: v.astype(np.float16) if "mlp" in k else v for k, v in values.items()}
    export(write_folder(tmp_path / "in", config, values), tmp_path / "out", dtype=word)
    assert_same(tmp_path / "out", {k: v.astype(jnp.dtype(word)) for k, v in values.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == word
    assert load(tmp_path / "out").model.run.dtype == jnp.dtype(word)


@pytest.mark.medium
@pytest.mark.parametrize("dtypes", ["norms F32", "mixed"])
def test_a_mixed_checkpoint_computes(tmp_path, dtypes):
    """Layers in the dtype of most bytes, numbers as of the widest: close to the same weights in fp32."""
    config = even_config()
    dtype_of = {name: value.dtype for name, value in random_bits(config, dtypes).items()}
    values = {k: (0.5 * v).astype(dtype_of[k]) for k, v in random_tensors(config).items()}
    loaded = load(write_folder(tmp_path / "in", config, values))
    written = plan(loaded)
    assert {name: DTYPES[tensor.dtype] for name, tensor in written.items()} == dtype_of
    assert jnp.dtype(loaded.model.run.dtype) == DTYPES[main_dtype(written.values())]
    reference = load(tmp_path / "in", dtype=jnp.float32)
    batch = collate([[conversation(config, [9, ("image", 1, 4, 4), 3])]], config, length=32)
    got, expected = (forward(m.model, m.params, batch)["logits"] for m in (loaded, reference))
    # bf16 keeps three digits; logits are of order 1.
    assert float(jnp.abs(got - expected).max()) < 0.1
    assert float(jnp.abs(expected).max()) > 0.5


def test_changed_parameters_are_rounded_to_the_dtypes_of_the_files(tmp_path):
    """A model that was trained after it was loaded with mixed dtypes."""
    config = even_config("gqa")
    dtype_of = {name: value.dtype for name, value in random_bits(config, "mixed").items()}
    values = {k: v.astype(dtype_of[k]) for k, v in random_tensors(config).items()}
    loaded = load(write_folder(tmp_path / "in", config, values))
    trained = jax.tree.map(lambda x: x * 1.37 + 0.01 if x.dtype == jnp.float32 else x, loaded.params)
    export(replace(loaded, params=trained), tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE)
    assert {k: v.dtype for k, v in found.items()} == dtype_of
    changed = [k for k in values if not np.array_equal(found[k], values[k])]
    assert changed
    for name in changed:
        expected = values[name].astype(np.float32) * np.float32(1.37) + np.float32(0.01)
        np.testing.assert_allclose(found[name].astype(np.float32), expected, rtol=2**-7, atol=1e-3)


def test_what_is_left_out(tmp_path):
    """Repetitions: a tied head that is the embedding, and rotary frequencies. Any other head is refused."""
    config = even_config("gqa", tie_word_embeddings=True)
    values = random_tensors(config)
    head = {"lm_head.weight": values["model.language_model.embed_tokens.weight"]}
    more = head | {"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    export(write_folder(tmp_path / "in", config, values | more), tmp_path / "out")
    assert_same(tmp_path / "out", values)
    write_folder(tmp_path / "in", config, values | {"lm_head.weight": head["lm_head.weight"] + 1})
    with pytest.raises(iv3jax.errors.UserError, match=r"lm_head\.weight differs from .*tie_word_embeddings"):
        load(tmp_path / "in")


@pytest.mark.medium
def test_a_complete_folder(tmp_path):
    """What `tiny` with its tokenizer gives, file by file."""
    done = export("tiny", tmp_path / "out", random_weights=True)
    out = tmp_path / "out"
    code = [f"{name}_internvideo3.py" for name in ("configuration", "modeling", "processing")]
    for name in (
        *("config.json", "generation_config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json"),
        *("processor_config.json", *code),
    ):
        assert (out / name).is_file() and name in done.files
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["InternVideo3ForConditionalGeneration"]
    for target in config["auto_map"].values():
        module, _, cls = target.partition(".")
        assert f"class {cls}(" in (out / f"{module}.py").read_text()
    loaded = load("tiny", random_weights=True)
    stop = list(loaded.processor.tokenizer.stop_ids)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == stop
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        data, source = (json.loads((folder / name).read_text()) for folder in (out, TINY_FOLDER))
        assert data["size"] == source["size"] and data["patch_size"] == 16
    assert load(out).processor.tokenizer.to_json() == (TINY_FOLDER / "tokenizer.json").read_text()
    assert f"tensors  {done.tensors} of" in summary(done) and "bit for bit" in summary(done)
    # No odd permissions, as a folder made for a temporary purpose would have.
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def with_tokenizer(folder: Path, config: ModelConfig, **files: dict | str) -> Path:
    """A model folder with the tiny tokenizer and other files, `a__json` standing for a.json."""
    write_folder(folder, config, random_tensors(config))
    (folder / "tokenizer.json").write_bytes((TINY_FOLDER / "tokenizer.json").read_bytes())
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def vision_config() -> ModelConfig:
    """A GQA model with the tiny tokenizer's ids."""
    ids = dict(zip(("image", "video", "vision_start", "vision_end"), range(508, 512), strict=True))
    config = even_config("gqa", vocab_size=512)
    return replace(config, **{f"{name}_token_id": index for name, index in ids.items()})


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_files_of_the_source_are_kept(tmp_path):
    """Chat template, settings of generation, tokenizer and processor, licence: the source's own."""
    config = vision_config()
    folder = with_tokenizer(
        tmp_path / "in",
        config,
        generation_config__json={"temperature": 0.7, "top_k": 20, "eos_token_id": 507, "odd": [1]},
        chat_template__jinja="{{ messages }}",
        tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer", "odd": 1, "auto_map": {"A": "code.A"}},
        preprocessor_config__json={
            "min_pixels": 4096,
            "max_pixels": 65536,
            "patch_size": 14,
            "do_resize": True,
        },
        video_preprocessor_config__json={"size": {"shortest_edge": 99, "longest_edge": 12345}, "fps": 3},
        processor_config__json={"image_seq_length": 5, "auto_map": {"AutoProcessor": "code.P"}},
        merges__txt="#version",
        vocab__json="{}",
        special_tokens_map__json="{}",
        LICENSE="Apache",
        LICENSE__txt="too",
        training_args__bin="no",
        code__py="raise SystemExit",
    )
    export(folder, out := tmp_path / "out")
    assert read(out, "generation_config.json") == {
        "temperature": 0.7,
        "top_k": 20,
        "eos_token_id": [507, 505],
        "odd": [1],
        "pad_token_id": 505,
    }
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    settings = {"tokenizer_class": "Qwen2Tokenizer", "odd": 1, "processor_class": "Qwen3VLProcessor"}
    assert read(out, "tokenizer_config.json") == settings
    image = read(out, "preprocessor_config.json")
    assert image["size"] == {"shortest_edge": 4096, "longest_edge": 65536}
    # config.json is right about the patch size (SPEC §4), and older names win over `size`.
    assert (image["patch_size"], image["min_pixels"], image["do_resize"]) == (2, 4096, True)
    video = read(out, "video_preprocessor_config.json")
    assert (video["fps"], video["size"]["longest_edge"], video["min_frames"]) == (3, 12345, 4)
    assert read(out, "processor_config.json") == {"image_seq_length": 5}
    assert read(out, "config.json")["architectures"] == ["Qwen3VLForConditionalGeneration"]
    copied = {"merges.txt", "vocab.json", "special_tokens_map.json", "LICENSE", "LICENSE.txt"}
    names = {p.name for p in out.iterdir()}
    assert copied <= names and not names & {"training_args.bin", "code.py", *_remote_code()}
    for name in copied:
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def _remote_code() -> set[str]:
    from iv3jax.checkpoint import remote_code

    return set().union(*remote_code.FILES.values())


def test_processor_settings_as_transformers_5_nests_them(tmp_path):
    """They are read, as by transformers, before the two files, and then stated once, in those."""
    nested = {
        "image_processor": {"size": {"shortest_edge": 5000, "longest_edge": 60000}, "do_rescale": True},
        "video_processor": {"size": {"shortest_edge": 4097, "longest_edge": 70000}, "fps": 5},
        "processor_class": "Qwen3VLProcessor",
    }
    config = vision_config()
    folder = with_tokenizer(tmp_path / "in", config, processor_config__json=nested)
    processor = Processor.from_dir(folder, config)
    assert (processor.image_pixels, processor.video_pixels) == ((5000, 60000), (4097, 70000))
    assert processor.fps == 5
    export(folder, out := tmp_path / "out")
    assert read(out, "processor_config.json") == {"processor_class": "Qwen3VLProcessor"}
    assert read(out, "preprocessor_config.json")["size"] == nested["image_processor"]["size"]
    assert read(out, "preprocessor_config.json")["do_rescale"] is True
    assert Processor.from_dir(out, config).video_pixels == (4097, 70000)


@pytest.mark.parametrize("place", ["tokenizer_config__json", "chat_template__json"])
def test_a_template_elsewhere_is_not_doubled(tmp_path, place):
    folder = with_tokenizer(tmp_path / "in", vision_config(), **{place: {"chat_template": "{{ 1 }}"}})
    export(folder, out := tmp_path / "out")
    assert not (out / "chat_template.jinja").exists()
    assert read(out, place.replace("__", "."))["chat_template"] == "{{ 1 }}"


def test_text_only_with_another_tokenizer(tmp_path):
    """A tokenizer without chat tokens is the source's affair: copied, with its own ends of generation."""
    config = text_only("llama", vocab_size=24)
    foreign = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    folder = write_folder(tmp_path / "in", config, random_tensors(config))
    data = read(folder, "config.json") | {"eos_token_id": 2, "bos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(data))
    (folder / "tokenizer.json").write_text(json.dumps(foreign))
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    export(folder, out := tmp_path / "out")
    assert read(out, "tokenizer.json") == foreign and (out / "tokenizer.model").read_bytes() == b"\x00\x01"
    assert read(out, "generation_config.json") == {"eos_token_id": [2]}
    assert read(out, "config.json")["architectures"] == ["LlamaForCausalLM"]
    assert not (out / "chat_template.jinja").exists()


def test_without_a_tokenizer_we_know(tmp_path):
    """Older forms of tokenizer and processor files are copied with what names them."""
    files = {
        "vocab.json": "{}",
        "merges.txt": "#",
        "preprocessor_config.json": '{"size": {"shortest_edge": 1}}',
        "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": false}',
    }
    folder = write_folder(tmp_path / "in", vision_config(), random_tensors(vision_config()))
    for name, text in files.items():
        (folder / name).write_text(text)
    assert "no tokenizer.json" in summary(export(folder, out := tmp_path / "out"))
    for name in ("vocab.json", "merges.txt", "preprocessor_config.json"):
        assert (out / name).read_text() == files[name]
    expected = json.loads(files["tokenizer_config.json"]) | {"processor_class": "Qwen3VLProcessor"}
    assert read(out, "tokenizer_config.json") == expected


def test_text_only_with_chat_tokens(tmp_path):
    config = text_only("qwen3", vocab_size=512, use_qk_norm=True)
    folder = with_tokenizer(tmp_path / "in", config, generation_config__json={"eos_token_id": [3, 505]})
    export(folder, out := tmp_path / "out")
    assert read(out, "generation_config.json")["eos_token_id"] == [3, 505, 507]
    assert "<|im_start|>" in (out / "chat_template.jinja").read_text()
    assert "processor_class" not in read(out, "tokenizer_config.json")
    assert not (out / "preprocessor_config.json").exists()


def test_real_vocabulary_without_a_tokenizer(tmp_path):
    """The stop ids of SPEC §5 are known from the vocabulary's image token."""
    config = replace(even_config(), image_token_id=151655)
    export(write_folder(tmp_path / "in", config, random_tensors(config)), tmp_path / "out")
    assert read(tmp_path / "out", "generation_config.json")["eos_token_id"] == [151645, 151643]


def test_dtypes_in_the_config(tmp_path):
    """Each key that names a dtype, at every level, names the one of most bytes; null stays null."""
    config = even_config()
    folder = write_folder(tmp_path / "in", config, random_bits(config, "norms F32"))
    data = read(folder, "config.json") | {"torch_dtype": "float32"}
    data["text_config"] |= {"dtype": "float32", "torch_dtype": None}
    (folder / "config.json").write_text(json.dumps(data))
    export(folder, tmp_path / "out")
    written = read(tmp_path / "out", "config.json")
    assert written["torch_dtype"] == written["text_config"]["dtype"] == "bfloat16"
    assert written["text_config"]["torch_dtype"] is None and "dtype" not in written


def test_replace_and_in_memory(tmp_path):
    """What training does: a model in memory over an older folder, its own too."""
    config = even_config()
    first = load(write_folder(tmp_path / "m", config, random_tensors(config)))
    (tmp_path / "m" / "junk").touch()
    export(first, tmp_path / "m", replace=True)
    assert not (tmp_path / "m" / "junk").exists()
    export(replace(first, folder=None), tmp_path / "m", dtype="bfloat16", replace=True)
    assert TensorFiles(tmp_path / "m").dtype("lm_head.weight") == "BF16"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_arrays_of_other_devices_leave_no_copy_on_the_host(tmp_path, monkeypatch):
    """jax keeps what it once brought to the host, so arrays that live elsewhere are not asked themselves."""
    config = even_config()
    loaded = load(write_folder(tmp_path / "in", config, values := random_tensors(config)))
    monkeypatch.setattr("iv3jax.checkpoint.write._on_cpu", lambda data: False)
    export(loaded, tmp_path / "out", max_shard_size="30KB")
    assert_same(tmp_path / "out", values)
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(loaded.params))


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    """Blocks are handed out one by one, and on a CPU they are views of the parameters where axes stay."""
    config = even_config()
    loaded = load(write_folder(tmp_path, config, random_tensors(config)))
    planned = plan(loaded)
    block = next(planned["model.language_model.embed_tokens.weight"].blocks())
    assert np.shares_memory(block, np.asarray(loaded.params["embed_tokens"]["embedding"]))


def test_files_that_were_damaged_are_noticed(tmp_path, monkeypatch):
    """The check at the end compares what lies on the disk, and a folder that fails it does not appear."""
    import iv3jax.checkpoint.export as module

    config = even_config()
    folder = write_folder(tmp_path / "in", config, random_tensors(config))
    whole = module.write

    def damaged(planned, limit, open_file):
        names = whole(planned, limit, open_file)
        path = next(tmp_path.glob("out.*.part")) / names[0]
        values = load_file(path)
        values["lm_head.weight"].view(np.uint32)[3, 2] ^= 1
        save_file(values, path)
        return names

    monkeypatch.setattr(module, "write", damaged)
    with pytest.raises(iv3jax.errors.UserError, match=r"lm_head\.weight reads back with other numbers"):
        export(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
