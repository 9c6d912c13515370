"""Configs: what is read, kept and written back, and what is refused with one clear line."""

import copy
import dataclasses
import json

import pytest

from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig

TEXT = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


def golden_config(golden, name: str) -> dict:
    return json.loads((golden / name / "config.json").read_text())


def assert_kept(written, read, where: str = "") -> None:
    """Everything in the file that was read is in the one that is written, nested objects too."""
    for key, value in read.items():
        assert key in written, f"{where}{key} is lost"
        if isinstance(value, dict) and isinstance(written[key], dict):
            assert_kept(written[key], value, f"{where}{key}.")
        elif value is not None:
            assert written[key] == value, f"{where}{key}"


@pytest.mark.parametrize("name", ["m2la", "gqa"])
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters", "both"])
def test_golden_round_trip(golden, name, style):
    data = golden_config(golden, name)
    text = data["text_config"]
    if style != "rope_scaling":
        text["rope_parameters"] = text["rope_scaling"] | {"rope_theta": text["rope_theta"]}
    if style == "rope_parameters":
        del text["rope_scaling"], text["rope_theta"]
    data["quantization"] = {"kept": [1, {"two": None}]}
    text["an_unknown_field"] = "kept"
    data["vision_config"]["another"] = 3.5
    config = ModelConfig.from_dict(copy.deepcopy(data))
    assert config.text_config.rope_theta == 5e6
    assert config.text_config.mrope_section == (4, 2, 2)
    assert config == ModelConfig.from_dict(golden_config(golden, name))
    assert config.to_dict() == data
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.to_dict() == config.to_dict()
    changed = dataclasses.replace(
        config, text_config=dataclasses.replace(config.text_config, rms_norm_eps=1e-3)
    )
    data["text_config"]["rms_norm_eps"] = 1e-3
    assert_kept(changed.to_dict(), data)
    assert ModelConfig.from_dict(changed.to_dict()) == changed


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_vl"])
def test_transformers_round_trip(kind, tmp_path):
    """What transformers writes reads back, and transformers reads what we write as the same config."""
    transformers = pytest.importorskip("transformers")
    shape = {k: v for k, v in TEXT.items() if k != "model_type"}
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    if kind == "qwen3_vl":
        text = shape | {"rope_parameters": rope | {"mrope_section": [1, 1, 1], "mrope_interleaved": True}}
        vision = dict(depth=2, hidden_size=16, num_heads=2, out_hidden_size=24, deepstack_visual_indexes=[1])
        written = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    else:
        name = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}[kind]
        written = getattr(transformers, name)(**shape, rope_parameters=rope, tie_word_embeddings=True)
    written.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    config = ModelConfig.from_file(tmp_path)
    assert config.text_config.rope_theta == 12345.0
    assert config.text_config.tie_word_embeddings is (kind != "qwen3_vl")
    assert config.to_dict() == data
    # As transformers 4 wrote it, with settings said twice, as null, or at odds with the type's own.
    inner = data["text_config"] if kind == "qwen3_vl" else data
    scaling = {k: v for k, v in inner.pop("rope_parameters").items() if k != "rope_theta"}
    inner |= {"rope_theta": 12345, "rope_scaling": scaling if kind == "qwen3_vl" else None}
    inner |= {"torch_dtype": "bfloat16", "head_dim": None, "sliding_window": None, "qk_nope_head_dim": 0}
    inner["attention_bias"] = kind == "qwen2"
    old = ModelConfig.from_dict(data)
    assert old.text_config == config.text_config
    assert old.to_dict() == data and json.dumps(old.to_dict()) == json.dumps(data)

    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ModelConfig.from_file(tmp_path) == config
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(written)
    before = written.to_dict() | {"_name_or_path": str(tmp_path)}
    assert_kept(again.to_dict(), before)


