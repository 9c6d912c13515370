"""World: the videos that the tools of a rollout look at, as arrays; and how the host makes one.

What the tools make of it is in tools/. Everything is encoded before: a tool never runs the tower.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.data.patches import patch_coords
from iv3jax.data.processor import Processor
from iv3jax.data.sample import Sample
from iv3jax.data.sampling import temporal_patch_times, timestamp_text
from iv3jax.data.tasks.episode import Episode, Span, dense_times
from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.wording import text_tokens
from iv3jax.models.batch import Batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.typing import Array, Params

NO_TIME = 1_000_000
"""The time of a patch that is not there, in tenths of a second: later than any."""
LONGEST = 9999.9
"""Seconds; the latest time that a call or an observation can name."""


class World(NamedTuple):
    """P videos, one for each prompt. Times are whole tenths of a second, as they are written and read.

    Attributes:
        features: (P, F, M, 1+K, D) bf16 or fp32: F temporal patches at the rate at which everything is seen,
            M vision tokens each, with their DeepStack levels. Padding may hold anything finite.
        times: (P, F) int32, of each patch, ascending; NO_TIME for padding, which comes last.
        duration: (P,) int32.
        patch_vectors: (P, F, D) fp32 of length 1: the mean of each patch's tokens.
        texts: (P, E, L) int32: timed texts (subtitles, captions), each as `wording.text_tokens` has it.
        text_lengths: (P, E) int32, how many tokens; 0 where there is no text.
        text_times: (P, E, 2) int32, start and end.
        text_vectors: (P, E, D) fp32 of length 1: the mean of each text's token embeddings.
        segments: (P, G, 2) int32, start and end, in order; −1 for padding, which comes last.
    """

    features: Array
    times: Array
    duration: Array
    patch_vectors: Array
    texts: Array
    text_lengths: Array
    text_times: Array
    text_vectors: Array
    segments: Array


class TimedText(NamedTuple):
    """What is said or seen from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Scene:
    """What is known of one video beside its features.

    Attributes:
        times: (n,) seconds of its temporal patches, ascending.
        duration: seconds.
        texts: in any order; the first of equally near ones is found first.
        segments: starts and ends in seconds, in order.
    """

    times: np.ndarray
    duration: float
    texts: tuple[TimedText, ...] = ()
    segments: tuple[Span, ...] = ()


@dataclass(frozen=True)
class WorldSize:
    """Room in a world, for each video. The same sizes need no new program.

    Attributes:
        patches: temporal patches. texts: timed texts. text_tokens: tokens of each. segments: segments.
    """

    patches: int
    texts: int = 0
    text_tokens: int = 0
    segments: int = 0


def world_of(
    scenes: Sequence[Scene], features: Array, size: WorldSize, tokenizer: Tokenizer, table: Array
) -> World:
    """A world of P videos.

    Args:
        scenes: P of them.
        features: (P, F, M, 1+K, D), padded: see `padded_features` and `encoded_features`.
        size: the room; `size.patches` is F.
        tokenizer: the model's. table: (V, D), the model's embedding table, for texts.

    Raises:
        UserError: a scene that does not fit, without patches, or with times out of order or past LONGEST.
    """
    if features.shape[:2] != (len(scenes), size.patches):
        raise ValueError(
            f"features of shape {features.shape} for {len(scenes)} scenes of {size.patches} patches"
        )
    count = len(scenes)
    times = np.full((count, size.patches), NO_TIME, np.int32)
    segments = np.full((count, size.segments, 2), -1, np.int32)
    for i, scene in enumerate(scenes):
        where = f"scene {i}"
        _check_room(where, scene, size)
        times[i, : len(scene.times)] = [tenths(t, where) for t in scene.times]
        for j, window in enumerate(scene.segments):
            segments[i, j] = [tenths(t, where) for t in window]
    return World(
        features=jnp.asarray(features),
        times=jnp.asarray(times),
        duration=jnp.array([tenths(s.duration, f"scene {i}") for i, s in enumerate(scenes)], jnp.int32),
        patch_vectors=_patch_vectors(features),
        segments=jnp.asarray(segments),
        **_timed_texts(scenes, size, tokenizer, table),
    )


