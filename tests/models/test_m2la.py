"""M²LA against SPEC §2 written out in NumPy float64, for odd sizes: n ≠ e ≠ v, odd rank, odd head count.

Both sides read the same tensors, in the layout of the checkpoint. fp32 against fp64: tolerance 1e-4 on values
of order 1 to 10; about 1e-5 is seen.
"""

import math

import numpy as np
import pytest
from models.peers import conversation, difference, forward, random_tensors, tiny_config, to_ours

from iv3jax.data.collate import collate
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.rope import mrope_axes

TOLERANCE = 1e-4

# (heads, r, n, e, v, sections)
SHAPES = [(3, 13, 6, 8, 10, (2, 1, 1)), (5, 7, 9, 12, 4, (2, 2, 2)), (1, 31, 5, 10, 3, (3, 1, 1))]


def rms_norm(x, weight, epsilon):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * weight


def rope(x, positions, theta, section):
    """x (…, e) at positions (3,): the pair (2i, 2i+1) turned by position · theta^(-2i/e), in half order."""
    e = x.shape[-1]
    out = np.empty_like(x)
    for i in range(e // 2):
        axis = 0
        if i % 3 == 1 and i < 3 * section[1]:
            axis = 1
        if i % 3 == 2 and i < 3 * section[2]:
            axis = 2
        angle = positions[axis] * theta ** (-2 * i / e)
        even, odd = x[..., 2 * i], x[..., 2 * i + 1]
        out[..., i] = even * math.cos(angle) - odd * math.sin(angle)
        out[..., i + e // 2] = odd * math.cos(angle) + even * math.sin(angle)
    return out


def attention(x, w, config, positions, segments):
    """(T, D) → (T, D), expanded, one query, head and key at a time."""
    heads, r = config.num_attention_heads, config.kv_lora_rank
    n, e, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    section, theta = config.mrope_section, config.rope_theta
    tokens = len(x)
    query = (x @ w["q_proj.weight"].T + w["q_proj.bias"]).reshape(tokens, heads, n + e)
    latent = x @ w["kv_a_proj_with_mqa.weight"].T + w["kv_a_proj_with_mqa.bias"]
    up = (latent[:, :r] @ w["kv_b_proj.weight"].T).reshape(tokens, heads, n + v)
    q_rope = np.stack([rope(query[t, :, n:], positions[:, t], theta, section) for t in range(tokens)])
    k_rope = np.stack([rope(latent[t, r:], positions[:, t], theta, section) for t in range(tokens)])
    out = np.zeros((tokens, heads, v))
    for s in range(tokens):
        seen = [t for t in range(s + 1) if segments[t] == segments[s]]
        for h in range(heads):
            logits = [query[s, h, :n] @ up[t, h, :n] + q_rope[s, h] @ k_rope[t] for t in seen]
            weights = np.exp(np.array(logits) / math.sqrt(n + e))
            out[s, h] = weights / weights.sum() @ up[seen, h, n:]
    return out.reshape(tokens, heads * v) @ w["o_proj.weight"].T


def decoder(values, config, input_ids, positions, segments):
    """The hidden state after every layer, and the logits: (L, T, D) and (T, vocab)."""
    values = {k: v.astype(np.float64) for k, v in values.items()}
    root = "model.language_model"
    x = values[f"{root}.embed_tokens.weight"][input_ids]
    layers = []
    for i in range(config.num_hidden_layers):
        prefix = f"{root}.layers.{i}."
        w = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        inner = {k.removeprefix("self_attn."): v for k, v in w.items()}
        y = rms_norm(x, w["input_layernorm.weight"], config.rms_norm_eps)
        x = x + attention(y, inner, config, positions, segments)
        y = rms_norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj.weight"].T
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


def test_axes_of_the_8b_model():
    """SPEC §2: sections (24, 20, 20) over 64 frequencies."""
    axes = mrope_axes(128, (24, 20, 20))
    assert "".join(map(str, axes)) == "012" * 20 + "0000"
    assert [int((axes == a).sum()) for a in range(3)] == [24, 20, 20]
    assert not mrope_axes(128, None).any()
