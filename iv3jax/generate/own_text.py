"""Texts that a model samples by itself, to calibrate its conversion on where no text is at hand that is like
all that the model is for.
"""

from collections.abc import Iterator

import jax
import numpy as np

from iv3jax.checkpoint.load import LoadedModel
from iv3jax.data.tokenizer import plain_tokenizer
from iv3jax.errors import UserError
from iv3jax.generate.generate import generate
from iv3jax.generate.sampling import Sampling
from iv3jax.models.batch import Batch

STARTS = ("<|endoftext|>", "<|begin_of_text|>", "<s>")
"""The tokens after which a pretraining text begins, of which a tokenizer has one: Qwen's and SmolLM's,
Llama 3's, Llama 2's."""

ROWS = 32
"""Texts sampled at a time."""


def own_texts(loaded: LoadedModel, *, tokens: int, length: int, seed: int = 0) -> Iterator[tuple[str, int]]:
    """Samples texts at temperature 1 until there are `tokens` of them.

    Each starts where a pretraining text starts, and ends with any special token or after `length` tokens. One
    that leaves nothing is not given.

    Args:
        loaded: any model with a tokenizer; of a multimodal one the text model, which is shown nothing.
        tokens: in all; the last batch may give more.
        length: most tokens of a text.
        seed: of the sampling. The same seed, model and machine give the same texts.

    Yields:
        A text, and how many tokens were sampled for it.

    Raises:
        UserError: no tokenizer or one without a start, no tokens asked for, a negative seed, a length that
            the model cannot have, or a model that ends every text at once.
    """
    if loaded.folder is None:
        raise UserError("this model has no folder, so no tokenizer; load one from a model folder")
    if tokens < 1:
        raise UserError(f"tokens is {tokens}; it must be at least 1")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must be 0 or more")
    tokenizer = plain_tokenizer(loaded.folder)
    starts = [i for i in map(tokenizer.token_to_id, STARTS) if i is not None]
    if not starts:
        raise UserError(
            f"{loaded.folder}/tokenizer.json: no token {', '.join(STARTS)}, after which a text would start; "
            "take texts like those that the model is for"
        )
    stops = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    ids = np.full((ROWS, 1), starts[0], np.int32)
    prompt = Batch(ids, np.zeros((3, ROWS, 1), np.int32), np.ones_like(ids))
    rng, given = np.random.default_rng(seed), 0
    while given < tokens:
        with jax.set_mesh(loaded.mesh):
            found = generate(
                loaded.model,
                loaded.params,
                prompt,
                max_new_tokens=length,
                stop_ids=stops,
                sampling=Sampling(temperature=1.0),
                seed=int(rng.integers(2**31)),
            )
        before = given
        for row in found.tokens:
            # The limit may cut a character in two.
            text = tokenizer.decode(row, skip_special_tokens=True).rstrip("\ufffd")
            if text.strip():
                given += len(row)
                yield text, len(row)
        if given == before:
            raise UserError(f"{loaded.folder}: the model ends each of {ROWS} texts before it begins")
