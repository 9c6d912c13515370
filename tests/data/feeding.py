"""A small corpus of clips, pictures and text in the authors' format, and feeds over it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from media import numbered_frame, write_video
from PIL import Image

from iv3jax.data.config import DataConfig, SourceConfig
from iv3jax.data.feed import Fed
from iv3jax.data.lanes import LaneFeed, open_feed
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import TINY_FOLDER, Tokenizer
from iv3jax.models.presets import preset

CONFIG = preset("tiny")
PROCESSOR = Processor(Tokenizer.from_dir(TINY_FOLDER, CONFIG), CONFIG)
ROWS, LENGTH, CHUNKS, CHUNK_PATCHES = 4, 160, 6, 16
SAMPLING = DataConfig(
    fps=10.0,
    min_frames=2,
    max_frames=6,
    image_pixels=(32 * 32, 64 * 64),
    video_pixels=(32 * 32, 6 * 64 * 64),
    look_ahead=2,
)


def line(number: int, text: str, *media: tuple[str, str]) -> dict[str, Any]:
    """A question about some (kind, url), and an answer."""
    content: list[dict[str, Any]] = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": url, "image_wh": [64, 32]}} for kind, url in media
    ]
    marks = {"video": "<VIDEO_CONTEXT>", "image": "<IMG_CONTEXT>"}
    text = "".join(marks[kind] + "\n" for kind, _ in media) + text
    content.append({"type": "text", "text": text})
    answer = {"role": "assistant", "content": f"Answer {number}"}
    return {"id": number, "messages": [{"role": "user", "content": content}, answer]}


def write_corpus(folder: Path, videos: int = 6, pictures: int = 3, texts: int = 5) -> Path:
    """An annotation with so many lines of each kind, and the media beside it."""
    lines = []
    for i in range(videos):
        write_video(folder / f"v{i}.mp4", 3 + 2 * i, height=32, width=32 * (1 + i % 2), rate=10)
        lines.append(line(len(lines), "What is shown? " * (1 + i % 3), ("video", f"v{i}.mp4")))
    for i in range(pictures):
        Image.fromarray(numbered_frame(i, 32, 64)).save(folder / f"p{i}.png")
        lines.append(line(len(lines), "Describe it.", ("image", f"p{i}.png")))
    for i in range(texts):
        lines.append(line(len(lines), "How long is a piece of string? " * (1 + 2 * i % 5)))
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


def source(path: Path, **fields: Any) -> SourceConfig:
    """An annotation as a source."""
    return SourceConfig("internvideo3", path=str(path), **fields)


def config_of(*sources: SourceConfig, **fields: Any) -> DataConfig:
    """Sampling small enough for tests."""
    return replace(SAMPLING, sources=sources, **fields)


@contextmanager
def feed(config: DataConfig, *, host: int = 0, hosts: int = 1, **fields: Any) -> Iterator[LaneFeed]:
    """A feed of ROWS rows, closed at the end."""
    opened = open_feed(
        config,
        fields.pop("processor", PROCESSOR),
        CONFIG,
        host=host,
        hosts=hosts,
        **{
            "rows": ROWS,
            "length": LENGTH,
            "chunks": CHUNKS,
            "chunk_patches": CHUNK_PATCHES,
            "seed": 7,
        }
        | fields,
    )
    try:
        yield opened
    finally:
        opened.close()


def take(config: DataConfig, count: int, **fields: Any) -> list[Fed]:
    """The first batches of a feed."""
    with feed(config, **fields) as opened:
        return [next(opened) for _ in range(count)]


def assert_same(got: list[Fed], want: list[Fed]) -> None:
    """The same batches bit for bit, with the same names and states."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.names == b.names
        np.testing.assert_array_equal(a.state, b.state)
        for name, x, y in zip(a.batch._fields, a.batch, b.batch, strict=True):
            assert (x is None) == (y is None), name
            if x is not None:
                assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), name


def joined(parts: list[list[Fed]]) -> list[Fed]:
    """The global batches out of the hosts' ones."""
    whole = []
    for feds in zip(*parts, strict=True):
        fields = {}
        for name in feds[0].batch._fields:
            values = [getattr(fed.batch, name) for fed in feds]
            axis = 1 if name == "positions" else 0
            fields[name] = None if values[0] is None else np.concatenate(values, axis)
        names = tuple(row for fed in feds for row in fed.names)
        whole.append(
            Fed(feds[0].batch._replace(**fields), names, np.concatenate([fed.state for fed in feds]))
        )
    return whole
