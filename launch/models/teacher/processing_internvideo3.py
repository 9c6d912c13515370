"""The processor of InternVideo3 for transformers: chats with images and videos → the model's inputs.

It needs no torchvision. Reading and resizing are in media_internvideo3.py.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from .media_internvideo3 import MediaSettings, given_frames, patch_rows, read_image, read_video

_FILES = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
_SIZES = {
    "image": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
    "video": {"shortest_edge": 4_096, "longest_edge": 25_165_824},
}
_FIELDS = {item.name for item in dataclasses.fields(MediaSettings)}
_START, _END = "<|vision_start|>", "<|vision_end|>"
_PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
# One video is many temporal patches with their own markers, so its placeholder goes with those around it.
_PLACEHOLDER = re.compile(
    f"(?P<image>{re.escape(_PADS['image'])})|(?P<video>{re.escape(_START + _PADS['video'] + _END)}"
    f"|{re.escape(_PADS['video'])})"
)


class InternVideo3Processor(ProcessorMixin):
    """Text with placeholders, images and videos → input_ids, attention_mask, pixels and grids.

    Attributes:
        tokenizer: the model's.
        image, video: `MediaSettings`, from preprocessor_config.json and video_preprocessor_config.json.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        image: Mapping[str, Any] | None = None,
        video: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self._settings = {
            kind: MediaSettings(
                **{"size": _SIZES[kind]} | {k: v for k, v in (given or {}).items() if k in _FIELDS}
            )
            for kind, given in (("image", image), ("video", video))
        }

    @property
    def image(self) -> MediaSettings:
        """How pictures are prepared; may be changed in place."""
        return self._settings["image"]

    @property
    def video(self) -> MediaSettings:
        """How videos are prepared; may be changed in place."""
        return self._settings["video"]

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """The arguments of `__init__`, read from the files of a model folder."""
        hub = {k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only") if k in kwargs}
        data, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        for kind, name in _FILES.items():
            path = cached_file(
                pretrained_model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub
            )
            if path is not None:
                data[kind] = json.loads(Path(path).read_text(encoding="utf-8"))
        return data, kwargs

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes the tokenizer, the chat template and the settings."""
        written = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for kind, name in _FILES.items():
            data = {"processor_class": type(self).__name__, **dataclasses.asdict(self._settings[kind])}
            if kind == "image":
                data = {k: v for k, v in data.items() if k not in ("fps", "min_frames", "max_frames")}
            (Path(save_directory) / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        return written

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        *,
        video_metadata: Any = None,
        images_kwargs: dict[str, Any] | None = None,
        videos_kwargs: dict[str, Any] | None = None,
        fps: float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        do_resize: bool | None = None,
        return_tensors: str | None = None,
        audio: None = None,
        do_sample_frames: bool = True,
        **text_kwargs: Any,
    ) -> BatchFeature:
        """Prepares a batch of texts, each with placeholders for its images and videos, in order.

        Args:
            images: paths, PIL images or uint8 (h, w, 3) arrays; may be nested by text.
            text: with `<|image_pad|>` for each image and `<|video_pad|>` for each video, as the chat
                template writes them.
            videos: paths, or pairs (frames, times) of uint8 (n, h, w, 3) and n seconds, or frames alone
                with `video_metadata`. Frames in memory are all taken; only files are sampled.
            video_metadata: for frames without times, one {"fps", "frames_indices"} each; without
                indices the frames count from 0.
            images_kwargs, videos_kwargs: settings to change for this call, such as `size`.
            fps, min_frames, max_frames, do_resize: the same for one setting of videos, or of both.
            return_tensors: "pt" for PyTorch, "np" for numpy.
            text_kwargs: for the tokenizer. Several texts are padded on the left unless told
                otherwise.

        Raises:
            ValueError: media that cannot be read, or that are not as many as the placeholders.
        """
        if text is None:
            raise ValueError("the processor needs text; images and videos stand at its placeholders")
        if audio is not None:
            raise ValueError("this model hears nothing: audio cannot be given")
        videos = list(_flat(videos))
        metadata = list(_flat(video_metadata)) or [None] * len(videos)
        if len(metadata) != len(videos):
            raise ValueError(f"{len(videos)} videos need as many video_metadata, not {len(metadata)}")
        resize = {} if do_resize is None else {"do_resize": do_resize}
        chosen = {"fps": fps, "min_frames": min_frames, "max_frames": max_frames}
        chosen = {k: v for k, v in chosen.items() if v is not None}
        image = dataclasses.replace(self.image, **resize | (images_kwargs or {}))
        video = dataclasses.replace(self.video, **resize | chosen | (videos_kwargs or {}))
        media: dict[str, list] = {
            "image": [(read_image(item, image), None) for item in _flat(images)],
            "video": [_read_video(*pair, video) for pair in zip(videos, metadata, strict=True)],
        }
        data: dict[str, Any] = {}
        shown: dict[str, list[str]] = {"image": [], "video": []}
        for kind, settings, pixels, grid in (
            ("image", image, "pixel_values", "image_grid_thw"),
            ("video", video, "pixel_values_videos", "video_grid_thw"),
        ):
            if not media[kind]:
                continue
            rows, grids = zip(*(patch_rows(frames, settings) for frames, _ in media[kind]), strict=True)
            data[pixels], data[grid] = np.concatenate(rows), np.array(grids, np.int64)
            for (_, h, w), (_, times) in zip(grids, media[kind], strict=True):
                pads = _PADS[kind] * (h * w // settings.merge_size**2)
                if times is not None:
                    stamps = ((times[0::2] + times[1::2]) / 2).tolist()
                    pads = "".join(f"<{stamp:.1f} seconds>{_START}{pads}{_END}" for stamp in stamps)
                shown[kind].append(pads)
        texts = _filled([text] if isinstance(text, str) else list(text), shown)
        defaults = {"padding": len(texts) > 1, "padding_side": "left", "add_special_tokens": False}
        text_kwargs = defaults | text_kwargs
        return BatchFeature({**self.tokenizer(texts, **text_kwargs), **data}, tensor_type=return_tensors)

    @property
    def model_input_names(self) -> list[str]:
        """All that `__call__` may return."""
        vision = ["pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"]
        return ["input_ids", "attention_mask", *vision]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The texts of generated ids."""
        return self.tokenizer.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
        )


