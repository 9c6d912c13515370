"""The vision tower over a set of videos, into a feature store. What a store is, is in data/features.py."""

import dataclasses
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from av.error import FFmpegError

from iv3jax.checkpoint.load import LoadedModel
from iv3jax.data.chat import parts as message_parts
from iv3jax.data.clips import DTYPES, StoreSpec, VideoFile, VideoSampling, absolute, identify, part_folder
from iv3jax.data.collate import round_up_bucket
from iv3jax.data.config import SourceConfig
from iv3jax.data.features import QUARANTINE, FeatureWriter
from iv3jax.data.internvideo3_json import open_annotation
from iv3jax.data.llava_json import open_conversations
from iv3jax.data.patches import patch_coords
from iv3jax.data.processor import Processor
from iv3jax.data.record import folder_of, media_part
from iv3jax.data.sample import Sample
from iv3jax.data.sampling import sample_indices
from iv3jax.data.sizes import video_size
from iv3jax.errors import UserError
from iv3jax.models.config import VisionConfig
from iv3jax.models.layers import Execution
from iv3jax.models.vision import VisionTower
from iv3jax.paths import AnyPath, PathArgument, make_path
from iv3jax.typing import Array, Params

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .flv .wmv .mpg .mpeg .ts .mts .m2ts .3gp .ogv .vob".split()
)
"""By which the videos of a folder are known."""

_AHEAD = 2
"""Videos that are read while the tower is at work on another; each holds its patches in memory."""


@dataclass(frozen=True)
class Encoded:
    """What one run of `encode` did on this host.

    Attributes:
        clips: videos that were encoded.
        kept: that were in the store already.
        failed: that could not be read; `quarantine.jsonl` in the host's part says why.
        tokens: vision tokens of the new clips.
        seconds: wall time.
    """

    clips: int
    kept: int
    failed: int
    tokens: int
    seconds: float


def encode(
    model: LoadedModel,
    videos: Iterable[PathArgument],
    store: PathArgument,
    *,
    host: int = 0,
    hosts: int = 1,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    video_pixels: tuple[int, int] | None = None,
    dtype: str = "bfloat16",
    say: Callable[[str], None] = print,
) -> Encoded:
    """Writes the features of videos into a store, but for those that are there already.

    A run that is killed, and started again with the same arguments, ends with the same bytes. Videos may be
    added later, with other settings too. A video that cannot be read is named and passed over. Memory is
    bounded by the patches of three videos, one step of the tower and two shards of the store.

    Args:
        model: its tower is run, on its mesh: one device or several, all of this process.
        videos: video files, local or on a store. One that is named twice is encoded once.
        store: folder of the store, made if it is not there.
        host, hosts: this process encodes every `hosts`-th video from `host` on, into a part of its own. The
            processes need not know of each other.
        fps, min_frames, max_frames, video_pixels: how videos are sampled; None takes the model folder's.
        dtype: bfloat16 or float32, of what is stored.
        say: gets a line for each video.

    Raises:
        UserError: a model without a tower, numbers that make no sense, or a store of another tower or dtype,
            that cannot be written to, or whose part another process is writing.
    """
    vision = model.config.vision_config
    if vision is None:
        raise UserError("this model has no vision tower, so there are no features to store")
    if not 0 <= host < hosts:
        raise UserError(f"host {host} of {hosts}: hosts are numbered from 0 to {hosts - 1}")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    processor = _sampled(model.processor, fps, min_frames, max_frames, video_pixels)
    spec = StoreSpec(
        tower_fingerprint(vision, model.params["visual"]),
        len(vision.deepstack_visual_indexes),
        vision.out_hidden_size,
        dtype,
    )
    own = list({absolute(path): path for path in map(make_path, videos)}.values())[host::hosts]
    started, clips, failed, tokens = time.perf_counter(), 0, 0, 0
    with ExitStack() as stack:
        writer = stack.enter_context(FeatureWriter.open(store, spec, host))
        stack.enter_context(jax.set_mesh(model.mesh))
        seen = stack.enter_context(closing(_ahead(partial(_look, processor, writer), own)))
        for number, (path, found) in enumerate(seen, 1):
            where, since = f"[{number}/{len(own)}] {path}", time.perf_counter()
            if isinstance(found, UserError):
                failed += 1
                writer.quarantine(path, str(found))
                say(f"{where}: NOT READ: {found}")
            elif found is not None:
                sample = found.sample
                (grid,), (media,) = sample.grids, sample.media
                count = len(sample.patches) // vision.spatial_merge_size**2
                pieces = _pieces(model, vision, dtype, sample)
                writer.add(found.file, found.sampling, media, grid, count, pieces)
                clips, tokens = clips + 1, tokens + count
                looked, seconds = (
                    f"{media.frames} of {media.total_frames} frames",
                    time.perf_counter() - since,
                )
                say(f"{where}: {looked}, {count:,} tokens, {seconds:.1f} s")
    return Encoded(clips, len(own) - clips - failed, failed, tokens, time.perf_counter() - started)


