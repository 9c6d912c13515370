"""Text to token ids and back, over a folder's `tokenizer.json`.

Special tokens go in by id, never by their text: what a user writes stays text. The chat format that
places them is in `chat.py`.
"""

import codecs
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.paths import PathArgument, make_path

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""The special tokens without which no chat can be written."""

VISION_TOKENS = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
"""The special tokens of pictures and videos, with the config.json key that repeats each id."""

TINY_FOLDER = Path(__file__).parent / "tiny"
"""The 512-entry tokenizer of the `tiny` preset, package data made by `tiny/build.py`."""

# Timestamps and chat headers come back in every sample; long texts do not and would only fill memory.
_CACHED_CHARACTERS = 64


class Tokenizer:
    """A byte-level BPE tokenizer (Qwen, SmolLM, Llama 3 and the tiny preset's are).

    Token ids are Python ints. Build one with `from_dir`; it pickles, for data workers.
    """

    def __init__(self, text: str, source: str):
        """`text` is the content of a `tokenizer.json`; `source` names it in errors.

        Raises:
            UserError: the content is no tokenizer, is not byte-level, or lacks a chat token.
        """
        self._text = text
        self._source = source
        inner = _parsed(text, source)
        inner.encode_special_tokens = True
        self._inner = inner
        self._added = inner.get_added_tokens_decoder()
        decoder: Any = inner.decoder
        if decoder is None or b'"ByteLevel"' not in decoder.__getstate__():
            raise UserError(f"{source}: its decoder is not byte-level; only byte-level BPE is supported")
        for token in CHAT_TOKENS:
            self._check_special(token)
        self._encode_short = lru_cache(maxsize=65536)(self._encode)
        self._bytes: dict[int, bytes] = {}

    @staticmethod
    def from_dir(folder: PathArgument, config: ModelConfig | None = None) -> "Tokenizer":
        """Reads `tokenizer.json` of a model folder and, with `config`, checks that the two agree.

        Raises:
            UserError: the file is missing or corrupt, a special token the chat needs is missing, a
                vision token's id is not the config's, or the model has fewer embeddings than tokens.
        """
        tokenizer = Tokenizer(*_content(folder))
        if config is not None:
            tokenizer.check(config)
        return tokenizer

    def check(self, config: ModelConfig) -> None:
        """Raises UserError where this tokenizer and the model's config disagree."""
        if config.vision_config is not None:
            for token, key in VISION_TOKENS.items():
                self._check_special(token)
                ours, theirs = self.token_id(token), getattr(config, key)
                if ours != theirs:
                    raise UserError(f"{self._source}: {token} is {ours}, but config.json's {key} is {theirs}")
        rows = config.text_config.vocab_size
        if self.vocab_size > rows:
            raise UserError(
                f"{self._source}: {self.vocab_size} tokens, but config.json's vocab_size is {rows}"
            )

    @property
    def vocab_size(self) -> int:
        """The largest token id plus one, special tokens included."""
        return max(self._inner.get_vocab_size(), *(i + 1 for i in self._added))

    def same_vocabulary(self, other: "Tokenizer") -> bool:
        """Whether every id of both is the same token."""
        mine, theirs = (one._inner.get_vocab(with_added_tokens=True) for one in (self, other))
        return bool(mine == theirs)

    @property
    def end_id(self) -> int:
        """The end token of a `pretrain` sample: `<|im_end|>`, Qwen3-VL-Instruct's `eos_token`."""
        return self.token_id("<|im_end|>")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids on which generation stops: `<|im_end|>` and `<|endoftext|>`."""
        return self.token_id("<|im_end|>"), self.token_id("<|endoftext|>")

    def token_id(self, token: str) -> int:
        """The id of one token, given as its string.

        Raises:
            UserError: there is no such token.
        """
        index = self._inner.token_to_id(token)
        if index is None:
            raise UserError(f"{self._source}: has no token {token}")
        return index

    def encode(self, text: str) -> list[int]:
        """The ids of plain text. Nothing is added, and `<|im_end|>` in it becomes ordinary pieces.

        Tokens that the file lists but does not mark special (Qwen's `<think>`, `<tool_call>`) are found.

        Raises:
            UserError: the text holds half of a surrogate pair, which no encoding can write.
        """
        return list(self._encode_short(text) if len(text) <= _CACHED_CHARACTERS else self._encode(text))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids; invalid UTF-8 becomes U+FFFD, and ids without a token are skipped."""
        return self._join(ids, skip_special).decode("utf-8", errors="replace")

    def text_bytes(self, index: int) -> bytes:
        """The bytes that a token of ordinary text stands for; none if it is special, added or unknown.

        They may be a part of a character, which `decode` would turn into another one.
        """
        return b"" if index in self._added else self._token_bytes(index)

    def to_json(self) -> str:
        """The content of the `tokenizer.json` this was read from."""
        return self._text

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickle forgets encode_special_tokens.
        return Tokenizer, (self._text, self._source)

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self._inner.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError):
            raise UserError(
                f"{text[:40]!r}: the text holds an unpaired surrogate; it is no valid Unicode"
            ) from None

    def _check_special(self, token: str) -> None:
        added = self._added.get(self.token_id(token))
        if added is None or not added.special:
            raise UserError(f"{self._source}: {token} is not marked special, so text could forge it")

    def _join(self, ids: Iterable[int], skip_special: bool) -> bytes:
        return b"".join(
            self._token_bytes(int(i)) for i in ids if not (skip_special and self._is_special(int(i)))
        )

    def _is_special(self, index: int) -> bool:
        added = self._added.get(index)
        return added is not None and added.special

    def _token_bytes(self, index: int) -> bytes:
        """The bytes a token stands for. Added tokens are stored as text, the others in BPE's alphabet."""
        known = self._bytes.get(index)
        if known is None:
            token = self._inner.id_to_token(index) or ""
            known = token.encode() if index in self._added else bytes(_BYTE_OF[c] for c in token)
            self._bytes[index] = known
        return known


class StreamDecoder:
    """Decodes tokens as they are generated, holding back characters that are not complete yet.

    What `push` and a last `flush` return, joined, equals `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The new text that these ids complete, perhaps empty."""
        return self._decoder.decode(self._tokenizer._join(ids, self._skip_special))

    def flush(self) -> str:
        """The end of the stream: U+FFFD if a character stayed incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def plain_tokenizer(folder: PathArgument) -> tokenizers.Tokenizer:
    """The tokenizer of any folder, chat tokens or not, byte-level or not: good for plain text.

    Raises:
        UserError: tokenizer.json is missing or corrupt.
    """
    return _parsed(*_content(folder))


def _content(folder: PathArgument) -> tuple[str, str]:
    """The content of a folder's tokenizer.json, and its place."""
    path = make_path(folder) / "tokenizer.json"
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: no such file; copy the tokenizer.json of the model that the weights came from: there "
            "is none, so no text can be read or written"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a valid tokenizer.json ({error})") from None


def _parsed(text: str, source: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json's content."""
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    # The library raises nothing narrower than Exception.
    except Exception as error:
        raise UserError(f"{source}: not a valid tokenizer.json ({error})") from None
    # A file may carry its trainer's cut and padding; applied silently, they would eat prompts.
    inner.no_truncation()
    inner.no_padding()
    return inner
