"""The Qwen3-VL vision tower: patches → vision tokens and DeepStack levels (SPEC §4)."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from iv3jax import ops
from iv3jax.models.config import VisionConfig
from iv3jax.models.layers import Embedding, Execution, LayerNorm, Linear, compute_kernels
from iv3jax.models.parts import mapped
from iv3jax.models.rope import Rope, rotate, vision_rope
from iv3jax.sharding import constrain, whole_parts, with_weights
from iv3jax.typing import Array, Params


class VisualFeatures(NamedTuple):
    """The tower's output: tokens (B, N, D) and DeepStack levels (K, B, N, D)."""

    tokens: Array
    deepstack: Array


class VisionBlock(nn.Module):
    """One pre-norm block; attention stays inside a temporal patch (equal segment ids)."""

    config: VisionConfig
    run: Execution = dataclasses.field(default_factory=Execution)

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Array], block: Array, rope: Rope, segment_ids: Array
    ) -> tuple[tuple[Array, Array], None]:
        """carry: hidden (F, C, width) and the DeepStack taps taken so far (K, F, C, width)."""
        c, run = self.config, self.run
        hidden, taps = carry
        heads, dim = c.num_heads, c.hidden_size // c.num_heads
        head = ("heads", "head_dim")

        y = LayerNorm(c.hidden_size, run, name="norm1")(hidden)
        qkv = Linear((c.hidden_size,), (3, heads, dim), ("embed",), ("three", *head), True, run, name="qkv")(
            y
        )
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        mask = ops.AttentionMask(segment_ids, segment_ids)
        y = ops.attention(rotate(query, rope), rotate(key, rope), value, mask)
        hidden += Linear((heads, dim), (c.hidden_size,), head, ("embed",), True, run, name="proj")(y)

        y = LayerNorm(c.hidden_size, run, name="norm2")(hidden)
        y = Linear(
            (c.hidden_size,), (c.intermediate_size,), ("embed",), ("mlp",), True, run, name="linear_fc1"
        )(y)
        y = nn.gelu(y, approximate=True)
        hidden += Linear(
            (c.intermediate_size,), (c.hidden_size,), ("mlp",), ("embed",), True, run, name="linear_fc2"
        )(y)
        if c.deepstack_visual_indexes:
            chosen = block == jnp.asarray(c.deepstack_visual_indexes)
            taps = jnp.where(chosen[:, None, None, None], hidden, taps)
        return (hidden, taps), None


class PatchMerger(nn.Module):
    """merge² patches → one token of the decoder's width.

    `norm_merged` says which comes first: the final merger norms each patch, DeepStack's the merged four.
    """

    config: VisionConfig
    norm_merged: bool
    run: Execution = dataclasses.field(default_factory=Execution)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, run = self.config, self.run
        merged = c.hidden_size * c.spatial_merge_size**2
        norm = LayerNorm(merged if self.norm_merged else c.hidden_size, run, name="norm")
        if not self.norm_merged:
            x = norm(x)
        x = x.reshape(*x.shape[:-2], -1, merged)
        if self.norm_merged:
            x = norm(x)
        x = Linear((merged,), (merged,), ("embed",), ("mlp",), True, run, name="linear_fc1")(x)
        x = nn.gelu(x, approximate=False)
        return Linear((merged,), (c.out_hidden_size,), ("mlp",), ("embed",), True, run, name="linear_fc2")(x)