def changed(data: dict, path: str, value) -> dict:
    """A copy with one key, `a.b` inside objects, set, or removed where the value is `...`."""
    data = copy.deepcopy(data)
    *parents, key = path.split(".")
    inner = data
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "gpt2", "model_type 'gpt2' is not one of internvideo3, internvideo3_text, qwen3_vl,"),
        ("model_type", ..., "model_type None is not one of"),
        ("text_config", ..., "text_config is missing or not an object"),
        ("text_config", [1], "text_config is missing or not an object"),
        ("vision_config", None, "vision_config is missing or not an object"),
        ("text_config.hidden_size", ..., "text_config.hidden_size is missing"),
        ("text_config.hidden_size", "64", "text_config.hidden_size is '64', which is no valid value"),
        ("text_config.hidden_size", True, "text_config.hidden_size is True"),
        ("text_config.num_hidden_layers", 0, "text_config.num_hidden_layers is 0"),
        ("text_config.num_hidden_layers", 2.5, "text_config.num_hidden_layers is 2.5"),
        ("text_config.num_attention_heads", "4", "text_config.num_attention_heads is '4'"),
        ("text_config.rms_norm_eps", "small", "text_config.rms_norm_eps is 'small'.*a number"),
        ("text_config.attention_bias", 1, "text_config.attention_bias is 1.*true or false"),
        (
            "text_config.kv_lora_rank",
            ...,
            "text_config.kv_lora_rank is missing; model_type internvideo3 means M²LA",
        ),
        ("text_config.kv_lora_rank", -8, "text_config.kv_lora_rank is -8"),
        ("text_config.q_lora_rank", 64, "text_config.q_lora_rank = 64 is not supported"),
        ("text_config.qk_latent_layernorm", True, "text_config.qk_latent_layernorm = True is not supported"),
        ("text_config.hidden_act", "gelu", "text_config.hidden_act = 'gelu' is not supported"),
        (
            "text_config.kv_lora_rank_list",
            [24],
            "kv_lora_rank_list has 1 ranks for num_hidden_layers = 4; it needs one for each layer",
        ),
        (
            "text_config.kv_lora_rank_list",
            [23, 8, 9, 10],
            "kv_lora_rank 24 is not the largest rank of kv_lora_rank_list, which is 23",
        ),
        ("text_config.kv_lora_rank_list", [24, 0, 9, 3], "kv_lora_rank_list holds 0; a rank is 1 or more"),
        (
            "text_config.kv_lora_rank_list",
            [24, 9.5, 9, 3],
            "kv_lora_rank_list is .24, 9.5, 9, 3.*a list of integers",
        ),
        ("text_config.latent_adapters", "on", "latent_adapters is 'on'.*true or false"),
        ("text_config.rope_components", 0, "rope_components is 0"),
        (
            "text_config.rope_components",
            3,
            "qk_rope_head_dim 16 is no multiple of 2·rope_components = 6, the dims that turn by one",
        ),
        ("text_config.rope_components", 2, "must be three numbers that sum to half the rotary dim, 4"),
        (
            "text_config.rope_frequency_list",
            [1, 2],
            "rope_frequency_list is .1, 2.*a list of lists of integers",
        ),
        (
            "text_config.rope_frequency_list",
            [[0] * 8],
            "rope_frequency_list has 1 lists for num_hidden_layers",
        ),
        ("text_config.rope_frequency_list", [[0] * 7] * 4, "a list of 7 frequencies; .* means 8 pairs"),
        ("text_config.rope_frequency_list", [[0] * 7 + [8]] * 4, "one of head_dim / 2 = 8, from 0 on"),
        ("text_config.rope_scaling.rope_type", "yarn", "rope type 'yarn' is not supported"),
        ("text_config.rope_scaling.mrope_interleaved", False, "mrope_interleaved must be true"),
        (
            "text_config.rope_scaling.mrope_section",
            [4, 2, 1],
            "mrope_section .4, 2, 1. must be three numbers",
        ),
        ("text_config.rope_scaling.mrope_section", [4, 4], "mrope_section .4, 4. must be three numbers"),
        ("text_config.rope_scaling.mrope_section", 8, "mrope_section"),
        ("text_config.rope_scaling.mrope_section", ["4", "2", "2"], "mrope_section"),
        ("text_config.rope_scaling", "none", "rope_scaling"),
        ("vision_config.depth", ..., "vision_config.depth is missing"),
        ("vision_config.patch_size", [16, 16], "vision_config.patch_size is .16, 16."),
        ("vision_config.deepstack_visual_indexes", 1, "deepstack_visual_indexes is 1.*a list of integers"),
        (
            "vision_config.out_hidden_size",
            65,
            "vision_config.out_hidden_size 65 differs from text_config.hidden_size 64",
        ),
        ("image_token_id", "<image>", "image_token_id"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no'"),
    ],
)
def test_refused(golden, path, value, message):
    """Every refusal is one line that names the file and the field."""
    data = changed(golden_config(golden, "m2la"), path, value)
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_dict(data, "dir/config.json")
    assert str(caught.value).startswith("dir/config.json") and "\n" not in str(caught.value)


CONVERTED = {
    "use_qk_norm": True,
    "kv_lora_rank_list": [24, 7, 12, 3],
    "latent_adapters": True,
    "rope_components": 2,
}


