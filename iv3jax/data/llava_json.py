"""LLaVA and ShareGPT conversations, JSON lines or one JSON list, with `<video>` and `<image>` in the text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iv3jax.data.config import SourceConfig
from iv3jax.data.record import (
    MEND,
    Pieces,
    Record,
    folder_of,
    get,
    interleave,
    lines_of,
    media_part,
    open_file,
)
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, make_path

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_KINDS = {"video": "<video>", "image": "<image>"}
# Whole strings, so that brackets inside them do not count.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


@dataclass(frozen=True, eq=False)
class Conversations:
    """A `Source` of `{"conversations": [{"from", "value"}], "video", "image"}`.

    `messages` with `role` and `content`, and `videos` and `images` with lists, mean the same.

    Attributes:
        pieces: its records.
        root: folder of relative media paths.
        fps, min_frames, max_frames: of all its videos; 0 leaves it to the config.
    """

    pieces: Pieces
    root: AnyPath
    fps: float = 0.0
    min_frames: int = 0
    max_frames: int = 0

    def __len__(self) -> int:
        return len(self.pieces)

    def name(self, index: int) -> str:
        """`LABEL:LINE`, or `LABEL[NUMBER]` in a JSON list."""
        return self.pieces.name(index)

    def __getitem__(self, index: int) -> Record:
        messages = _messages(self.pieces.parse(index), self.root, self.pieces.where(index))
        return Record(self.name(index), messages, self.fps, self.min_frames, self.max_frames)


def open_conversations(config: SourceConfig) -> list[tuple[str, Conversations, float]]:
    """The one source of a file: its name, itself, ratio 1.

    Raises:
        UserError: the file cannot be read, or is a list whose brackets do not match.
    """
    path = make_path(config.path)
    label = config.name or path.name
    is_list = open_file(path, lambda file: file.read(1 << 16)).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    pieces = _elements_of(path, label) if is_list else lines_of(path, label)
    root = folder_of(path, config.media_root)
    return [(label, Conversations(pieces, root, config.fps, config.min_frames, config.max_frames), 1.0)]


def _elements_of(path: AnyPath, label: str) -> Pieces:
    """Where the elements of a JSON list lie. The text is held only while it is looked through."""
    data = open_file(path, lambda file: file.read())
    bounds: list[tuple[int, int]] = []
    depth = start = 0
    for match in _TOKEN.finditer(data):
        token = match.group()
        if token in (b"[", b"{"):
            depth += 1
            start = match.end() if depth == 1 else start
        elif token in (b"]", b"}", b",") and (depth == 1 or token != b","):
            if depth == 1 and data[start : match.start()].strip():
                bounds.append((start, match.start()))
            depth -= token != b","
            start = match.end() if depth == 1 and token == b"," else start
            if depth == 0:
                break
    if depth:
        raise UserError(f"{path}: the JSON list never ends, its brackets do not match; fetch it again")
    starts, stops = np.array(bounds, np.int64).reshape(-1, 2).T
    return Pieces(path, label, starts, stops, np.arange(len(bounds)), "{}[{}]")


def _messages(data: Mapping[str, Any], root: AnyPath, where: str) -> list[dict]:
    """The messages of a record.

    Raises:
        UserError: a field is missing or wrong, or placeholders and media disagree.
    """
    key, role_key, text_key = ("conversations", "from", "value")
    if key not in data and "messages" in data:
        key = "messages"
    roles, texts = [], []
    for i, turn in enumerate(get(data, key, list, where)):
        here = f"{where}: {key}[{i}]"
        if not isinstance(turn, Mapping):
            raise UserError(f"{here} is not an object; {MEND}")
        if role_key not in turn and "role" in turn:
            role_key, text_key = "role", "content"
        role = get(turn, role_key, str, here)
        if role not in _ROLES:
            raise UserError(f"{here}: {role_key} {role!r} is not one of {', '.join(_ROLES)}; {MEND}")
        roles.append(_ROLES[role])
        texts.append(get(turn, text_key, str, here))
    media = {_KINDS[kind]: _media(data, kind, root, where) for kind in _KINDS}
    # LLaVA-Video writes <image> where its videos go.
    if not media["<image>"] and not any("<video>" in text for text in texts):
        media = {"<image>": media["<video>"]}
    contents = interleave(texts, media, where)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _media(data: Mapping[str, Any], kind: str, root: AnyPath, where: str) -> list[dict]:
    """The videos or images of a record, under the singular or the plural name."""
    for key in (kind, f"{kind}s"):
        value = data.get(key)
        if value is not None:
            urls = value if isinstance(value, list) else [value]
            return [media_part(kind, url, root, f"{where}: {key}[{i}]") for i, url in enumerate(urls)]
    return []