class _TowerStep(nn.Module):
    """The tower over F chunks at once."""

    config: VisionConfig
    run: Execution = dataclasses.field(default_factory=Execution)

    @nn.compact
    def __call__(self, patches: Array, coords: Array, segment_ids: Array) -> tuple[Array, Array]:
        """(F, C, P), (F, C, 4), (F, C) → tokens (F, C/merge², D) and levels (K, F, C/merge², D)."""
        c, run = self.config, self.run
        hidden = Linear(
            (c.patch_dim,), (c.hidden_size,), ("patch",), ("embed",), True, run, name="patch_embed"
        )(normalised(patches))
        hidden = hidden + self._position_embedding(coords)
        rope = vision_rope(coords[..., 0], coords[..., 1], c.hidden_size // c.num_heads)
        taps = jnp.zeros((len(c.deepstack_visual_indexes), *hidden.shape), hidden.dtype)
        blocks = nn.scan(
            run.checkpointed(VisionBlock),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, run, name="blocks")
        (hidden, taps), _ = blocks((hidden, taps), jnp.arange(c.depth), rope, segment_ids)
        tokens = PatchMerger(c, False, run, name="merger")(hidden)
        if not c.deepstack_visual_indexes:
            return tokens, jnp.zeros((0, *tokens.shape), tokens.dtype)
        mergers = nn.vmap(
            PatchMerger,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return tokens, mergers(c, True, run, name="deepstack_merger_list")(taps)

    def _position_embedding(self, coords: Array) -> Array:
        """Bilinear in the learned square table, corners aligned, upper neighbour clipped."""
        side = round(self.config.num_position_embeddings**0.5)
        table = Embedding(
            side * side, self.config.hidden_size, ("positions", None), self.run, name="pos_embed"
        )
        index, size = coords[..., :2], coords[..., 2:]
        where = index.astype(jnp.float32) * ((side - 1) / jnp.maximum(size - 1, 1).astype(jnp.float32))
        low = jnp.clip(jnp.floor(where).astype(jnp.int32), 0, side - 1)
        high = jnp.minimum(low + 1, side - 1)
        share = (where - low).astype(self.run.dtype)[..., None]
        (y0, x0), (y1, x1) = (jnp.moveaxis(i, -1, 0) for i in (low, high))
        dy, dx = share[..., 0, :], share[..., 1, :]
        top = table(y0 * side + x0) * (1 - dx) + table(y0 * side + x1) * dx
        bottom = table(y1 * side + x0) * (1 - dx) + table(y1 * side + x1) * dx
        return top * (1 - dy) + bottom * dy


class VisionTower(nn.Module):
    """Patches of a batch → its vision tokens, a bounded number of patches at a time."""

    config: VisionConfig
    run: Execution = dataclasses.field(default_factory=Execution)

    @nn.compact
    def __call__(self, patches: Array, coords: Array, segment_ids: Array) -> VisualFeatures:
        """(B, V, C, P), (B, V, C, 4), (B, V, C) → features of N = V·C/merge² tokens a row.

        Chunks are independent, so the batch and chunk axes are one, split over every mesh axis; each device
        has the tower's weights whole and works off its chunks in steps.
        """
        rows, chunks = patches.shape[:2]
        total = rows * chunks
        padding = whole_parts("chunk_groups", total) - total

        def joined(x: Array) -> Array:
            x = jnp.pad(x.reshape(total, *x.shape[2:]), [(0, padding)] + [(0, 0)] * (x.ndim - 2))
            return constrain(x, "chunk_groups", *[None] * (x.ndim - 1))

        given = (joined(patches), joined(coords), joined(segment_ids))
        step = _TowerStep(self.config, self.run, name="tower")
        if self.is_initializing():
            tokens, levels = step(*given)
        else:
            inputs = [("chunk_groups", *[None] * (x.ndim - 1)) for x in given]
            outputs = [("chunk_groups", None, None), (None, "chunk_groups", None, None)]
            weights = compute_kernels(step.variables["params"], self.run.dtype)
            tokens, levels = with_weights(self._in_steps, weights, inputs, outputs, *given)

        def restored(x: Array) -> Array:
            """(chunks, tokens, D) → (B, N, D)."""
            return constrain(x[:total].reshape(rows, -1, x.shape[-1]), "batch", "sequence", "hidden")

        count = len(self.config.deepstack_visual_indexes)
        tokens = restored(tokens)
        deepstack = [restored(levels[k]) for k in range(count)]
        return VisualFeatures(tokens, jnp.stack(deepstack) if count else jnp.zeros((0, *tokens.shape)))

    def _in_steps(
        self, weights: Params, patches: Array, coords: Array, segment_ids: Array
    ) -> tuple[Array, Array]:
        """A device's chunks → tokens (F, C/merge², D) and levels (K, F, C/merge², D)."""
        count, per_chunk, _ = patches.shape
        steps = min(count, -(-count * per_chunk // self.run.patches_per_step))
        size = -(-count // steps)
        module = _TowerStep(self.config, self.run.within(*self.path, "tower"), parent=None)

        def stepped(x: Array) -> Array:
            x = jnp.pad(x, [(0, steps * size - count)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(steps, size, *x.shape[1:])

        def one(weights: Params, part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            tokens, levels = module.apply({"params": weights}, *part)
            return tokens, jnp.moveaxis(levels, 0, 1)

        given = (stepped(patches), stepped(coords), stepped(segment_ids))
        # Sizes in full: without DeepStack the levels are an empty array, and -1 would mean nothing.
        made = mapped(one, weights, given)
        tokens, levels = (x.reshape(steps * size, *x.shape[2:])[:count] for x in made)
        return tokens, jnp.moveaxis(levels, 1, 0)


def normalised(patches: Array) -> Array:
    """uint8 pixels → [−1, 1] (mean = std = 0.5); floats are taken as normalised already."""
    if patches.dtype == jnp.uint8:
        return patches.astype(jnp.float32) / 127.5 - 1
    return patches