def _timed_texts(
    scenes: Sequence[Scene], size: WorldSize, tokenizer: Tokenizer, table: Array
) -> dict[str, Array]:
    """The fields of a World that its texts make."""
    shape = (len(scenes), size.texts, size.text_tokens)
    lines, lengths = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
    # A text is found by its words alone, without the end of its line.
    words, word_lengths = lines.copy(), lengths.copy()
    times = np.zeros((*shape[:2], 2), np.int32)
    for i, scene in enumerate(scenes):
        where = f"scene {i}"
        for j, (start, end, text) in enumerate(scene.texts):
            word, line = text_tokens(tokenizer, text)
            if len(line) > size.text_tokens:
                raise UserError(
                    f"{where}: the text {text[:40]!r} has {len(line)} tokens, but there is room for "
                    f"{size.text_tokens}; split it or raise text_tokens"
                )
            lines[i, j, : len(line)], lengths[i, j] = line, len(line)
            words[i, j, : len(word)], word_lengths[i, j] = word, len(word)
            times[i, j] = tenths(start, where), tenths(end, where)
    flat = words.reshape(shape[0] * shape[1], shape[2])
    vectors = _text_vectors(table, flat, word_lengths.ravel())
    return {
        "texts": jnp.asarray(lines),
        "text_lengths": jnp.asarray(lengths),
        "text_times": jnp.asarray(times),
        "text_vectors": vectors.reshape(*shape[:2], vectors.shape[-1]),
    }


def tenths(seconds: float, where: str) -> int:
    """A time in tenths of a second, rounded as it is written in front of a patch.

    Raises:
        UserError: it is below 0 or above LONGEST; `where` is what the text starts with.
    """
    if not 0 <= seconds <= LONGEST:
        raise UserError(f"{where}: {seconds} seconds; the loop's times are from 0 to {LONGEST}")
    return int(timestamp_text(seconds)[1:].split()[0].replace(".", ""))


def mean_embedding(table: Array, tokens: Array, length: Array) -> Array:
    """(B, D) fp32: the mean vector, of a table (V, D), of each row's first `length` (B,) of (B, K) tokens."""
    real = jnp.arange(tokens.shape[1]) < length[:, None]
    vectors = jnp.take(table, jnp.where(real, tokens, 0), axis=0).astype(jnp.float32)
    return jnp.sum(vectors * real[..., None], axis=1) / jnp.maximum(length, 1)[:, None]


def padded_features(features: Sequence[np.ndarray], patches: int, per_patch: int) -> np.ndarray:
    """Features of videos as a feature store gives them, as those of a world.

    Args:
        features: of each video (tokens, 1+K, D), `per_patch` tokens for a temporal patch.
        patches: F, room for each video.

    Returns:
        (P, F, M, 1+K, D) of the same dtype, M = per_patch.

    Raises:
        UserError: a video has more patches.
    """
    first = features[0]
    whole = np.zeros((len(features), patches, per_patch, *first.shape[1:]), first.dtype)
    for i, one in enumerate(features):
        own = one.reshape(-1, *whole.shape[2:])
        if len(own) > patches:
            raise UserError(f"scene {i}: {len(own)} temporal patches, but there is room for {patches}")
        whole[i, : len(own)] = own
    return whole


def shots(features: np.ndarray, times: np.ndarray, duration: float, most: int) -> tuple[Span, ...]:
    """A video cut where its picture changes: segments for a `Scene`, where nobody has made better ones.

    A change is 1 − the cosine of neighbouring patches' mean vectors. Cuts are the largest changes, of those
    that are more than 3 times the median one.

    Args:
        features: (n, M, 1+K, D), its temporal patches. times: (n,) seconds. duration: seconds.
        most: segments at most.
    """
    mean = np.asarray(features[:, :, 0], np.float32).mean(axis=1)
    unit = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-30)
    change = 1 - np.sum(unit[1:] * unit[:-1], axis=1)
    largest = np.argsort(-change, kind="stable")[: most - 1]
    cuts = np.sort([i for i in largest if change[i] > 3 * np.median(change)]).astype(int)
    edges = [0.0, *((times[cuts] + times[cuts + 1]) / 2).tolist(), duration]
    return tuple(pairwise(edges))


