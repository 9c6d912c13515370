"""Processor: messages with videos and images → Sample, with the budgets of a model folder.

Reading and resizing are in `video.py` and `image.py`, the chat format in `chat.py`; padding, packing
and chunks in `collate.py`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iv3jax.data.chat import Message, VisionItem, parts, render
from iv3jax.data.clips import VideoSampling
from iv3jax.data.image import read_image
from iv3jax.data.patches import patchify
from iv3jax.data.positions import mrope_positions
from iv3jax.data.sample import Media, Sample
from iv3jax.data.sampling import temporal_patch_times
from iv3jax.data.tokenizer import Tokenizer
from iv3jax.data.video import read_video
from iv3jax.errors import UserError
from iv3jax.models.batch import IGNORE_LABEL
from iv3jax.models.config import ModelConfig, VisionConfig
from iv3jax.paths import AnyPath, PathArgument, make_path

if TYPE_CHECKING:
    from iv3jax.data.features import FeatureStore

IMAGE_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
NESTED = {IMAGE_FILE: "image_processor", VIDEO_FILE: "video_processor"}
"""The keys of processor_config.json under which transformers 5 writes what older ones put into two files."""


@dataclass(frozen=True)
class Processor:
    """Turns messages into a Sample. The defaults are those of Qwen3-VL's Hugging Face processors.

    Attributes:
        tokenizer: the model's.
        config: the model's; its patch and merge sizes and token ids are used.
        fps: frames per second to sample a video at, before the two limits.
        min_frames, max_frames: limits on the frames of one video.
        image_pixels: least and most pixels of one image, after resizing.
        video_pixels: least and most pixels of one whole video, all sampled frames together.
        add_vision_id: see `chat.render`.
        features: where the features of video files are taken from; None decodes the files. Token ids, times
            and positions are the same. Images, and videos in memory, are patches in any case.
    """

    tokenizer: Tokenizer
    config: ModelConfig
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    image_pixels: tuple[int, int] = (65_536, 16_777_216)
    video_pixels: tuple[int, int] = (4_096, 25_165_824)
    add_vision_id: bool = False
    features: "FeatureStore | None" = None

    @property
    def video_sampling(self) -> VideoSampling:
        """How frames are taken from a video, as a feature store notes it."""
        return VideoSampling(float(self.fps), self.min_frames, self.max_frames, *self.video_pixels)

    @staticmethod
    def from_dir(folder: PathArgument, config: ModelConfig) -> "Processor":
        """Reads the tokenizer and the two preprocessor files of a model folder.

        What transformers 5 writes into processor_config.json instead wins, as there. A missing file, or a
        missing key in it, means the default. The patch sizes of the two files are not read: the model's
        shapes follow config.json, and released files contradict it there.

        Raises:
            UserError: see `Tokenizer.from_dir`; or a file is not valid JSON, or a value in it is wrong.
        """
        folder = make_path(folder)
        image, video = _File(folder, IMAGE_FILE), _File(folder, VIDEO_FILE)
        return Processor(
            Tokenizer.from_dir(folder, config),
            config,
            fps=video.number("fps", Processor.fps),
            min_frames=int(video.number("min_frames", Processor.min_frames)),
            max_frames=int(video.number("max_frames", Processor.max_frames)),
            image_pixels=image.pixels(Processor.image_pixels),
            video_pixels=video.pixels(Processor.video_pixels),
        )

    def save(self, folder: str | Path) -> None:
        """Writes `files` into a folder."""
        for name, content in self.files().items():
            (Path(folder) / name).write_bytes(content)

    def files(self, source: PathArgument | None = None) -> dict[str, bytes]:
        """tokenizer.json and, for a model with a tower, the two preprocessor files, as transformers has them.

        `from_dir` reads back all of this processor but `add_vision_id` and `features`, for which those files
        have no field.

        Args:
            source: a model folder; what its preprocessor files say beside our fields is kept.

        Returns:
            File name → content. Sizes are always there: transformers' defaults change with its versions.

        Raises:
            UserError: a preprocessor file of `source` that is no JSON object.
        """
        found = {"tokenizer.json": self.tokenizer.to_json().encode()}
        vision = self.config.vision_config
        if vision is None:
            return found
        common = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        sampling = {"fps": self.fps, "min_frames": self.min_frames, "max_frames": self.max_frames}
        image = _merged(source, IMAGE_FILE, _IMAGE_CLASSES, common, self.image_pixels)
        video = _merged(source, VIDEO_FILE, _VIDEO_CLASSES, common | sampling, self.video_pixels)
        for name, data in ((IMAGE_FILE, image), (VIDEO_FILE, video)):
            found[name] = (json.dumps(data, indent=2) + "\n").encode()
        return found

    def __call__(self, messages: Sequence[Message], *, generation: bool = False) -> Sample:
        """Reads the media of the messages and writes them out as one Sample.

        Args:
            messages: see `chat.Message`. Pixels that come in memory are taken as they are: their
                sides must already be multiples of patch size times merge size.
            generation: end with the assistant's header.

        Raises:
            UserError: a message that is not well formed, media that cannot be read, a video that is not as
                asked for in the feature store, or media for a model without a vision tower.
        """
        loaded = [
            self._load(part, f"message {number}")
            for number, part in parts(messages)
            if part["type"] != "text"
        ]
        grids = tuple(item.grid for item in loaded)
        text = render(
            self.tokenizer,
            messages,
            [item.shown for item in loaded],
            generation=generation,
            add_vision_id=self.add_vision_id,
        )
        labels = np.full(len(text.input_ids), IGNORE_LABEL, np.int32)
        labels[:-1] = np.where(text.loss_mask[1:], text.input_ids[1:], IGNORE_LABEL)
        config = self.config
        merge = 1 if config.vision_config is None else config.vision_config.spatial_merge_size
        positions = mrope_positions(
            text.input_ids, config.image_token_id, config.video_token_id, grids, merge
        )
        patches = _join([item.patches for item in loaded], config.vision_config)
        features = tuple(item.features for item in loaded)
        return Sample(
            text.input_ids,
            positions,
            labels,
            patches,
            grids,
            tuple(item.media for item in loaded),
            () if all(ready is None for ready in features) else features,
        )

    def _load(self, part: Mapping[str, Any], name: str) -> "_Loaded":
        """Reads and cuts one image or video; `name` is its message's, for errors."""
        vision = self.config.vision_config
        if vision is None:
            raise UserError(
                f"{name}: there is a part of type {part['type']}, but this model has no vision tower"
            )
        if self.features is not None and "video" in part:
            return _stored(self.features, str(part["video"]), self.video_sampling, vision)
        media, frames = self._frames(part, name)
        side = vision.patch_size * vision.spatial_merge_size
        if media.size[0] % side or media.size[1] % side:
            raise UserError(f"{name}: frames of {media.size} pixels; both sides must be multiples of {side}")
        patches, grid = patchify(
            frames, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        )
        return _Loaded(media, grid, vision.spatial_merge_size, patches)

    def _frames(self, part: Mapping[str, Any], name: str) -> tuple[Media, np.ndarray]:
        """One part's record and its pixels, uint8 (n, h, w, 3), which `patchify` evens out."""
        path: str | None = None
        if part["type"] == "image":
            image = part["image"]
            if not isinstance(image, np.ndarray):
                path = str(image)
                image = read_image(path, min_pixels=self.image_pixels[0], max_pixels=self.image_pixels[1])
            frames, times, total = image[None], np.zeros(1), 1
        elif "frames" in part:
            frames, times = np.asarray(part["frames"]), np.asarray(part["times"], np.float64)
            total = len(frames)
        else:
            path = str(part["video"])
            video = read_video(
                path,
                fps=self.fps,
                min_frames=self.min_frames,
                max_frames=self.max_frames,
                min_pixels=self.video_pixels[0],
                max_pixels=self.video_pixels[1],
            )
            frames, times, total = video.frames, video.times, video.total_frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
            raise UserError(
                f"{name}: pixels must be uint8 (…, height, width, 3), not {frames.dtype} {frames.shape}"
            )
        if times.shape != (len(frames),):
            raise UserError(f"{name}: {len(frames)} frames need as many times, not {times.shape}")
        if part["type"] == "video" and len(times) % 2:
            times = np.append(times, times[-1])
        height, width = frames.shape[1:3]
        return Media(part["type"], path, len(times), total, tuple(times.tolist()), (height, width)), frames


