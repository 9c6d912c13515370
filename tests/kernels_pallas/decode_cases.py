"""Generated caches and queries for latent_decode, and what the tests of it compare."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.latent_decode.ops import latent_decode
from kernels_pallas.latent_decode.reference import latent_decode_reference
from kernels_pallas.latents import LARGEST, Latents, quantize


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call; `groups` of a logit scale, `pages` a row, the last slots that queries see."""

    rows: int = 2
    tokens: int = 1
    heads: int = 4
    rank: int = 128
    rope: int = 64
    slots: int = 50
    layers: int = 2
    layer: int = 1
    kind: str = "float32"
    queries: str = "float32"
    groups: int | None = None
    pages: int | None = None
    last: tuple[tuple[int, ...], ...] | None = None
    seed: int = 0

    @property
    def capacity(self) -> int:
        return self.slots * (self.pages or 1)

    def arguments(self):
        """(positional, keyword) arguments of latent_decode."""
        rng = np.random.default_rng(self.seed)

        def normal(*shape, dtype="float32"):
            return rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))

        owners = self.rows if self.pages is None else self.rows * self.pages + 1
        c = normal(self.layers, owners, self.slots, self.rank)
        k_rope = normal(self.layers, owners, self.slots, self.rope)
        if self.kind in LARGEST:
            codes, scale = jax.jit(quantize, static_argnums=1)(c, self.kind)
            # As in a cache that a TPU copies nothing of: one group more than is needed.
            scale = np.pad(np.swapaxes(scale, -1, -2), [(0, 0)] * 2 + [(0, 1), (0, 0)])
            latents = Latents(codes, scale, k_rope.astype(jnp.dtype(self.queries)))
        else:
            latents = Latents(np.concatenate([c, k_rope], axis=-1).astype(jnp.dtype(self.kind)))
        last = self.last
        if last is None:
            last = rng.integers(-1, self.capacity, (self.rows, self.tokens))
        table = None
        if self.pages is not None:
            table = rng.permutation(owners)[: self.rows * self.pages].reshape(self.rows, self.pages)
            table = np.asarray(table, np.int32)
        factor = None
        if self.groups is not None:
            factor = np.abs(normal(self.layers, owners, self.groups, self.slots)) + 0.5
        query = (self.rows, self.tokens, self.heads)
        return (
            normal(*query, self.rank, dtype=self.queries),
            normal(*query, self.rope, dtype=self.queries),
            latents,
            self.layer,
            np.asarray(last, np.int32),
            (self.rank + self.rope) ** -0.5,
        ), {"logit_scale": factor, "page_table": table}

    def run(self, implementation, **options):
        (*args, scale), kwargs = self.arguments()

        @jax.jit
        def call(args, kwargs):
            return latent_decode(*args, scale, **kwargs, **options, implementation=implementation)

        return call(args, kwargs)

    @functools.cache  # noqa: B019
    def reference(self):
        """In fp32 throughout, whatever the case's dtypes."""
        (q_latent, q_rope, latents, layer, last, scale), kwargs = self.arguments()
        q_latent, q_rope = q_latent.astype(np.float32), q_rope.astype(np.float32)
        extra = (kwargs["logit_scale"], kwargs["page_table"])
        call = jax.jit(functools.partial(latent_decode_reference, scale=scale))
        out, lse = call(q_latent, q_rope, latents, layer, last, *extra)
        return np.asarray(out[0]), np.asarray(lse[0])


def assert_same(found, expected, tolerance):
    """Outputs relative to their largest number, log-sum-exps to the larger of theirs and 1; −inf in place."""
    (out, lse), (out0, lse0) = (map(np.asarray, pair) for pair in (found, expected))
    assert out.shape == out0.shape and lse.shape == lse0.shape
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(lse0))
    seen = ~np.isneginf(lse0)
    assert not out[~seen].any()
    if seen.any():
        assert np.abs(out - out0).max() <= tolerance * np.abs(out0).max()
        assert np.abs(lse[seen] - lse0[seen]).max() <= tolerance * max(1, np.abs(lse0[seen]).max())
