"""Makes `tokenizer.json` of the `tiny` preset: 512 byte-level BPE entries, special tokens named as Qwen's.

`python -m iv3jax.data.tiny.build` writes it anew beside this file; the result is always the same.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
)
"""In the order of their ids, 505 to 511: the last four are those of the `tiny` preset."""

VOCAB_SIZE = 512

# Qwen's pattern (every digit alone), with the end of a timestamp as a word of its own.
PATTERN = r" seconds>|\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

DEMO = (
    "Which number is shown at 12.5 seconds?",
    "When is the number 42 shown?",
    "Number 42 is shown from 3.0 to 7.5 seconds.",
    "No number is shown.",
    "List the numbers shown.",
    "<12.5 seconds>",
    "Video 1: ",
    "Picture 1: ",
    " video",
    "system",
    "user",
    "assistant",
)
"""What the synthetic tasks say, so that it becomes short."""

WORDS = (
    "the of and to a in is it you that was for on are as with they at be this have from or one had by not "
    "but what all were we when your can there use an each which do how their if will up other about out "
    "then them these so some would make like into time has look more see no way could than first been its "
    "now find down did get come made may part over new only me work year give our before after between "
    "begin end start stop video frame image picture answer question number second minute left right "
    "describe where who why yes"
)
"""Common English words and those of the field, for everything else a user may ask."""


def build() -> str:
    """The content of `tokenizer.json`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The demo's lines weigh most, so that their words are merged whole.
    corpus = [*DEMO * 40, *(" " + word for word in WORDS.split() for _ in range(4)), WORDS]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} entries, not {VOCAB_SIZE}")
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    path = Path(__file__).with_name("tokenizer.json")
    path.write_text(build(), encoding="utf-8")
    print(f"wrote {path}")