def test_converted_models_round_trip(golden):
    """What conversion adds is read, written, and made in code, with vision and without."""
    data = golden_config(golden, "m2la")
    assert ModelConfig.from_dict(data).text_config.use_qk_norm is False
    data["text_config"] |= CONVERTED
    data["text_config"]["rope_scaling"]["mrope_section"] = [2, 1, 1]
    config = ModelConfig.from_dict(data)
    text = config.text_config
    assert (text.use_qk_norm, text.kv_lora_rank_list, text.latent_adapters) == (True, (24, 7, 12, 3), True)
    assert (text.rope_components, text.rope_dim, text.qk_rope_head_dim) == (2, 8, 16)
    assert config.to_dict() == data
    made = dataclasses.replace(config, source={})
    assert ModelConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == config
    assert [text.of_layer(i).kv_lora_rank for i in range(4)] == [24, 7, 12, 3]
    assert text.of_layer(1).kv_lora_rank_list is None

    alone = ModelConfig("internvideo3_text", dataclasses.replace(text, mrope_section=None))
    written = alone.to_dict()
    assert (written["model_type"], written["kv_lora_rank_list"]) == ("internvideo3_text", [24, 7, 12, 3])
    again = ModelConfig.from_dict(json.loads(json.dumps(written | {"rope_scaling": None})))
    assert again == alone and again.vision_config is None
    stated = ModelConfig("internvideo3_text", text)
    assert ModelConfig.from_dict(stated.to_dict()) == stated


def test_chosen_frequencies_round_trip(golden):
    """M-RoPE's sections are then of all the head's frequencies, and a layer's config has its own list."""
    data = golden_config(golden, "m2la")
    chosen = [[0, 0, 3, 5, 6, 7, 7, 7], [1] * 8, [7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7]]
    data["text_config"]["rope_frequency_list"] = chosen
    config = ModelConfig.from_dict(data)
    text = config.text_config
    assert text.rope_dim == text.head_dim == 16 and config.to_dict() == data
    assert [text.of_layer(i).rope_frequency_list for i in range(4)] == [(tuple(own),) for own in chosen]
    made = dataclasses.replace(config, source={})
    assert ModelConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == config
    data["text_config"]["rope_components"] = 2
    with pytest.raises(UserError, match="rope_frequency_list says what every pair turns by; leave rope_comp"):
        ModelConfig.from_dict(data)


def test_only_latents_have_what_conversion_adds():
    for key, value in (
        ("kv_lora_rank_list", [3, 4]),
        ("latent_adapters", True),
        ("rope_components", 2),
        ("rope_frequency_list", [[0], [0]]),
    ):
        with pytest.raises(UserError, match=rf"config\.json\.{key} = .* is not supported"):
            ModelConfig.from_dict(TEXT | {key: value})
    latent = dict(kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2, use_qk_norm=True)
    data = TEXT | latent | {"model_type": "internvideo3_text", "num_attention_heads": 3}
    with pytest.raises(UserError, match="num_attention_heads 3 is no multiple of num_key_value_heads 2"):
        ModelConfig.from_dict(data)
    with pytest.raises(UserError, match="kv_lora_rank is missing; model_type internvideo3_text means M²LA"):
        ModelConfig.from_dict(TEXT | {"model_type": "internvideo3_text"})


@pytest.mark.parametrize("value", ["24", None, 2.0])
def test_head_width_that_follows_from_a_bad_hidden_size(value):
    """Without head_dim it is hidden_size / heads: a bad hidden_size is still named."""
    data = changed(changed(TEXT, "head_dim", ...), "hidden_size", value)
    with pytest.raises(UserError, match=r"config\.json\.hidden_size is"):
        ModelConfig.from_dict(data)


def test_what_a_text_file_leaves_unsaid():
    data = {k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads")}
    text = ModelConfig.from_dict(data).text_config
    assert (text.head_dim, text.num_key_value_heads, text.rope_theta) == (6, 4, 10000.0)
    assert (text.attention_bias, text.use_qk_norm, text.mrope_section) == (False, False, None)
    qwen2 = ModelConfig.from_dict(TEXT | {"model_type": "qwen2"}).text_config
    assert (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.use_qk_norm) == (True, False, False)
    qwen3 = ModelConfig.from_dict(TEXT | {"model_type": "qwen3", "attention_bias": True}).text_config
    assert (qwen3.attention_bias, qwen3.attention_output_bias, qwen3.use_qk_norm) == (True, True, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "holds no JSON object"),
        (b"", "not valid JSON"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        ModelConfig.from_file(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file; a model folder holds a config\.json"):
        ModelConfig.from_file(tmp_path)