def tower_fingerprint(vision: VisionConfig, tower: Params) -> str:
    """By which a tower is known: its shape and its weights, as the numbers they are.

    The same for one checkpoint in whatever dtype that holds it, on whatever mesh: every weight, widened to
    fp32, is hashed with its place, and the hashes of a parameter are added up, which no order changes.

    Args:
        vision: its config.
        tower: its parameters, `params["visual"]`.
    """
    leaves = jax.tree.leaves_with_path(tower)
    sums = jax.device_get(_checksums([x for _, x in leaves]))
    rows = [
        [jax.tree_util.keystr(path, simple=True, separator="/"), list(x.shape), *map(int, found)]
        for (path, x), found in zip(leaves, sums, strict=True)
    ]
    fields = {f.name: getattr(vision, f.name) for f in dataclasses.fields(vision) if f.name != "extra"}
    return hashlib.sha256(json.dumps([fields, sorted(rows)]).encode()).hexdigest()[:16]


def video_files(
    source: PathArgument, media_root: str = "", say: Callable[[str], None] = print
) -> list[AnyPath]:
    """The videos that something names, in order.

    Args:
        source: a video; a folder, with those below it; a .jsonl or .json of conversations that the training
            sources read, with the videos in them; or a .txt with a path a line.
        media_root: folder of the relative paths in a file; empty: the file's own.
        say: gets a line for each damaged record; it is passed over.

    Raises:
        UserError: no such file, or no video in it.
    """
    source = make_path(source)
    kind = source.suffix.lower()
    if source.is_dir():
        found = sorted(_below(source), key=str)
    elif not source.is_file():
        raise UserError(f"{source}: no such file or folder; name videos, a folder, or a list of videos")
    elif kind in (".jsonl", ".json"):
        found = [make_path(name) for name in _conversed(source, media_root, say)]
    elif kind == ".txt":
        root = folder_of(source, media_root)
        lines = os.fsdecode(source.read_bytes()).splitlines()
        parts = [media_part("video", line.strip(), root, str(source)) for line in lines if line.strip()]
        found = [make_path(part["video"]) for part in parts]
    else:
        return [source]
    if not found:
        raise UserError(f"{source}: names no video")
    return list(dict.fromkeys(found))


def encode_command(
    model: LoadedModel,
    sources: Sequence[str],
    store: str,
    *,
    media_root: str = "",
    say: Callable[[str], None] = print,
    **settings: Any,
) -> Encoded:
    """`iv3 data encode`: the videos that `sources` name (`video_files`), with `settings` of `encode`."""
    videos = [path for source in sources for path in video_files(source, media_root, say)]
    done = encode(model, videos, store, say=say, **settings)
    say(
        f"{done.clips} clips encoded ({done.tokens:,} tokens, {done.seconds:.1f} s), {done.kept} were there, "
        f"{done.failed} could not be read"
    )
    if done.failed:
        part = part_folder(make_path(store), settings.get("host", 0))
        say(f"{part / QUARANTINE} says why; the next run tries them again")
    return done


@dataclass(frozen=True)
class _Video:
    """A video that was read."""

    file: VideoFile
    sampling: VideoSampling
    sample: Sample


def _look(processor: Processor, writer: FeatureWriter, path: AnyPath) -> _Video | UserError | None:
    """Reads a video; None where the store has it, and the error where it cannot be read."""
    sampling = processor.video_sampling
    try:
        if writer.has(path, sampling):
            return None
        file = identify(path)
        sample = processor([{"role": "user", "content": [{"type": "video", "video": str(path)}]}])
    except UserError as error:
        return error
    except (FFmpegError, OSError, ValueError) as error:
        return UserError(f"{path}: cannot be read ({type(error).__name__}: {error})")
    return _Video(file, sampling, sample)


