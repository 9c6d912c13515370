"""Files of text, conversations, pictures and videos → the rows that a conversion is calibrated on.

What is measured on them is not here. Whoever has samples already (a benchmark, videos made in memory) packs
them with `from_samples`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from iv3jax.checkpoint.folder import TOKENIZER, usable_tokenizer
from iv3jax.data.chat import Message, parts
from iv3jax.data.collate import collate
from iv3jax.data.image import is_picture
from iv3jax.data.packing import pack_rows
from iv3jax.data.processor import Processor
from iv3jax.data.sample import Sample
from iv3jax.data.tokenizer import plain_tokenizer
from iv3jax.errors import UserError
from iv3jax.models.batch import IGNORE_LABEL, Batch
from iv3jax.models.config import ModelConfig
from iv3jax.paths import AnyPath, PathArgument, StorePath, make_path

TEXT = (".txt", ".md")
LINES = (".jsonl",)
MEDIA = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"),
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif"),
)

QUESTIONS = {"image": "Describe the picture.", "video": "Describe the video."}
"""What is asked about a picture or a video that comes without a conversation."""

_CHARACTERS_READ = 16
"""Of a text, so many characters for each token wanted are tokenized: several times what is drawn of it."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Packed rows without labels.

    Attributes:
        batches: numpy, all of the same (rows, length); those with vision share one shape of it too, and come
            after those without.
        text_tokens, vision_tokens: how many there are, padding not counted.
        dropped: the samples that are longer than a row, each with its number of tokens.
        fingerprint: sha256 of all arrays, so of everything that the rows depend on.
    """

    batches: tuple[Batch, ...]
    text_tokens: int
    vision_tokens: int
    dropped: tuple[str, ...]
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Both kinds together."""
        return self.text_tokens + self.vision_tokens

    def require_both(self) -> None:
        """Raises UserError unless there are tokens of text and of vision, as adapters are fitted on each."""
        for kind, count, what in (
            ("text", self.text_tokens, "text files"),
            ("vision", self.vision_tokens, "pictures or videos"),
        ):
            if not count:
                raise UserError(
                    f"--calibration: holds no {kind} tokens, on which the {kind} adapter is fitted; add "
                    f"{what} or give --adapters off"
                )


def read_calibration(
    files: Sequence[PathArgument],
    folder: AnyPath,
    config: ModelConfig,
    *,
    tokens: int,
    length: int,
    rows: int,
    seed: int = 0,
) -> Calibration:
    """Draws samples from files until there are `tokens` of them, in an order that only the seed decides.

    Texts (.txt, .md, and lines {"text": …} of a .jsonl) are cut into windows of `length` tokens.
    Conversations (lines {"messages": …} of a .jsonl, `chat.Message` with paths relative to the file) and
    pictures and videos given by themselves are never cut; their media are scaled so that one of them fits
    a row. Samples with vision and samples without take turns, so that each kind has half of the tokens, as
    long as there are enough. Only what is drawn is decoded.

    Args:
        files: the files, local or on a store.
        folder: the model folder, for tokenizer and processor settings.
        config: the model's.
        tokens: most tokens in all.
        length: tokens of a row.
        rows: rows of a batch.
        seed: of the order.

    Raises:
        UserError: no file given, one that is missing, broken or of an unknown kind, a conversation where the
            tokenizer has no chat tokens, media for a text-only model, or nothing that fits.
    """
    if not files:
        raise UserError(
            "--calibration: no file given; name texts (.txt, .md), conversations (.jsonl), pictures or "
            "videos like those the model is for"
        )
    reader = _Reader(folder, config, length, tokens)
    items = [item for file in files for item in reader.items(make_path(file))]
    order = np.random.default_rng(seed).permutation(len(items))
    shuffled = [items[i] for i in order]
    pools = [[item for item in shuffled if item.has_vision == vision] for vision in (False, True)]
    samples, dropped = _draw(pools, tokens, length)
    if not samples:
        why = f"; too long for {length} tokens: {', '.join(dropped)}" if dropped else ""
        raise UserError(f"--calibration: the files hold no sample that fits {tokens} tokens{why}")
    return from_samples(samples, config, length=length, rows=rows, dropped=dropped)


