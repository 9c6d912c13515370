"""One attention before and after conversion, and the algebra between the two (SPEC §3, steps 1, 4 and 7).

Everything is float64 NumPy; sizes are those of one layer. Heads' dims are in RoPE's half order, where pair
i is (i, i + d/2), except those of M²LA's RoPE key, whose pair i is (2i, 2i+1) as in checkpoints.
Axes: H query heads, G key heads, d head_dim, D width, Z = 2·G·d numbers of [keys ‖ values] as the source's
projections give them, e RoPE dims of M²LA, c content dims, r rank. A map from Z+1 has a constant as its
last input.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from iv3jax.typing import Params

Array = np.ndarray


@dataclass(frozen=True)
class GQALayer:
    """The source's projections.

    Attributes:
        query: (H, d, D), query_bias: (H, d).
        key_value: (Z, D), keys of all heads, then values; key_value_bias: (Z,).
        output: (D, H, d).
        groups: G.
    """

    query: Array
    query_bias: Array
    key_value: Array
    key_value_bias: Array
    output: Array
    groups: int

    @staticmethod
    def of(attention: Params) -> "GQALayer":
        """From the `self_attn` parameters of a source layer."""

        def kernel(name: str) -> Array:
            return np.asarray(attention[name]["kernel"], np.float64)

        def bias(name: str) -> Array:
            values = attention[name].get("bias")
            return np.zeros(kernel(name).shape[:-1]) if values is None else np.asarray(values, np.float64)

        width = kernel("k_proj").shape[-1]
        return GQALayer(
            kernel("q_proj"),
            bias("q_proj"),
            np.concatenate([kernel(name).reshape(-1, width) for name in ("k_proj", "v_proj")]),
            np.concatenate([bias(name).ravel() for name in ("k_proj", "v_proj")]),
            kernel("o_proj"),
            len(kernel("k_proj")),
        )

    @property
    def head_dim(self) -> int:
        """d."""
        return int(self.query.shape[1])

    @property
    def keys(self) -> int:
        """G·d."""
        return self.groups * self.head_dim


@dataclass(frozen=True)
class Split:
    """Keys split into a shared part that RoPE turns and a content that it does not.

    Attributes:
        to_rope: (e, G·d), keys → the shared RoPE key, interleaved pairs.
        query_rope: (H, e, d), a head's query → what meets the RoPE key, interleaved pairs.
        to_content: (c, G·d), keys → content.
        content_up: (H, d, c), content → the vector that a head's own query meets, without any turn.
    """

    to_rope: Array
    query_rope: Array
    to_content: Array
    content_up: Array

    def targets(self) -> Array:
        """(c + G·d, Z): [keys ‖ values] → [content ‖ values]."""
        content, keys = self.to_content.shape
        out = np.zeros((content + keys, 2 * keys))
        out[:content, :keys] = self.to_content
        out[content:, keys:] = np.eye(keys)
        return out


@dataclass(frozen=True)
class Maps:
    """What a conversion has found for a layer.

    Attributes:
        query: (H, d, d+1), a head's query as q_proj gives it → as it is used; None where its norm stays.
        rope: (e, Z+1), → the shared RoPE key.
        down: (r, Z+1), → the latent.
        up: (c + G·d, r), latent → [content ‖ values].
        adapters: (2, r, r) and (2, r), maps of the latents of text and of vision tokens, or None.
        output: (D, H, d) instead of the source's, or None.
    """

    query: Array | None
    rope: Array
    down: Array
    up: Array
    adapters: tuple[Array, Array] | None = None
    output: Array | None = None

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    def with_output(self, output: Array) -> "Maps":
        """The same with another o_proj."""
        return replace(self, output=output)


def assemble(layer: GQALayer, split: Split, maps: Maps, attention: Params) -> dict[str, Any]:
    """The parameters of `models.attention.M2LAAttention` as nested dicts of float64.

    Args:
        attention: the source's `self_attn` parameters; of them the query's and the key's own are kept where
            their norms stay.
    """
    heads, d = layer.query.shape[:2]
    content, e = len(split.to_content), len(split.to_rope)
    # The new logits are divided by sqrt(n+e), the old ones were by sqrt(d) (step 7); n = d.
    expand = np.concatenate([np.broadcast_to(np.eye(d), (heads, d, d)), split.query_rope], axis=1)
    expand = np.sqrt((d + e) / d) * expand
    maps = _evened(layer, split, maps)
    inner = np.concatenate([maps.down, maps.rope])
    up_key = split.content_up @ maps.up[:content]
    up_value = maps.up[content:].reshape(layer.groups, d, -1).repeat(heads // layer.groups, axis=0)
    made: dict[str, Any] = {
        "kv_a_proj_with_mqa": {
            "kernel": inner[:, :-1] @ layer.key_value,
            "bias": inner[:, :-1] @ layer.key_value_bias + inner[:, -1],
        },
        "kv_b_proj": {"kernel": np.concatenate([up_key, up_value], axis=1)},
        "o_proj": {"kernel": layer.output if maps.output is None else maps.output},
    }
    if maps.query is None:
        made |= {name: attention[name] for name in ("q_proj", "q_norm")}
        made["q_expand"] = {"kernel": expand}
        made["k_norm_proj"] = {"kernel": attention["k_proj"]["kernel"]}
    else:
        query = expand @ maps.query
        bias = (query[..., :-1] @ layer.query_bias[..., None])[..., 0] + query[..., -1]
        made["q_proj"] = {"kernel": query[..., :-1] @ layer.query, "bias": bias}
    if maps.adapters is not None:
        made["kv_adapters"] = dict(zip(("kernel", "bias"), maps.adapters, strict=True))
    return made


def _evened(layer: GQALayer, split: Split, maps: Maps) -> Maps:
    """The same function, each number of the latent scaled so that what makes it is as large as what reads it.

    The metric leaves latents of any size; training would not move such a pair of matrices alike.
    """
    content = len(split.to_content)
    made = np.linalg.norm(maps.down[:, :-1] @ layer.key_value, axis=1)
    per_group = len(layer.query) // layer.groups
    read = np.sum((split.content_up @ maps.up[:content]) ** 2, axis=(0, 1))
    read = np.sqrt(read + per_group * np.sum(maps.up[content:] ** 2, axis=0))
    tiny = np.finfo(np.float64).tiny
    usable = (made > tiny) & (read > tiny)
    size = np.where(usable, np.sqrt(np.maximum(read, tiny) / np.maximum(made, tiny)), 1.0)
    adapters = maps.adapters
    if adapters is not None:
        adapters = adapters[0] * size[:, None] / size, adapters[1] * size
    return replace(maps, down=maps.down * size[:, None], up=maps.up / size, adapters=adapters)
