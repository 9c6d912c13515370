"""How the next token is chosen from the logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from iv3jax.errors import UserError
from iv3jax.typing import Array


@dataclass(frozen=True)
class Sampling:
    """Names as in transformers' GenerationConfig.

    Attributes:
        temperature: 0 is greedy.
        top_p: keep the fewest most likely tokens that hold this much probability.
        top_k: keep this many most likely tokens; 0 keeps all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (all) or more")


def filtered(logits: Array, sampling: Sampling) -> Array:
    """(B, V) logits after temperature, top-k and top-p, −inf where a token may not be chosen."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        # A token stays while the ones before it hold less than top_p; the first always stays.
        kept = jnp.concatenate([jnp.zeros_like(before[..., :1]), before[..., :-1]], -1) < sampling.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def choose(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """(B, V) fp32 logits and one key a row → (B,) int32 tokens."""
    if sampling.temperature == 0:
        return _first_highest(logits)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    return _first_highest(filtered(logits, sampling) + noise)


def _first_highest(x: Array) -> Array:
    """argmax of each row, int32, as two reductions: one that keeps two numbers is slow on a CPU."""
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)
    at = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), places, x.shape[-1] - 1)
    return jnp.min(at, axis=-1)