def from_samples(
    samples: Sequence[Sample],
    config: ModelConfig,
    *,
    length: int,
    rows: int,
    dropped: Sequence[str] = (),
) -> Calibration:
    """Packs samples into batches of `rows` rows of `length` tokens, those with vision apart from the others.

    Raises:
        UserError: a sample is longer than a row.
    """
    batches: list[Batch] = []
    for vision in (False, True):
        kind = [sample for sample in samples if bool(sample.grids) == vision]
        # As many rows as samples: the packer always finds room.
        patches = sum(t for sample in kind for t, _, _ in sample.grids)
        packed = [row for row in pack_rows(iter(kind), len(kind), length, patches) if row]
        packed += [[]] * (-len(packed) % rows)
        width = max((h * w for sample in kind for _, h, w in sample.grids), default=None)
        found = [
            collate(packed[i : i + rows], config, length=length, chunk_patches=width)._replace(labels=None)
            for i in range(0, len(packed), rows)
        ]
        batches += _same_chunks(found)
    merge = 1 if config.vision_config is None else config.vision_config.spatial_merge_size**2
    vision_tokens = sum(len(sample.patches) for sample in samples) // merge
    text_tokens = sum(map(len, samples)) - vision_tokens
    return Calibration(tuple(batches), text_tokens, vision_tokens, tuple(dropped), _fingerprint(batches))


def text_sample(ids: Sequence[int] | np.ndarray) -> Sample:
    """A sample of (T,) text tokens, without labels."""
    input_ids = np.asarray(ids, np.int32)
    positions = np.broadcast_to(np.arange(len(input_ids), dtype=np.int32), (3, len(input_ids)))
    labels = np.full(len(input_ids), IGNORE_LABEL, np.int32)
    return Sample(input_ids, positions, labels, np.zeros((0, 0), np.uint8), (), ())


@dataclass(frozen=True)
class _Item:
    """A sample that may be drawn.

    Attributes:
        name: for people: the file, and the line in it.
        has_vision: whether media belong to it.
        load: makes it.
    """

    name: str
    has_vision: bool
    load: Callable[[], Sample]


class _Reader:
    """What is in files, as items; only texts are read before they are drawn."""

    def __init__(self, folder: AnyPath, config: ModelConfig, length: int, tokens: int) -> None:
        self._folder, self._length, self._characters = folder, length, _CHARACTERS_READ * tokens
        self._processor: Processor | None = None
        self._encode: Callable[[str], list[int]]
        if usable_tokenizer(folder, config) is not None:
            self._processor = _fitted(Processor.from_dir(folder, config), length)
            self._encode = self._processor.tokenizer.encode
        else:
            inner = plain_tokenizer(folder)
            self._encode = lambda text: inner.encode(text, add_special_tokens=False).ids

    def items(self, file: AnyPath) -> Iterator[_Item]:
        kind = file.suffix.lower()
        if not file.is_file():
            problem = "is a folder; name the files in it" if file.is_dir() else "no such file; check the path"
            raise UserError(f"{file}: {problem} (--calibration)")
        if kind in TEXT:
            yield from self._windows(str(file), _text(file))
        elif kind in LINES:
            # Not splitlines: JSON may hold U+2028 and others that it cuts at.
            for number, line in enumerate(_text(file).split("\n"), start=1):
                if line.strip():
                    yield from self._line(file, f"{file}:{number}", line)
        elif kind in MEDIA:
            media = "image" if is_picture(file) else "video"
            content = [{"type": media, media: str(file)}, {"type": "text", "text": QUESTIONS[media]}]
            yield self._conversation(str(file), [{"role": "user", "content": content}], generation=True)
        else:
            known = ", ".join((*TEXT, *LINES, *MEDIA))
            raise UserError(f"{file}: a calibration file of an unknown kind; known are {known}")

    def _line(self, file: AnyPath, name: str, line: str) -> Iterator[_Item]:
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}: not valid JSON ({error})") from None
        if isinstance(data, dict) and isinstance(data.get("text"), str):
            yield from self._windows(name, data["text"])
        elif isinstance(data, dict) and isinstance(data.get("messages"), list):
            try:
                # Checks them, too.
                list(parts(data["messages"]))
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            yield self._conversation(name, [_resolved(message, file.parent) for message in data["messages"]])
        else:
            raise UserError(f'{name}: a line must be {{"text": "…"}} or {{"messages": […]}}')

    def _windows(self, name: str, text: str) -> Iterator[_Item]:
        try:
            ids = np.array(self._encode(text[: self._characters]), np.int32)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        for start in range(0, len(ids), self._length):
            window = ids[start : start + self._length]
            yield _Item(f"{name} from token {start}", False, partial(text_sample, window))

    def _conversation(self, name: str, messages: Sequence[Message], generation: bool = False) -> _Item:
        processor = self._processor
        if processor is None:
            raise UserError(
                f"{name}: a conversation, but {self._folder / TOKENIZER} has no chat tokens; give texts "
                "instead"
            )

        def load() -> Sample:
            try:
                return processor(messages, generation=generation)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None

        return _Item(name, any(part["type"] != "text" for _, part in parts(messages)), load)


