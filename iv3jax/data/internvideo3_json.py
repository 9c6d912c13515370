"""The authors' training files (SPEC §5): an annotation in JSON lines, and a meta file that names several."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iv3jax.data.config import SourceConfig
from iv3jax.data.record import (
    MEND,
    Pieces,
    Record,
    folder_of,
    get,
    get_number,
    interleave,
    is_number,
    lines_of,
    media_part,
    open_file,
    parse_object,
)
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, make_path

PLACEHOLDERS = {"video_url": "<VIDEO_CONTEXT>", "image_url": "<IMG_CONTEXT>"}
"""What stands in a text for a part of each type, in the same message."""

_ROLES = ("system", "user", "assistant", "pretrain")
# Fields that would change what is trained on, if they were heeded.
_UNKNOWN = ("tool_calls", "thinking", "reasoning_content", "conversation_timestamps")
_SET_FIELDS = ("annotation", "media_root", "sample_ratio", "fps", "min_frames", "max_frames")
_MOST_SIDE, _MOST_FRAMES, _MOST_FPS = 65_536, 1e9, 1e5


@dataclass(frozen=True, eq=False)
class Annotation:
    """A `Source` of an annotation's lines: `{"id", "messages": [{"role", "content"}]}`.

    Attributes:
        pieces: its lines.
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
        """`LABEL:LINE`."""
        return self.pieces.name(index)

    def __getitem__(self, index: int) -> Record:
        data = self.pieces.parse(index)
        messages = read_messages(data, self.root, self.pieces.where(index))
        return Record(self.name(index), messages, self.fps, self.min_frames, self.max_frames)


def open_annotation(config: SourceConfig) -> list[tuple[str, Annotation, float]]:
    """The one source of an annotation file: its name, itself, ratio 1."""
    path = make_path(config.path)
    label = config.name or path.name
    root = folder_of(path, config.media_root)
    source = Annotation(lines_of(path, label), root, config.fps, config.min_frames, config.max_frames)
    return [(label, source, 1.0)]


def open_meta(config: SourceConfig) -> list[tuple[str, Annotation, float]]:
    """The sets of a meta file, each with its name, its source, and its `sample_ratio`.

    A set's own `fps`, `min_frames`, `max_frames` win over the config's. Relative paths in the file are
    relative to its folder, or to `media_root` of the config for media.

    Raises:
        UserError: the file is damaged, or a field of a set is unknown or wrong.
    """
    path = make_path(config.path)
    found = []
    for name, values in parse_object(open_file(path, lambda file: file.read()), str(path)).items():
        where = f"{path}: {name}"
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: is not an object with annotation, media_root, …; {MEND}")
        unknown = sorted(values.keys() - set(_SET_FIELDS))
        if unknown:
            raise UserError(f"{where}: {unknown[0]!r} is not one of {', '.join(_SET_FIELDS)}; take it out")
        annotation = get(values, "annotation", str, where)
        root = folder_of(path, config.media_root)
        if values.get("media_root"):
            root = root / get(values, "media_root", str, where)
        label = f"{config.name}/{name}" if config.name else name
        source = Annotation(
            lines_of(make_path(annotation) if "://" in annotation else path.parent / annotation, label),
            root,
            get_number(values, "fps", where, _MOST_FPS) or config.fps,
            int(get_number(values, "min_frames", where, _MOST_FRAMES, whole=True)) or config.min_frames,
            int(get_number(values, "max_frames", where, _MOST_FRAMES, whole=True)) or config.max_frames,
        )
        found.append((label, source, get_number(values, "sample_ratio", where, 1e6) or 1.0))
    return found


def read_messages(data: Mapping[str, Any], root: AnyPath, where: str) -> list[dict]:
    """The messages of one line.

    Raises:
        UserError: a field is missing, wrong or not supported, or placeholders and media disagree.
    """
    return [
        _message(message, root, f"{where}: messages[{i}]")
        for i, message in enumerate(get(data, "messages", list, where))
    ]


def _message(message: Any, root: AnyPath, where: str) -> dict:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} is not an object with role and content; {MEND}")
    role = get(message, "role", str, where)
    if role not in _ROLES:
        raise UserError(f"{where}: role {role!r} is not one of {', '.join(_ROLES)}; {MEND}")
    for key in _UNKNOWN:
        if message.get(key):
            raise UserError(f"{where}: {key} is not supported; {MEND}")
    if message.get("loss") not in (None, role in ("assistant", "pretrain")):
        raise UserError(f"{where}: loss is set by the role here, not by the message; {MEND}")
    if isinstance(message.get("content"), str):
        content: list[Any] = [{"type": "text", "text": message["content"]}]
    else:
        content = get(message, "content", list, where)
    texts: list[str] = []
    media: dict[str, list[dict]] = {placeholder: [] for placeholder in PLACEHOLDERS.values()}
    for i, part in enumerate(content):
        here = f"{where}: content[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind in PLACEHOLDERS:
            media[PLACEHOLDERS[kind]].append(_media(part, kind, root, here))
        else:
            raise UserError(f"{here}: is not a text, a video_url or an image_url; {MEND}")
    return {"role": role, "content": [part for parts in interleave(texts, media, where) for part in parts]}


def _media(part: Mapping[str, Any], kind: str, root: AnyPath, where: str) -> dict[str, str]:
    """One video or image. What is said of its size and rate is checked, not used: the file itself is read."""
    values = get(part, kind, dict, where)
    if "url" not in values:
        raise UserError(f"{where}: {kind}.url is missing; {MEND}")
    sides = values.get("image_wh")
    if sides is not None:
        whole = isinstance(sides, list) and all(is_number(side, _MOST_SIDE, whole=True) for side in sides)
        if not whole or len(sides) != 2:
            raise UserError(f"{where}: {kind}.image_wh is not [width, height] in pixels; {MEND}")
    for key, most in (("origin_video_length", _MOST_FRAMES), ("origin_fps", _MOST_FPS)):
        get_number(values, key, where, most)
    return media_part(kind.removesuffix("_url"), values["url"], root, f"{where}: {kind}.url")