@dataclass(frozen=True)
class _Loaded:
    """One image or video: its record, its grid, and its patch rows or its features."""

    media: Media
    grid: tuple[int, int, int]
    merge: int
    patches: np.ndarray
    features: np.ndarray | None = None

    @property
    def shown(self) -> VisionItem:
        """What the text needs of it."""
        times: tuple[float, ...] = ()
        if self.media.kind == "video":
            times = tuple(temporal_patch_times(np.array(self.media.times)).tolist())
        return VisionItem(self.media.kind, self.grid[1] * self.grid[2] // self.merge**2, times)


def _stored(store: "FeatureStore", path: str, sampling: VideoSampling, vision: VisionConfig) -> _Loaded:
    """A video out of a feature store."""
    clip = store.find(path, sampling)
    features = store.read(clip)
    tower = (1 + len(vision.deepstack_visual_indexes), vision.out_hidden_size)
    if features.shape != (math.prod(clip.grid) // vision.spatial_merge_size**2, *tower):
        raise UserError(
            f"{path}: its features in {store.folder} are {features.shape[1:]} a token, but this model's "
            f"tower gives {tower}; use a store of this model's tower"
        )
    media = replace(clip.media, path=path)
    none = np.zeros((0, vision.patch_dim), np.uint8)
    return _Loaded(media, clip.grid, vision.spatial_merge_size, none, features)


class _File:
    """A preprocessor file, or its part of processor_config.json; without them, defaults."""

    def __init__(self, folder: AnyPath, name: str):
        self._path, nested = folder / PROCESSOR_FILE, read_object(folder / PROCESSOR_FILE).get(NESTED[name])
        if nested is None:
            self._path = folder / name
            nested = read_object(self._path)
        elif not isinstance(nested, dict):
            raise UserError(f"{self._path}: {NESTED[name]} is {nested!r}, not an object")
        self._data: dict[str, Any] = nested

    @property
    def content(self) -> dict[str, Any]:
        """All of it; empty without a file."""
        return self._data

    def number(self, key: str, default: float) -> float:
        return self._positive(key, self._data.get(key), default)

    def pixels(self, default: tuple[int, int]) -> tuple[int, int]:
        """The budget of `size`. Older files say `min_pixels`, `max_pixels`, which win, as in transformers."""
        size = self._data.get("size") or {}
        if not isinstance(size, dict):
            raise UserError(f"{self._path}: size is {size!r}, not an object")
        found = [
            self._positive(key, self._data.get(old, size.get(key)), value)
            for old, key, value in zip(
                ("min_pixels", "max_pixels"), ("shortest_edge", "longest_edge"), default, strict=True
            )
        ]
        return int(found[0]), int(found[1])

    def _positive(self, key: str, value: Any, default: float) -> float:
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{self._path}: {key} is {value!r}, not a positive number")
        return value


def read_object(path: AnyPath) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        UserError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no JSON object")
    return data


_IMAGE_CLASSES = {"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}
_VIDEO_CLASSES = {"processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"}


def _merged(
    source: PathArgument | None,
    name: str,
    classes: Mapping[str, str],
    ours: Mapping[str, Any],
    pixels: tuple[int, int],
) -> dict[str, Any]:
    """A preprocessor file: what the source's says, over the default classes and under our fields."""
    theirs = {} if source is None else _File(make_path(source), name).content
    size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    data = {**classes, **theirs, **ours, "size": size}
    # The older names win over `size` in transformers, so they must say the same.
    for key, value in zip(("min_pixels", "max_pixels"), pixels, strict=True):
        if key in data:
            data[key] = value
    return data


def _join(patches: Sequence[np.ndarray], vision: VisionConfig | None) -> np.ndarray:
    if len(patches) == 1:
        return patches[0]
    if patches:
        return np.concatenate(patches)
    return np.zeros((0, 0 if vision is None else vision.patch_dim), np.uint8)
