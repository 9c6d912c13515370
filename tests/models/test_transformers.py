"""Fresh random models of transformers, saved by it and loaded by us: every layer, the tower and the logits.

fp32, tolerance 2e-4 on values of order 1 to 10; about 1e-5 is seen. Sizes are set explicitly: transformers'
own defaults differ from version to version.
"""

import numpy as np
import pytest
from models.peers import conversation, difference, forward, randomise, torch_forward, torch_inputs

from iv3jax.checkpoint.load import load
from iv3jax.data.collate import collate
from iv3jax.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-4

CASES = {
    "text": [19],
    "image": [3, ("image", 1, 4, 8), 4],
    "videos": [2, ("video", 3, 4, 6), 3, ("video", 1, 8, 4), 1, ("video", 2, 4, 4), 2],
    "mixed": [1, ("video", 2, 8, 6), 5, ("image", 1, 6, 4), ("image", 1, 4, 4), ("video", 1, 4, 6), 3],
}
LENGTH = 100


def qwen3_vl(seed: int):
    """A random Qwen3-VL; the shapes change with the seed."""
    rng = np.random.default_rng(seed)
    groups, share = ((2, 3), (1, 5), (3, 1))[seed % 3]
    section = [(4, 2, 2), (3, 2, 1), (2, 2, 2)][seed % 3]
    hidden = int(rng.choice([24, 36, 50]))
    text = dict(
        vocab_size=111,
        hidden_size=hidden,
        intermediate_size=int(rng.choice([31, 45])),
        num_hidden_layers=int(rng.choice([3, 5])),
        num_attention_heads=groups * share,
        num_key_value_heads=groups,
        head_dim=2 * sum(section),
        max_position_embeddings=512,
        rms_norm_eps=float(rng.choice([1e-5, 1e-6])),
        rope_parameters=dict(
            rope_type="default", rope_theta=5e5, mrope_section=list(section), mrope_interleaved=True
        ),
    )
    vision = dict(
        depth=4,
        hidden_size=48,
        intermediate_size=37,
        num_heads=int(rng.choice([3, 4])),
        out_hidden_size=hidden,
        patch_size=(2, 16, 4)[seed % 3],
        num_position_embeddings=int(rng.choice([36, 49])),
        deepstack_visual_indexes=[(0, 2), (1, 2, 3), ()][seed % 3],
    )
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=101,
        video_token_id=102,
        vision_start_token_id=103,
        vision_end_token_id=104,
        tie_word_embeddings=seed % 2 == 1,
    )
    return randomise(transformers.Qwen3VLForConditionalGeneration(config), seed)


@pytest.fixture(scope="module", params=[0, 1, 2])
def pair(request, tmp_path_factory):
    """transformers' model, and ours loaded from what it saved."""
    theirs = qwen3_vl(request.param)
    folder = tmp_path_factory.mktemp("qwen3_vl")
    theirs.save_pretrained(folder)
    return theirs, load(folder)


@pytest.fixture(scope="module")
def outputs(pair):
    """Our outputs for all cases as the rows of one padded batch, and the cases' samples."""
    _, ours = pair
    samples = [conversation(ours.config, items, seed) for seed, items in enumerate(CASES.values())]
    batch = collate([[s] for s in samples], ours.config, length=LENGTH)
    return samples, batch, {k: np.asarray(v) for k, v in forward(ours.model, ours.params, batch).items()}


@pytest.mark.medium
@pytest.mark.parametrize("case", list(CASES))
def test_qwen3_vl(pair, outputs, case):
    theirs, ours = pair
    samples, batch, computed = outputs
    row = list(CASES).index(case)
    sample = samples[row]
    tokens = len(sample)
    inputs = torch_inputs(ours.config, sample)

    expected = torch_forward(theirs, inputs)
    for layer, hidden in enumerate(expected["layers"]):
        assert difference(computed["layers"][layer, row, :tokens], hidden) <= TOLERANCE, f"layer {layer}"
    assert difference(computed["logits"][row, :tokens], expected["logits"]) <= TOLERANCE

    grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw") if k in inputs}
    if not grids:
        return
    positions, _ = theirs.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)
    np.testing.assert_array_equal(sample.positions, positions[:, 0].numpy())

    where = batch.visual_index[row, :tokens]
    for token_id, pixels, grid in (
        (ours.config.image_token_id, "pixel_values", "image_grid_thw"),
        (ours.config.video_token_id, "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels not in inputs:
            continue
        at = where[sample.input_ids == token_id]
        with torch.no_grad():
            tower = theirs.model.visual(inputs[pixels], grid_thw=inputs[grid])
        assert difference(computed["tokens"][row, at], tower.pooler_output.numpy()) <= TOLERANCE
        levels = computed["deepstack"][:, row, at]
        assert len(levels) == len(tower.deepstack_features)
        for level, features in zip(levels, tower.deepstack_features, strict=True):
            assert difference(level, features.numpy()) <= TOLERANCE


def text_only(family: str, tied: bool, bias: bool):
    """A random decoder without a tower."""
    shape = dict(
        vocab_size=83,
        hidden_size=30,
        intermediate_size=41,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,  # not hidden_size / heads, which is 5 and odd
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters=dict(rope_type="default", rope_theta=2e4),
    )
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    if family != "qwen2":
        shape |= dict(attention_bias=bias)
    config = getattr(transformers, f"{name}Config")(**shape)
    return randomise(getattr(transformers, f"{name}ForCausalLM")(config), 7)


@pytest.mark.parametrize(
    ("family", "tied", "bias"),
    [
        ("llama", False, False),
        ("llama", True, False),
        ("llama", False, True),
        ("llama", True, True),
        ("qwen2", True, True),
        ("qwen3", False, False),
        ("qwen3", True, True),
    ],
)
def test_text_only(tmp_path, family, tied, bias):
    theirs = text_only(family, tied, bias)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    sample = conversation(ours.config, [29])
    computed = forward(ours.model, ours.params, collate([[sample]], ours.config, length=32))
    expected = torch_forward(theirs, torch_inputs(ours.config, sample))
    for layer, hidden in enumerate(expected["layers"]):
        assert difference(computed["layers"][layer, 0, :29], hidden) <= TOLERANCE, f"layer {layer}"
    assert difference(computed["logits"][0, :29], expected["logits"]) <= TOLERANCE


def test_scaled_rope_is_refused(tmp_path):
    rope = dict(
        rope_type="llama3",
        rope_theta=1e4,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, rope_parameters=rope
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: rope type 'llama3' is not supported"):
        load(tmp_path)
