"""Prompts of rollouts, and the bank: each prompt looked at once, its cache shared by all of its group."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.data.chat import VisionItem, render
from iv3jax.data.positions import mrope_positions
from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError
from iv3jax.generate.generate import PREFILL_CHUNK
from iv3jax.mcr.tools import spread
from iv3jax.mcr.world import Scene, World
from iv3jax.models.batch import Batch
from iv3jax.models.cache import Cache, init_cache
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.vision import VisualFeatures
from iv3jax.typing import Array, DType, Params


class Prompts(NamedTuple):
    """P prompts of up to T0 tokens, right-padded.

    Attributes:
        ids: (P,) int32, a number of each prompt's own: its random numbers follow from it, so that they are
            the same in any company and any order.
        tokens: (P, T0) int32; padding may hold anything.
        segment_ids: (P, T0) int32, 1 for tokens and 0 for the padding after them.
        positions: (3, P, T0) int32 (SPEC §5).
        visual: (P, T0) int32, which of the F·M vision tokens of the prompt's own world stands there; −1 text.
        world: what the tools look at.
    """

    ids: Array
    tokens: Array
    segment_ids: Array
    positions: Array
    visual: Array
    world: World


class Bank(NamedTuple):
    """The prompts, fed: what every rollout of a prompt begins with.

    Attributes:
        cache: of P rows.
        logits: (P, V) fp32, of the first token after the prompt.
        position: (P,) int32, where that token stands.
    """

    cache: Cache
    logits: Array
    position: Array


def check_prompts(prompts: Prompts) -> None:
    """Raises UserError for a prompt without tokens, padding before tokens, or ids that are not unique."""
    real = np.asarray(prompts.segment_ids) != 0
    if not real.any(axis=1).all():
        raise UserError(f"prompt {int(np.argmin(real.any(axis=1)))} is empty")
    gaps = (real[:, 1:] > real[:, :-1]).any(axis=1)
    if gaps.any():
        raise UserError(f"prompt {int(np.argmax(gaps))} has padding before tokens; put it at the end")
    ids = np.asarray(prompts.ids)
    if len(np.unique(ids)) < len(ids):
        raise UserError("two prompts have the same id; their rollouts would be the same")


def write_prompts(
    tokenizer: Tokenizer,
    config: ModelConfig,
    scenes: Sequence[Scene],
    questions: Sequence[str],
    world: World,
    *,
    frames: int,
    grid: tuple[int, int] = (1, 1),
    length: int | None = None,
    ids: Sequence[int] | None = None,
) -> Prompts:
    """Prompts as `ask` writes them: an overview of the video, then the question, in one user turn.

    Args:
        config: the model's. scenes: what `world` was made of, one for each question.
        frames: temporal patches of the overview, evenly from first to last; all where there are fewer.
        grid: height and width of a temporal patch, in vision tokens.
        length: T0; None is what the longest prompt needs.
        ids: of the prompts; None numbers them from 0.

    Raises:
        UserError: a prompt is longer than `length`.
    """
    rows, per_patch = [], grid[0] * grid[1]
    for scene, question in zip(scenes, questions, strict=True):
        shown = np.asarray(spread(len(scene.times), frames))
        shown = shown[shown < len(scene.times)]
        times = np.asarray(scene.times)[shown]
        video = {"type": "video", "frames": None, "times": times}
        message = {"role": "user", "content": [video, {"type": "text", "text": question}]}
        item = VisionItem("video", per_patch, tuple(times.tolist()))
        tokens = render(tokenizer, [message], [item], generation=True).input_ids
        sides = [(len(shown), *grid)]
        positions = mrope_positions(tokens, config.image_token_id, config.video_token_id, sides, 1)
        visual = np.full(len(tokens), -1, np.int32)
        visual[tokens == config.video_token_id] = (shown[:, None] * per_patch + np.arange(per_patch)).ravel()
        rows.append((tokens, np.ones_like(tokens), positions, visual))
    longest = max(len(tokens) for tokens, *_ in rows)
    length = longest if length is None else length
    if longest > length:
        raise UserError(
            f"a prompt of {longest} tokens is longer than {length}; use fewer frames or a larger length"
        )

    def stack(column: int, fill: int, axis: int = 0) -> Array:
        """The column of all rows, padded at the end."""
        own = [row[column] for row in rows]
        padded = [
            np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=fill)
            for x in own
        ]
        return jnp.asarray(np.stack(padded, axis=axis), jnp.int32)

    numbers = jnp.asarray(range(len(rows)) if ids is None else ids, jnp.int32)
    return Prompts(numbers, stack(0, 0), stack(1, 0), stack(2, 0, 1), stack(3, -1), world)


def ends(prompts: Prompts) -> tuple[Array, Array]:
    """Tokens of each prompt (P,), and the position (P,) of what follows it, int32."""
    real = prompts.segment_ids != 0
    # Vision positions may run ahead of the token count: text goes on after the largest.
    highest = jnp.max(jnp.where(real, prompts.positions, -1), axis=(0, 2))
    return jnp.sum(real, axis=1, dtype=jnp.int32), highest + 1


def fill_bank(
    model: InternVideo3,
    params: Params,
    prompts: Prompts,
    cache_dtype: DType | None,
    chunk: int = PREFILL_CHUNK,
) -> Bank:
    """Feeds all prompts, `chunk` tokens of each at a time. Pure."""
    rows, length = prompts.tokens.shape
    size = min(chunk, length)
    parts = -(-length // size)
    lengths, following = ends(prompts)

    def cut(x: Array, fill: int) -> Array:
        """(…, P, T0) → (parts, …, P, size)."""
        padding = [(0, 0)] * (x.ndim - 1) + [(0, parts * size - length)]
        x = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], parts, size), -2, 0)

    def feed(carry: tuple[Cache, Array], part: tuple[Array, ...]) -> tuple[tuple[Cache, Array], None]:
        cache, last = carry
        start, tokens, segment_ids, positions, visual = part
        batch = Batch(tokens, positions, segment_ids)
        cache, here = feed_chunk(model, params, batch, cache, prompts.world, jnp.arange(rows), visual)
        ends = (lengths - 1) // size == start
        return (cache, jnp.where(ends[:, None], here, last)), None

    text = model.config.text_config
    dtype = model.run.dtype if cache_dtype is None else cache_dtype
    cache = init_cache(text, rows, length, dtype, model.run.scan_layers)
    last = jnp.zeros((rows, text.hidden_size), model.run.dtype)
    columns = (prompts.tokens, prompts.segment_ids, prompts.positions, prompts.visual)
    chunks = tuple(cut(x, fill) for x, fill in zip(columns, (0, 0, 0, -1), strict=True))
    (cache, last), _ = jax.lax.scan(feed, (cache, last), (jnp.arange(parts), *chunks))
    return Bank(cache, next_logits(model, params, last), following)


def feed_chunk(
    model: InternVideo3,
    params: Params,
    batch: Batch,
    cache: Cache,
    world: World,
    prompt: Array,
    visual: Array | None = None,
) -> tuple[Cache, Array]:
    """A chunk of tokens into the cache → (cache, hidden (B, D) of each row's last real token).

    Args:
        batch: (B, T), each row's tokens before its padding. Rows without tokens stay as they are.
        prompt: (B,) which world of the prompts a row looks at.
        visual: (B, T) index into the F·M vision tokens of that world, −1 for text; None where all is text.
    """
    seen = None
    if visual is not None:
        seen = visual_features(world, prompt, visual)
        places = jnp.broadcast_to(jnp.arange(visual.shape[1], dtype=jnp.int32), visual.shape)
        batch = batch._replace(visual_index=jnp.where(visual >= 0, places, -1))
    out = model.apply({"params": params}, batch, seen, cache)
    count = jnp.sum(batch.segment_ids != 0, axis=1)
    last = jnp.take_along_axis(out.hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return out.cache, last


def visual_features(world: World, prompt: Array, visual: Array) -> VisualFeatures:
    """The vision tokens that stand at (B, T) places, one for each place; text places hold some other one.

    Only these are copied: a row's whole video may be gigabytes.
    """
    per_patch = world.features.shape[2]
    index = jnp.maximum(visual, 0)
    chosen = world.features[prompt[:, None], index // per_patch, index % per_patch]
    return VisualFeatures(chosen[:, :, 0], jnp.moveaxis(chosen[:, :, 1:], 2, 0))


def next_logits(model: InternVideo3, params: Params, hidden: Array) -> Array:
    """(…, D) → (…, V) fp32."""
    return model.apply({"params": params}, hidden, method="logits")


def take_prompts(cache: Cache, bank: Cache, slots: Array, prompt: Array) -> Cache:
    """The cache with a prompt's tokens in each row of `slots` and nothing after them.

    Args:
        bank: of the prompts, with rows no longer than the cache's.
        slots: (S,) bool, which rows.
        prompt: (S,) int32, the prompt of each.
    """
    order = jnp.argsort(~slots)

    def one(i: Array, cache: Cache) -> Cache:
        return cache.with_row(order[i], bank.row(prompt[order[i]]))

    # Row by row and in place: to choose between old and new, the whole cache would be copied.
    return jax.lax.fori_loop(0, jnp.sum(slots), one, cache)
