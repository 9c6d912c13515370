"""The whole model: tower, embeddings, decoder, head. Text-only decoders are the same without a tower."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from iv3jax.errors import UserError
from iv3jax.models.attention import zero_padding
from iv3jax.models.batch import Batch, fake_batch
from iv3jax.models.cache import Cache
from iv3jax.models.config import ModelConfig
from iv3jax.models.decoder import Decoder, Place, gather_visual
from iv3jax.models.layers import Embedding, Execution, Linear
from iv3jax.models.vision import VisionTower, VisualFeatures
from iv3jax.sharding import constrain
from iv3jax.typing import Array, DType, Params


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
        """The vision tokens of a batch, of its patches and then its features; None if it holds neither."""
        parts = []
        if batch.patches is not None:
            parts.append(self.visual(batch.patches, batch.patch_coords, batch.patch_segment_ids))
        if batch.features is not None:
            parts.append(_ready(batch.features, self.run.dtype))
        if len(parts) < 2:
            return parts[0] if parts else None
        return VisualFeatures(
            jnp.concatenate([part.tokens for part in parts], axis=1),
            jnp.concatenate([part.deepstack.astype(self.run.dtype) for part in parts], axis=2),
        )

    def __call__(
        self, batch: Batch, visual: VisualFeatures | None = None, cache: Cache | None = None
    ) -> Output:
        """Runs the decoder over a batch.

        Args:
            batch: tokens, and patches or features unless `visual` is given.
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


def _ready(features: Array, dtype: DType) -> VisualFeatures:
    """(B, N, 1+K, D) features as the tower would have returned them."""
    features = constrain(jnp.asarray(features, dtype), "batch", None, None, "hidden")
    return VisualFeatures(features[:, :, 0], jnp.moveaxis(features[:, :, 1:], 2, 0))


@lru_cache(maxsize=8)
def boxed_params(model: InternVideo3) -> Any:
    """Abstract parameters with their logical axes: shapes only, no memory. Traced once for each model.

    Raises:
        UserError: a target of `run.lora` is no linear layer of the model.
    """
    batch = fake_batch(model.config, rows=1, length=8, chunks=1)
    init = partial(model.init, method="everything")
    params = jax.eval_shape(init, jax.random.key(0), batch)["params"]
    how = model.run.lora
    if how is not None and how.rank:
        found = {"/".join(path[:-1]) for path in flatten_dict(params) if path[-1] == "lora_a"}
        if lost := sorted(set(how.targets) - found):
            raise UserError(f"lora.targets: {lost[0]!r} is no linear layer of the model")
    return params


def init_params(model: InternVideo3, rng: Array, shardings: Any = None, only: Sequence[str] = ()) -> Params:
    """New random parameters, each made where its sharding says.

    Args:
        shardings: of the parameters that are made.
        only: names of leaves, such as lora_a; none but these are made then.
    """
    batch = fake_batch(model.config, rows=1, length=8, chunks=1)

    def make(key: Array) -> Params:
        params = nn.unbox(model.init(key, batch, method="everything")["params"])
        layers = params["language_model"].get("layers")
        if layers is not None:
            layers["self_attn"] = zero_padding(model.config.text_config, layers["self_attn"])
        if only:
            params = unflatten_dict({k: x for k, x in flatten_dict(params).items() if k[-1] in only})
        return params

    return jax.jit(make, out_shardings=shardings)(rng)
