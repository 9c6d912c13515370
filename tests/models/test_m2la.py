"""M²LA against SPEC §2 written out in NumPy float64, for odd sizes: n ≠ e ≠ v, odd rank, odd head count; and
what a converted model has besides (cached norms, adapters, RoPE components, a rank for each layer).

Both sides read the same tensors, in the layout of the checkpoint. fp32 against fp64: tolerance 1e-4 on values
of order 1 to 10; about 1e-5 is seen.
"""

import math

import numpy as np
import pytest
from models.peers import CONVERTED, conversation, difference, forward, random_tensors, tiny_config, to_ours

from iv3jax.data.collate import collate
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.rope import mrope_axes

TOLERANCE = 1e-4

# (heads, r, n, e, v, sections)
SHAPES = [(3, 13, 6, 8, 10, (2, 1, 1)), (5, 7, 9, 12, 4, (2, 2, 2)), (1, 31, 5, 10, 3, (3, 1, 1))]


def rms_norm(x, weight, epsilon):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * weight


def rope(x, positions, config, layer):
    """x (…, e) at positions (3,): the pair (2j, 2j+1) turned by position · theta^(-2iK/e), in half order.

    i = j mod e/2K is the pair's place in its component, one of K; or it is listed, of d/2 frequencies.
    """
    e, components, section = x.shape[-1], config.rope_components, config.mrope_section
    listed = config.rope_frequency_list
    frequencies = e // 2 // components if listed is None else config.head_dim // 2
    out = np.empty_like(x)
    for j in range(e // 2):
        axis, i = 0, j % frequencies if listed is None else listed[layer][j]
        if i % 3 == 1 and i < 3 * section[1]:
            axis = 1
        if i % 3 == 2 and i < 3 * section[2]:
            axis = 2
        angle = positions[axis] * config.rope_theta ** (-i / frequencies)
        even, odd = x[..., 2 * j], x[..., 2 * j + 1]
        out[..., j] = even * math.cos(angle) - odd * math.sin(angle)
        out[..., j + e // 2] = odd * math.cos(angle) + even * math.sin(angle)
    return out


def attention(x, w, config, layer, positions, segments, seen_by):
    """(T, D) → (T, D), expanded, one query, head and key at a time."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    n, e, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    tokens, r = len(x), w["kv_b_proj.weight"].shape[1]
    query = (x @ w["q_proj.weight"].T + w["q_proj.bias"]).reshape(tokens, heads, -1)
    scale = np.ones((tokens, groups))
    if config.use_qk_norm:
        query = rms_norm(query, w["q_norm.weight"], config.rms_norm_eps)
        expand = w["q_expand.weight"].reshape(heads, n + e, -1)
        query = np.stack([query[:, h] @ expand[h].T for h in range(heads)], axis=1)
        key = (x @ w["k_norm_proj.weight"].T).reshape(tokens, groups, -1)
        scale = 1 / np.sqrt(np.mean(key**2, axis=-1) + config.rms_norm_eps)
    latent = x @ w["kv_a_proj_with_mqa.weight"].T + w["kv_a_proj_with_mqa.bias"]
    if config.latent_adapters:
        for t in range(tokens):
            m = int(seen_by[t] >= 0)
            latent[t, :r] = w["kv_adapters.weight"][m] @ latent[t, :r] + w["kv_adapters.bias"][m]
    up = (latent[:, :r] @ w["kv_b_proj.weight"].T).reshape(tokens, heads, n + v)
    q_rope = np.stack([rope(query[t, :, n:], positions[:, t], config, layer) for t in range(tokens)])
    k_rope = np.stack([rope(latent[t, r:], positions[:, t], config, layer) for t in range(tokens)])
    out = np.zeros((tokens, heads, v))
    for s in range(tokens):
        seen = [t for t in range(s + 1) if segments[t] == segments[s]]
        for h in range(heads):
            logits = np.array([query[s, h, :n] @ up[t, h, :n] + q_rope[s, h] @ k_rope[t] for t in seen])
            weights = np.exp(logits * scale[seen, h * groups // heads] / math.sqrt(n + e))
            out[s, h] = weights / weights.sum() @ up[seen, h, n:]
    return out.reshape(tokens, heads * v) @ w["o_proj.weight"].T


def decoder(values, config, input_ids, positions, segments, visual_index=None, visual=None):
    """The hidden state after every layer, and the logits: (L, T, D) and (T, vocab).

    visual_index (T,) and visual, the tower's (1 + levels, N, D): vision tokens and their DeepStack levels.
    """
    values = {k: v.astype(np.float64) for k, v in values.items()}
    root = "model.language_model"
    x = values[f"{root}.embed_tokens.weight"][input_ids]
    if visual_index is None:
        visual_index, visual = np.full(len(x), -1), np.zeros((1, 1, 1))
    at = visual_index >= 0
    x[at] = visual[0, visual_index[at]]
    layers = []
    for i in range(config.num_hidden_layers):
        prefix = f"{root}.layers.{i}."
        w = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        inner = {k.removeprefix("self_attn."): v for k, v in w.items()}
        y = rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
        x = x + attention(y, inner, config, i, positions, segments, visual_index)
        y = rms_norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj.weight"].T
        if i + 1 < len(visual):
            x[at] += visual[i + 1, visual_index[at]]
        layers.append(x)
    x = rms_norm(x, values[f"{root}.norm.weight"], config.rms_norm_eps)
    return np.stack(layers), x @ values["lm_head.weight"].T


@pytest.mark.parametrize(("heads", "r", "n", "e", "v", "section"), SHAPES)
def test_decoder_against_float64(heads, r, n, e, v, section):
    config = tiny_config(
        num_attention_heads=heads,
        kv_lora_rank=r,
        qk_nope_head_dim=n,
        qk_rope_head_dim=e,
        v_head_dim=v,
        mrope_section=section,
    )
    # Two samples of one pack, with positions of a video so that the three axes differ.
    pack = [conversation(config, [3, ("video", 2, 4, 6), 5], 1), conversation(config, [9], 2)]
    batch = collate([pack], config, length=40)._replace(visual_index=None, patches=None)
    tokens = sum(map(len, pack))
    values = random_tensors(config, seed=heads)
    computed = forward(InternVideo3(config), to_ours(values, config), batch)
    layers, logits = decoder(
        values,
        config.text_config,
        batch.input_ids[0, :tokens],
        batch.positions[:, 0, :tokens].astype(np.float64),
        batch.segment_ids[0, :tokens],
    )
    assert (batch.positions[0] != batch.positions[1]).any() and (
        batch.positions[1] != batch.positions[2]
    ).any()
    assert difference(computed["layers"][:, 0, :tokens], layers) <= TOLERANCE
    assert difference(computed["logits"][0, :tokens], logits) <= TOLERANCE


@pytest.mark.medium
@pytest.mark.parametrize("what", CONVERTED)
def test_what_conversion_adds_against_float64(what):
    """Each thing alone and all together, on a video between text."""
    config = tiny_config(**CONVERTED[what])
    sample = conversation(config, [3, ("video", 2, 4, 6), 5], 1)
    batch = collate([[sample]], config, length=len(sample))
    values = random_tensors(config, seed=5)
    computed = forward(InternVideo3(config), to_ours(values, config), batch)
    visual = np.concatenate([computed["tokens"][None, 0], computed["deepstack"][:, 0]])
    layers, logits = decoder(
        values,
        config.text_config,
        batch.input_ids[0],
        batch.positions[:, 0].astype(np.float64),
        batch.segment_ids[0],
        batch.visual_index[0],
        visual,
    )
    assert (batch.visual_index[0] >= 0).any() and (batch.visual_index[0] < 0).any()
    assert difference(computed["layers"][:, 0], layers) <= TOLERANCE
    assert difference(computed["logits"][0], logits) <= TOLERANCE


def test_axes_of_the_8b_model():
    """SPEC §2: sections (24, 20, 20) over 64 frequencies."""
    axes = mrope_axes(128, (24, 20, 20))
    assert "".join(map(str, axes)) == "012" * 20 + "0000"
    assert [int((axes == a).sum()) for a in range(3)] == [24, 20, 20]
    assert not mrope_axes(128, None).any()