def episode_scene(episode: Episode) -> Scene:
    """An episode as everything of it is seen; it has no texts and no segments."""
    return Scene(temporal_patch_times(_even(dense_times(episode.duration))), episode.duration)


def episode_sample(processor: Processor, episode: Episode) -> Sample:
    """The frames of `episode_scene`, cut into patches for `encoded_features`."""
    times = _even(dense_times(episode.duration))
    video = {"type": "video", "frames": episode.frames(times), "times": times}
    return processor([{"role": "user", "content": [video]}])


def encoded_features(model: InternVideo3, params: Params, samples: Sequence[Sample], patches: int) -> Array:
    """The tower over videos of one size, each a sample with nothing else: features of a world.

    Args:
        samples: P videos, (t, h, w) each, all of the same h and w.
        patches: F, room for each.

    Returns:
        (P, F, M, 1+K, D) of the model's compute dtype.

    Raises:
        UserError: a video has more patches, or frames of another size.
    """
    sides = samples[0].grids[0][1:]
    each = sides[0] * sides[1]
    pixels = np.zeros((len(samples), patches, each, samples[0].patches.shape[1]), np.uint8)
    segments = np.zeros((len(samples), patches, each), np.int32)
    for i, sample in enumerate(samples):
        ((count, *own),) = sample.grids
        if tuple(own) != sides or count > patches:
            raise UserError(
                f"scene {i}: {count} temporal patches of {own[0]} × {own[1]}, but there is room for "
                f"{patches} of {sides[0]} × {sides[1]}"
            )
        pixels[i, :count] = sample.patches.reshape(count, each, -1)
        segments[i, :count] = 1
    vision = model.config.vision_config
    if vision is None:
        raise UserError("this model has no vision tower; the loop needs one to look at videos")
    coords = patch_coords(*sides, vision.spatial_merge_size)
    return _encode(model, params, pixels, np.broadcast_to(coords, (*segments.shape, 4)), segments)


def _check_room(where: str, scene: Scene, size: WorldSize) -> None:
    times = np.asarray(scene.times)
    if not len(times) or (np.diff(times) < 0).any():
        raise UserError(f"{where}: its patches must have times that do not decrease, and there must be one")
    pairs: dict[str, Sized] = {"patches": times, "texts": scene.texts, "segments": scene.segments}
    for name, found in pairs.items():
        if len(found) > (room := getattr(size, name)):
            raise UserError(f"{where}: {len(found)} {name}, but there is room for {room}; raise {name}")


def _even(times: np.ndarray) -> np.ndarray:
    """The times, the last twice if they are odd, as the processor evens out frames."""
    return np.append(times, times[-1:]) if len(times) % 2 else times


def _unit(vectors: Array) -> Array:
    """The vectors with length 1, and 0 as it is."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)


@jax.jit
def _patch_vectors(features: Array) -> Array:
    return _unit(jnp.mean(features[..., 0, :], axis=2, dtype=jnp.float32))


@jax.jit
def _text_vectors(table: Array, tokens: Array, length: Array) -> Array:
    return _unit(mean_embedding(table, tokens, length))


@partial(jax.jit, static_argnums=0)
def _encode(model: InternVideo3, params: Params, pixels: Array, coords: Array, segments: Array) -> Array:
    none = jnp.zeros((len(pixels), 1), jnp.int32)
    batch = Batch(
        none,
        jnp.zeros((3, len(pixels), 1), jnp.int32),
        none,
        patches=pixels,
        patch_coords=coords,
        patch_segment_ids=segments,
    )
    seen = model.apply({"params": params}, batch, method="encode")
    levels = jnp.concatenate([seen.tokens[None], seen.deepstack.astype(seen.tokens.dtype)])
    rows, patches = segments.shape[:2]
    return jnp.moveaxis(levels, 0, 2).reshape(rows, patches, -1, *levels.shape[:1], levels.shape[-1])