def _draw(pools: list[list[_Item]], tokens: int, length: int) -> tuple[list[Sample], list[str]]:
    """Samples of at most `tokens` in all, always from the pool that has given fewer, and those too long."""
    samples: list[Sample] = []
    dropped: list[str] = []
    given = [0] * len(pools)
    waiting = [iter(pool) for pool in pools]
    open_pools = set(range(len(pools)))
    while open_pools:
        pool = min(open_pools, key=lambda i: (given[i], i))
        item = next(waiting[pool], None)
        if item is None:
            open_pools.remove(pool)
            continue
        sample = item.load()
        if len(sample) > length:
            dropped.append(f"{item.name} ({len(sample)} tokens)")
        elif sum(given) + len(sample) > tokens:
            open_pools.remove(pool)
        else:
            samples.append(sample)
            given[pool] += len(sample)
    return samples, dropped


def _fitted(processor: Processor, length: int) -> Processor:
    """With budgets under which one picture or video leaves half of a row for the text around it."""
    vision = processor.config.vision_config
    if vision is None:
        return processor
    area = (vision.patch_size * vision.spatial_merge_size) ** 2 * (length // 2)
    # A temporal patch's time and frame are up to sixteen tokens.
    frames = max(2, length // 32)

    def within(budget: tuple[int, int], most: int) -> tuple[int, int]:
        return min(budget[0], most), min(budget[1], most)

    return replace(
        processor,
        min_frames=min(processor.min_frames, frames),
        max_frames=min(processor.max_frames, frames),
        image_pixels=within(processor.image_pixels, area),
        video_pixels=within(processor.video_pixels, area * vision.temporal_patch_size),
    )


def _resolved(message: Message, folder: AnyPath) -> Message:
    """A message whose media lie relative to a folder."""
    if isinstance(message["content"], str):
        return message

    def resolve(part: Any) -> Any:
        kind = part["type"]
        if not isinstance(part.get(kind), str) or kind == "text":
            return part
        place = make_path(part[kind])
        return part if isinstance(place, StorePath) else {**part, kind: str(folder / part[kind])}

    return {**message, "content": [resolve(part) for part in message["content"]]}


def _text(file: AnyPath) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from None


def _same_chunks(batches: list[Batch]) -> list[Batch]:
    """The batches with empty vision chunks added, so that all have as many."""
    most = max((batch.patches.shape[1] for batch in batches if batch.patches is not None), default=0)

    def padded(x: np.ndarray | None) -> np.ndarray | None:
        """(B, V, …) → (B, most, …)."""
        return None if x is None else np.pad(x, [(0, 0), (0, most - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    names = ("patches", "patch_coords", "patch_segment_ids")
    return [batch._replace(**{name: padded(getattr(batch, name)) for name in names}) for batch in batches]


def _fingerprint(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in batch._asdict().items():
            if value is not None:
                digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
                digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()