def _ahead(
    look: Callable[[AnyPath], _Video | UserError | None], paths: Sequence[AnyPath]
) -> Generator[tuple[AnyPath, _Video | UserError | None]]:
    """Each path with what `look` says of it, in order, looked at ahead of time."""
    waiting: deque[tuple[AnyPath, Future]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        try:
            for path in paths:
                waiting.append((path, pool.submit(look, path)))
                if len(waiting) > _AHEAD:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _pieces(model: LoadedModel, vision: VisionConfig, dtype: str, sample: Sample) -> Iterator[np.ndarray]:
    """The features of one video, (n, 1+K, D) each, a step of the tower at a time.

    A temporal patch is a chunk. Chunks, and how many there are, are padded to few sizes; while the host takes
    one step's features, the next step is under way.
    """
    ((frames, height, width),) = sample.grids
    merge, patches = vision.spatial_merge_size**2, height * width
    # Twice the merge keeps every bucket a multiple of it.
    size = round_up_bucket(patches, 2 * merge)
    most = max(1, model.model.run.patches_per_step // size)
    coords = patch_coords(height, width, vision.spatial_merge_size)
    rows = sample.patches.reshape(frames, patches, -1)

    def start(first: int) -> tuple[int, Array]:
        count = min(most, frames - first)
        chunks = min(most, round_up_bucket(count, 1))
        pixels = np.zeros((1, chunks, size, rows.shape[-1]), rows.dtype)
        places = np.zeros((1, chunks, size, 4), np.int32)
        segments = np.zeros((1, chunks, size), np.int32)
        pixels[0, :count, :patches] = rows[first : first + count]
        places[0, :count, :patches] = coords
        segments[0, :count, :patches] = 1
        run, tower = model.model.run, model.params["visual"]
        return count, _tower(vision, run, tower, pixels, places, segments).astype(dtype)

    def taken(count: int, out: Array) -> np.ndarray:
        whole = np.asarray(out).reshape(-1, size // merge, *out.shape[1:])
        return whole[:count, : patches // merge].reshape(-1, *out.shape[1:])

    under_way = start(0)
    for first in range(most, frames, most):
        following = start(first)
        yield taken(*under_way)
        under_way = following
    yield taken(*under_way)


@partial(jax.jit, static_argnums=(0, 1))
def _tower(
    vision: VisionConfig, run: Execution, tower: Params, pixels: Array, coords: Array, segments: Array
) -> Array:
    """One row of chunks → (N, 1+K, D)."""
    seen = VisionTower(vision, run).apply({"params": tower}, pixels, coords, segments)
    levels = jnp.concatenate([seen.tokens[None], seen.deepstack.astype(seen.tokens.dtype)])
    return jnp.moveaxis(levels[:, 0], 0, 1)


@jax.jit
def _checksums(arrays: list[Array]) -> list[Array]:
    """(2,) uint32 of each: sums of hashes of every number, as fp32, and its place."""

    def mixed(x: Array) -> Array:
        # The finaliser of MurmurHash3.
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def checksum(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
        return jnp.stack(
            [jnp.sum(mixed(bits ^ mixed(place + jnp.uint32(seed))), dtype=jnp.uint32) for seed in (1, 2**31)]
        )

    return [checksum(x) for x in arrays]


def _sampled(
    processor: Processor,
    fps: float | None,
    min_frames: int | None,
    max_frames: int | None,
    video_pixels: tuple[int, int] | None,
) -> Processor:
    """The processor with what was asked for, which must make sense: else every video would be refused."""
    least = processor.min_frames if min_frames is None else min_frames
    most = processor.max_frames if max_frames is None else max_frames
    if min_frames is None:
        # Asked for fewer than the folder's least: as in `ask`, what was asked for wins.
        least = min(least, most)
    processor = dataclasses.replace(
        processor,
        fps=processor.fps if fps is None else fps,
        min_frames=least,
        max_frames=most,
        video_pixels=processor.video_pixels if video_pixels is None else video_pixels,
        features=None,
    )
    sample_indices(2, 1.0, processor.fps, least, most)
    video_size(2, 64, 64, *processor.video_pixels)
    return processor


def _below(folder: AnyPath) -> Iterator[AnyPath]:
    """The videos in a folder and those in it, without hidden ones."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path)
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            yield path


def _conversed(path: AnyPath, media_root: str, say: Callable[[str], None]) -> Iterator[str]:
    """The videos of a file of conversations."""
    with path.open("rb") as file:
        authors = any(b'"video_url"' in line for line in file)
    opened = open_annotation if authors else open_conversations
    for _, source, _ in opened(SourceConfig("", path=str(path), media_root=media_root)):
        for number in range(len(source)):
            try:
                messages = source[number].messages
            except UserError as error:
                say(f"passed over: {error}")
                continue
            yield from (part["video"] for _, part in message_parts(messages) if "video" in part)
