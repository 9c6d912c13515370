"""Wording: the words of observations as tokens, made on the host so that a compiled graph can write them.

An observation is a user turn of the chat format, and must be tokenized as `data.chat.render` tokenizes that
turn. Byte-level BPE splits text into words first, so pieces that end where a word ends can be put together.
That they can is checked here, for the tokenizer at hand. What is said when is the tools' business.
"""

from typing import NamedTuple

import numpy as np

from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError
from iv3jax.models.batch import Array

_PIECES = {
    "point": ".",
    "dash": "-",
    "open": "<",
    "close": " seconds>",
    "close_line": " seconds>\n",
    "nothing": "nothing found",
    "no_window": "a window must start before it ends and before ",
    "no_crop": "a crop needs left before right, top before bottom and a time before ",
    "seconds": " seconds",
    "and_more": "and ",
    "more": " more\n",
    "noted": "noted",
    "zoom": "zoom <",
    "crop": "crop <",
    "close_step": " seconds> (step ",
    "note": "note",
    "step": " (step ",
    "step_end": ")\n",
    "dropped": " dropped\n",
    "no_memory": "nothing in memory",
    "hypothesis": "hypothesis:",
    "no_hypothesis": "no hypothesis\n",
    "supported": "supported",
    "unseen": "not looked at",
}


class Wording(NamedTuple):
    """int32 token ids; (n,) where nothing else is said.

    Attributes:
        begin: the end of the assistant's turn after its `<|im_end|>`, and the header of the user's.
        finish: the end of the user's turn, and the assistant's header.
        vision_start, vision_end, video_pad: (1,) the tokens around and in a temporal patch.
        digits: (10,) the token of each digit.
        the others: pieces of text, as `_PIECES` has them.
    """

    begin: Array
    finish: Array
    vision_start: Array
    vision_end: Array
    video_pad: Array
    digits: Array
    point: Array
    dash: Array
    open: Array
    close: Array
    close_line: Array
    nothing: Array
    no_window: Array
    no_crop: Array
    seconds: Array
    and_more: Array
    more: Array
    noted: Array
    zoom: Array
    crop: Array
    close_step: Array
    note: Array
    step: Array
    step_end: Array
    dropped: Array
    no_memory: Array
    hypothesis: Array
    no_hypothesis: Array
    supported: Array
    unseen: Array


def make_wording(tokenizer: Tokenizer) -> Wording:
    """The words as this tokenizer writes them.

    Raises:
        UserError: the tokenizer lacks a vision token, or joins digits or pieces into larger tokens.
    """

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text), np.int32)

    def special(token: str) -> np.ndarray:
        return np.array([tokenizer.token_id(token)], np.int32)

    _check(tokenizer)
    begin, end = special("<|im_start|>"), special("<|im_end|>")
    return Wording(
        begin=np.concatenate([ids("\n"), begin, ids("user\n")]),
        finish=np.concatenate([end, ids("\n"), begin, ids("assistant\n")]),
        vision_start=special("<|vision_start|>"),
        vision_end=special("<|vision_end|>"),
        video_pad=special("<|video_pad|>"),
        digits=np.concatenate([ids(str(digit)) for digit in range(10)]),
        **{name: ids(text) for name, text in _PIECES.items()},
    )


def text_tokens(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """A timed text as it follows its time in an observation, on one line: without and with the line's end."""
    line = " " + " ".join(text.split())
    return tokenizer.encode(line), tokenizer.encode(line + "\n")


def _check(tokenizer: Tokenizer) -> None:
    """Every way in which pieces meet, joint and apart."""
    p = _PIECES
    time, whole = ["1", "2", "0", "3", ".", "5"], ["1", "0"]
    span = [*time, p["dash"], *time]
    text = " it is here.\n"
    evidence = [*span, p["close_step"], *whole, p["step_end"]]
    note = [" the hero is 45.", p["step"], *whole, p["step_end"]]
    turns = [
        [p["open"], *time, p["close"]],
        [p["open"], *span, p["close"], text, p["open"], *span, p["close"], " 5 more (two)\n"],
        [p["open"], *time, p["close_line"], p["open"], *span, p["close_line"], p["and_more"], "7", p["more"]],
        [p["no_window"], *time, p["seconds"]],
        [p["no_crop"], *time, p["seconds"]],
        [p["zoom"], *evidence, p["crop"], *evidence, p["note"], *note, p["note"], *note, "2", p["dropped"]],
        [p["hypothesis"], *note, p["zoom"], *evidence, p["supported"]],
        [p["no_hypothesis"], p["crop"], *evidence, p["unseen"]],
        *[[p[name]] for name in ("nothing", "noted", "no_memory")],
    ]
    for turn in turns:
        pieces = ["user\n", *turn]
        if tokenizer.encode("".join(pieces)) != [i for piece in pieces for i in tokenizer.encode(piece)]:
            raise UserError(
                f"the tokenizer joins words or digits of {''.join(turn)!r}; the loop needs one that keeps "
                "them apart, as Qwen's does"
            )
    if any(len(tokenizer.encode(str(digit))) != 1 for digit in range(10)):
        raise UserError("the tokenizer has digits of several tokens; the loop needs one token for each")
