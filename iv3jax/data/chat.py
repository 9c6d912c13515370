"""Messages → token ids and loss mask, in the chat format of SPEC §5. Files and pixels are the processor's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from iv3jax.data.sampling import timestamp_text
from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError

Message = Mapping[str, Any]
"""{"role", "content"}; content is a text, or a list of parts.

A part is {"type": "text", "text": str}, {"type": "image", "image": path or uint8 (h, w, 3)},
{"type": "video", "video": path} or {"type": "video", "frames": uint8 (n, h, w, 3), "times": (n,) seconds}.
"""

_ROLES = ("system", "user", "assistant", "pretrain")
_PART_KEYS = {
    "text": ({"text"},),
    "image": ({"image"},),
    "video": ({"video"}, {"frames", "times"}),
}


@dataclass(frozen=True)
class VisionItem:
    """What the text must know of one image or video.

    Attributes:
        kind: "image" or "video".
        tokens: vision tokens of the image, or of *each* temporal patch of the video.
        times: seconds, one per temporal patch of a video; empty for an image.
    """

    kind: Literal["image", "video"]
    tokens: int
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """input_ids (T,) int32, and loss_mask (T,) bool: True on the tokens that are trained on."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


def parts(messages: Sequence[Message]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every part of the messages, in order, with the number of its message; a text content is one part.

    Raises:
        UserError: no messages, an unknown role or part, or a `pretrain` message beside others.
    """
    if not messages:
        raise UserError("messages: the list is empty")
    for number, message in enumerate(messages):
        name = f"message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(f'{name}: must be an object with "role" and "content"')
        if message["role"] not in _ROLES:
            raise UserError(f"{name}: role {message['role']!r} is not one of {', '.join(_ROLES)}")
        if message["role"] == "pretrain" and len(messages) > 1:
            raise UserError(f"{name}: a pretrain message must stand alone")
        content = message["content"]
        if isinstance(content, str):
            yield number, {"type": "text", "text": content}
            continue
        if not isinstance(content, Sequence):
            raise UserError(f"{name}: content must be a text or a list of parts")
        for part in content:
            _check_part(part, name)
            yield number, part


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    items: Sequence[VisionItem] = (),
    *,
    generation: bool = False,
    add_vision_id: bool = False,
) -> Rendered:
    """Writes the messages as `<|im_start|>role\\n…<|im_end|>\\n`, with every vision token written out.

    No system message is added. Trained on are the assistant's text and its `<|im_end|>`. A single
    message of role `pretrain` is written without the chat frame and with the end token appended, and
    trained on whole, but for vision start, pad and end.

    As transformers does, neighbouring texts are tokenized as one. The assistant's text is the
    exception: it is tokenized apart from its header, because generation starts after the header.

    Args:
        tokenizer: the model's.
        messages: see `Message`.
        items: the images and videos of the messages, in order of appearance.
        generation: end with the assistant's header, for the model to go on.
        add_vision_id: put `Picture k: ` or `Video k: ` in front of each item, counted per kind. Off
            by default, as in transformers' chat template, so that `ask` gives the model what users of
            Qwen3-VL give it; the authors' training configs have it on.

    Raises:
        UserError: see `parts`.
        ValueError: the items are not those of the messages.
    """
    writer = _Writer(tokenizer)
    count = {"image": 0, "video": 0}
    left = iter(items)
    by_message: list[list[Mapping[str, Any]]] = [[] for _ in messages]
    for number, part in parts(messages):
        by_message[number].append(part)
    for message, content in zip(messages, by_message, strict=True):
        role = message["role"]
        trained = role in ("assistant", "pretrain")
        if role != "pretrain":
            writer.special("<|im_start|>")
            writer.text(f"{role}\n", False)
        for part in content:
            if part["type"] == "text":
                writer.text(part["text"], trained)
                continue
            item = next(left, None)
            if item is None or item.kind != part["type"]:
                raise ValueError(f"{part['type']} expected, but the next item is {item}")
            count[item.kind] += 1
            if add_vision_id:
                name = "Picture" if item.kind == "image" else "Video"
                writer.text(f"{name} {count[item.kind]}: ", role == "pretrain")
            writer.item(item, role == "pretrain")
        if role == "pretrain":
            writer.ids((tokenizer.end_id,), True)
        else:
            writer.special("<|im_end|>", trained)
            writer.text("\n", False)
    if next(left, None) is not None:
        raise ValueError("there are more items than the messages show")
    if generation:
        writer.special("<|im_start|>")
        writer.text("assistant\n", False)
    return writer.result()


def _check_part(part: Any, name: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _PART_KEYS:
        raise UserError(f"{name}: a part's type must be one of {', '.join(_PART_KEYS)}, not {kind!r}")
    if part.keys() - {"type"} not in _PART_KEYS[kind]:
        wanted = " or ".join("+".join(sorted(keys)) for keys in _PART_KEYS[kind])
        raise UserError(f"{name}: a part of type {kind} takes {wanted}, not {', '.join(map(str, part))}")
    if kind == "text" and not isinstance(part["text"], str):
        raise UserError(f"{name}: the text of a part must be a string")


class _Writer:
    """Collects ids, tokenizing each stretch of text between special tokens at once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._runs: list[tuple[int, bool]] = []
        self._text = ""
        self._trained = False

    def text(self, text: str, trained: bool) -> None:
        if trained != self._trained:
            self._flush()
            self._trained = trained
        self._text += text

    def special(self, token: str, trained: bool = False) -> None:
        self.ids((self._tokenizer.token_id(token),), trained)

    def ids(self, ids: Sequence[int], trained: bool) -> None:
        self._flush()
        self._append(ids, trained)

    def item(self, item: VisionItem, trained: bool) -> None:
        """Vision start, pads and end, after its time for each temporal patch of a video."""
        pad = self._tokenizer.token_id(f"<|{item.kind}_pad|>")
        start, end = self._tokenizer.token_id("<|vision_start|>"), self._tokenizer.token_id("<|vision_end|>")
        block = [start, *[pad] * item.tokens, end]
        if item.kind == "image":
            self.ids(block, False)
        for seconds in item.times:
            self.text(timestamp_text(seconds), trained)
            self.ids(block, False)

    def result(self) -> Rendered:
        self._flush()
        lengths, flags = zip(*self._runs, strict=True)
        return Rendered(np.array(self._ids, np.int32), np.repeat(np.array(flags), lengths))

    def _flush(self) -> None:
        if self._text:
            self._append(self._tokenizer.encode(self._text), self._trained)
            self._text = ""

    def _append(self, ids: Sequence[int], trained: bool) -> None:
        self._ids += ids
        self._runs.append((len(ids), trained))
