"""Exports in transformers' own classes against our model: logits, greedy tokens; `iv3 export --verify`.

fp32, 2e-4 on logits of order 1 to 10; about 1e-6 is seen. What InternVideo3's own code computes is tested in
test_remote_code.py.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint.remote import modules  # noqa: F401
from models.peers import (
    conversation,
    difference,
    even_config,
    forward,
    random_tensors,
    torch_forward,
    torch_inputs,
    write_folder,
)
from safetensors.numpy import load_file, save_file

from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.verify import verify
from iv3jax.cli import main
from iv3jax.data.chat import render
from iv3jax.data.collate import collate
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.errors import UserError
from iv3jax.generate.generate import generate
from iv3jax.models.config import ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-4
CASES = {
    "text": [19],
    "image": [3, ("image", 1, 4, 8), 4],
    "video": [2, ("video", 3, 4, 6), 3],
    "mixed": [1, ("video", 2, 4, 6), 5, ("image", 1, 6, 4), ("image", 1, 4, 4), 3],
}
STOCK = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def gqa_config() -> ModelConfig:
    """Sizes of our own choice, written as a config.json by us."""
    return even_config("gqa")


def random_folder(folder: Path, config: ModelConfig) -> Path:
    """A source whose head never names a placeholder, so that what is generated is text."""
    values = random_tensors(config)
    values["lm_head.weight"][config.image_token_id :] = 0
    return write_folder(folder, config, values)


def stock_model(folder: Path, kind: str):
    """transformers' own class, with every tensor of the folder and no other."""
    cls = getattr(transformers, STOCK[kind])
    model, found = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert type(model).__module__.startswith("transformers.models.")
    return model.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A GQA model loaded by us, and its export in Qwen3VLForConditionalGeneration."""
    root = tmp_path_factory.mktemp("gqa")
    loaded = load(random_folder(root / "in", gqa_config()))
    export(loaded, root / "out", max_shard_size="20KB")
    assert not list((root / "out").glob("*.py"))
    return loaded, stock_model(root / "out", "qwen3_vl")


@pytest.mark.medium
@pytest.mark.parametrize("case", list(CASES))
def test_logits(pair, case):
    ours, theirs = pair
    sample = conversation(ours.config, CASES[case])
    computed = forward(ours.model, ours.params, collate([[sample]], ours.config, length=100))
    expected = torch_forward(theirs, torch_inputs(ours.config, sample))
    tokens = len(sample.input_ids)
    assert difference(computed["logits"][0, :tokens], expected["logits"]) <= TOLERANCE


@pytest.mark.medium
@pytest.mark.parametrize("case", ["text", "image", "video"])
def test_greedy_tokens(pair, case):
    """32 new tokens, with transformers' cache and without."""
    ours, theirs = pair
    sample = conversation(ours.config, CASES[case])
    batch = collate([[sample]], ours.config, length=100)
    found = generate(ours.model, ours.params, batch, max_new_tokens=32, stop_ids=[]).tokens[0]
    inputs = torch_inputs(ours.config, sample)
    for use_cache in (True, False):
        with torch.no_grad():
            out = theirs.generate(
                **inputs, max_new_tokens=32, do_sample=False, use_cache=use_cache, eos_token_id=None
            )
        assert out[0, len(sample.input_ids) :].tolist() == found
    assert len(found) == 32


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_text_only(tmp_path, kind):
    """transformers → iv3jax → transformers: the same logits, bit for bit, and no setting lost."""
    shape = dict(vocab_size=83, hidden_size=32, intermediate_size=41, num_hidden_layers=3, head_dim=8)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    config = transformers.AutoConfig.for_model(
        kind, **shape, tie_word_embeddings=kind == "qwen2", bos_token_id=3, eos_token_id=5
    )
    torch.manual_seed(0)
    model = getattr(transformers, STOCK[kind])(config).to(torch.bfloat16)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out")
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("in", "out"))
    assert after == before
    # Read back as well: the model in memory had its rotary frequencies rounded with the weights.
    source, back = (stock_model(tmp_path / name, kind) for name in ("in", "out"))
    assert back.dtype == torch.bfloat16
    assert back.generation_config.to_dict() | {"eos_token_id": 5} == source.generation_config.to_dict()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(back(ids).logits, source(ids).logits)
    assert verify(tmp_path / "out")[0].passed


@pytest.mark.medium
def test_verify_notices_a_wrong_number(tmp_path, monkeypatch, capsys):
    """A model that transformers loads otherwise than we do: exit code 1, and which prompt shows it."""
    import iv3jax.checkpoint.verify as module

    folder = random_folder(tmp_path / "in", gqa_config())
    whole = module.torch_model

    def changed(*args):
        model = whole(*args)
        with torch.no_grad():
            model.model.visual.merger.linear_fc2.bias += 0.1
        return model

    assert main(["export", str(folder), str(tmp_path / "a"), "--verify"]) == 0
    assert "verified logits" in capsys.readouterr().out
    monkeypatch.setattr(module, "torch_model", changed)
    assert main(["export", str(folder), str(tmp_path / "b"), "--verify", "--json"]) == 1
    rows = {row["prompt"]: row for row in json.loads(capsys.readouterr().out)["verify"]}
    assert {name: row["passed"] for name, row in rows.items()} == {
        "text": True,
        "image": False,
        "video": False,
    }


def test_verify_names_tensors_that_transformers_misses(tmp_path):
    folder = random_folder(tmp_path / "in", gqa_config())
    export(folder, tmp_path / "out")
    values = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    values["lm_head.weight"] = values["model.language_model.embed_tokens.weight"] + np.float32(1)
    save_file(values, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        verify(tmp_path / "out")


def test_tokenizers(tmp_path):
    """The tiny tokenizer in stock exports without settings of their own: the same ids, and the sizes."""
    ids = dict(zip(("image", "video", "vision_start", "vision_end"), range(508, 512), strict=True))
    ids = {f"{name}_token_id": index for name, index in ids.items()}
    config = replace(even_config("gqa", vocab_size=512), **ids)
    folder = write_folder(tmp_path / "in", config, random_tensors(config))
    shutil.copy(TINY_FOLDER / "tokenizer.json", folder)
    export(folder, out := tmp_path / "out")
    processor = Processor.from_dir(out, config)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "Which number? 42"}, {"role": "assistant", "content": "7"}]
    found = theirs.apply_chat_template(messages, return_dict=False)
    assert found == render(processor.tokenizer, messages).input_ids.tolist()
    image = transformers.AutoImageProcessor.from_pretrained(out)
    assert (image.size["shortest_edge"], image.size["longest_edge"]) == processor.image_pixels
    assert (image.patch_size, image.merge_size) == (2, 2)


@pytest.mark.medium
def test_verify_internvideo3(tmp_path, capsys):
    """`iv3 export tiny --verify`: our own code in the folder, run by transformers."""
    argv = ["export", "tiny", str(tmp_path / "out"), "--random-weights", "--verify", "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in result["verify"]] == ["text", "image", "video"]
    assert max(row["difference"] for row in result["verify"]) <= TOLERANCE
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert processor.chat_template is not None


@pytest.mark.medium
@pytest.mark.parametrize("name", ["m2la", "gqa"])
def test_verify_golden_folders(golden, tmp_path, name):
    """Whatever style of config.json: what transformers reads in the export is what we read."""
    export(golden / name, tmp_path / "out", max_shard_size="300KB")
    rows = verify(tmp_path / "out")
    assert len(rows) == 3 and all(row.passed for row in rows), rows