def _flat(items: Any) -> Iterator[Any]:
    """The items of a list of lists, in order; a single item counts as a list."""
    if isinstance(items, list):
        for item in items:
            yield from _flat(item)
    elif items is not None:
        yield items


def _read_video(item: Any, metadata: Any, settings: MediaSettings) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(item, str | Path):
        return read_video(item, settings)
    if isinstance(item, tuple) and len(item) == 2:
        return given_frames(*item, settings)
    if metadata is None or not metadata.get("fps"):
        raise ValueError("video: frames need times; give (frames, times), or video_metadata with fps")
    indices = metadata.get("frames_indices")
    indices = np.arange(len(item)) if indices is None else np.asarray(indices)
    return given_frames(item, indices / metadata["fps"], settings)


def _filled(texts: list[str], shown: dict[str, list[str]]) -> list[str]:
    """The texts with every placeholder written out."""
    left = {kind: iter(items) for kind, items in shown.items()}
    found = dict.fromkeys(shown, 0)

    def fill(match: re.Match) -> str:
        kind = str(match.lastgroup)
        found[kind] += 1
        return next(left[kind], "")

    filled = [_PLACEHOLDER.sub(fill, text) for text in texts]
    for kind, items in shown.items():
        if found[kind] != len(items):
            raise ValueError(
                f"the text has {found[kind]} placeholders {_PADS[kind]}, but {len(items)} {kind}s were given"
            )
    return filled
