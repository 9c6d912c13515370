"""The whole model: tower, embeddings, decoder, head. Text-only decoders are the same without a tower."""

import dataclasses
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from iv3jax.models.attention import zero_padding
from iv3jax.models.batch import Batch, fake_batch
from iv3jax.models.cache import Cache
from iv3jax.models.config import ModelConfig
from iv3jax.models.decoder import Decoder, Place, gather_visual
from iv3jax.models.layers import Embedding, Execution, Linear
from iv3jax.models.vision import VisionTower, VisualFeatures
from iv3jax.sharding import constrain
from iv3jax.typing import Array, Params


class Output(NamedTuple):
    """hidden (B, T, D) after the final norm, and the cache if one was given.

    There are no logits here: at 64 K tokens they would be 40 GB. Ask `logits` for the positions needed.
    """

    hidden: Array
    cache: Cache | None


class InternVideo3(nn.Module):
    """`model.apply({"params": params}, batch)` → Output; also `method="encode"` and `method="logits"`."""

    config: ModelConfig
    run: Execution = dataclasses.field(default_factory=Execution)

    def setup(self) -> None:
        c, run = self.config, self.run
        text = c.text_config
        self.embed_tokens = Embedding(text.vocab_size, text.hidden_size, ("vocab", "embed"), run)
        self.language_model = Decoder(text, run)
        if not text.tie_word_embeddings:
            self.lm_head = Linear((text.hidden_size,), (text.vocab_size,), ("embed",), ("vocab",), False, run)
        if c.vision_config is not None:
            self.visual = VisionTower(c.vision_config, run)

    def encode(self, batch: Batch) -> VisualFeatures | None:
        """The vision tokens of a batch, None if it holds no patches."""
        if batch.patches is None:
            return None
        return self.visual(batch.patches, batch.patch_coords, batch.patch_segment_ids)

    def __call__(
        self, batch: Batch, visual: VisualFeatures | None = None, cache: Cache | None = None
    ) -> Output:
        """Runs the decoder over a batch.

        Args:
            batch: tokens, and patches unless `visual` is given.
            visual: features from `encode`, so that a prompt fed in chunks is looked at once.
            cache: the tokens before these; each row's new tokens follow its own length.
        """
        visual = self.encode(batch) if visual is None else visual
        hidden = self.embed_tokens(batch.input_ids)
        index = batch.visual_index if visual is not None else None
        if visual is not None and index is not None:
            seen = gather_visual(visual.tokens.astype(hidden.dtype), index)
            hidden = jnp.where(index[..., None] >= 0, seen, hidden)
        place = Place(batch.positions, batch.segment_ids, batch.order)
        hidden, cache = self.language_model(hidden, place, visual, index, cache)
        return Output(hidden, cache)

    def logits(self, hidden: Array) -> Array:
        """(…, D) → (…, vocab_size) fp32."""
        if self.config.text_config.tie_word_embeddings:
            table = self.embed_tokens.embedding.astype(self.run.dtype)
            out = jnp.matmul(hidden.astype(self.run.dtype), table.T, preferred_element_type=jnp.float32)
        else:
            out = self.lm_head.product(hidden, jnp.float32)
        return constrain(out, *[None] * (out.ndim - 1), "act_vocab")

    def everything(self, batch: Batch) -> Array:
        """Touches every parameter: what `init` runs."""
        return self.logits(self(batch).hidden[:, -1:])


@lru_cache(maxsize=8)
def boxed_params(model: InternVideo3) -> Any:
    """Abstract parameters with their logical axes: shapes only, no memory. Traced once for each model."""
    batch = fake_batch(model.config, rows=1, length=8, chunks=1)
    init = partial(model.init, method="everything")
    return jax.eval_shape(init, jax.random.key(0), batch)["params"]


def init_params(model: InternVideo3, rng: Array, shardings: Any = None) -> Params:
    """New random parameters, each made where its sharding says."""
    batch = fake_batch(model.config, rows=1, length=8, chunks=1)

    def make(key: Array) -> Params:
        params = nn.unbox(model.init(key, batch, method="everything")["params"])
        layers = params["language_model"].get("layers")
        if layers is not None:
            layers["self_attn"] = zero_padding(model.config.text_config, layers["self_attn"])
        return params

    return jax.jit(make, out_shardings=shardings)(rng)
