"""The latent compressor for a TPU (Mosaic): tile by tile a product with the resident weight and what follows.

The cache is written by windows: aligned stretches of slots that are read, changed and put back, because new
tokens start at any slot and slots lie on sublanes (for the scales on lanes), where only aligned blocks move.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import blocks
from kernels_pallas.choice import chip
from kernels_pallas.latent_compress.reference import Affine
from kernels_pallas.latents import GROUP, LARGEST, Latents

_VMEM_LIMIT = 64 * 2**20

_TOGETHER = 512
"""Up to this many new tokens of all rows are compressed at once, before any is written."""


class _Tokens(NamedTuple):
    """What a tile of tokens is made of; arrays, block specs or refs.

    Attributes:
        x: (tokens, D).
        turn: (tokens, e) fp32, [cos ‖ sin], so that no lane is empty.
        modality: (tokens, 1) int32, or None without an affine map.
    """

    x: Any
    turn: Any
    modality: Any


class _Weights(NamedTuple):
    """The same for all tiles: kernel (r+e, D), bias (1, r+e) fp32, the affine map or None."""

    kernel: Any
    bias: Any
    affine: Any


def latent_compress(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    affine: Affine | None,
    modality: jax.Array | None,
    *,
    interpret: Any,
) -> jax.Array:
    """As `ops.latent_compress`."""
    rows, tokens, _ = x.shape
    width, rope = kernel.shape[0], 2 * cos.shape[-1]
    every, weights = _arguments(x, kernel, bias, cos, sin, affine, modality)
    size = blocks.pick("latent_compress", _key(x, kernel, rope), {"tokens": 256})["tokens"]
    size = min(size, rows * tokens)

    def tile(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((size, array.shape[1]), lambda i: (i, 0))

    def kernel_of_tile(tile: _Tokens, weights: _Weights, out: Any) -> None:
        c, k_rope = _compress(tile, weights, width - rope)
        out[:, : width - rope] = c.astype(out.dtype)
        out[:, width - rope :] = k_rope.astype(out.dtype)

    out = pl.pallas_call(
        kernel_of_tile,
        out_shape=jax.ShapeDtypeStruct((rows * tokens, width), x.dtype),
        grid=(pl.cdiv(rows * tokens, size),),
        in_specs=[jax.tree.map(tile, every), jax.tree.map(_resident, weights)],
        out_specs=pl.BlockSpec((size, width), lambda i: (i, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_LIMIT),
        interpret=interpret,
    )(every, weights)
    return out.reshape(rows, tokens, width)


def latent_compress_into(
    latents: Latents,
    layer: jax.Array,
    offsets: jax.Array,
    counts: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    affine: Affine | None,
    modality: jax.Array | None,
    *,
    interpret: Any,
) -> Latents:
    """As `ops.latent_compress_into`, without the flag."""
    rows, tokens, _ = x.shape
    width, rope = kernel.shape[0], 2 * cos.shape[-1]
    together = rows * tokens <= _TOGETHER
    sizes = blocks.pick(
        "latent_compress_into",
        f"{_key(x, kernel, rope)} {latents.values.dtype.name}{' few' if together else ''}",
        # A few tokens a row move the smallest window there is: one tile of sublanes.
        {"window": 32 // latents.values.dtype.itemsize if together else 256, "scale_window": 128},
    )
    window = sizes["window"]
    shape = _Shape(
        tokens, window, max(window, sizes["scale_window"]), latents.capacity, width - rope, together
    )
    every, weights = _arguments(x, kernel, bias, cos, sin, affine, modality)
    if together:
        token_specs = jax.tree.map(_resident, every)
        # A window may begin before a row's first token and end after its last.
        buffered = rows * tokens + 3 * window + 8
    else:
        every = jax.tree.map(lambda a: a.reshape(rows, tokens, a.shape[-1]), every)
        last = pl.cdiv(tokens, window) - 1
        token_specs = jax.tree.map(
            lambda a: pl.BlockSpec(
                (None, window, a.shape[-1]), lambda b, j, *_: (b, jnp.minimum(j, last), 0)
            ),
            every,
        )
        buffered = 2 * window + 8
    cache_specs = shape.cache_specs(latents)
    scalars = [jnp.asarray(a, jnp.int32).reshape(-1) for a in (layer, offsets, counts)]
    others = len(scalars) + len(jax.tree.leaves((every, weights)))
    (written,) = pl.pallas_call(
        partial(_write_window, shape=shape),
        out_shape=[jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), latents)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            # One token never lies across two windows.
            grid=(rows, 1 if tokens == 1 else pl.cdiv(tokens, window) + 1),
            in_specs=[token_specs, jax.tree.map(_resident, weights), cache_specs],
            out_specs=[cache_specs],
            scratch_shapes=[pltpu.VMEM((-(-buffered // 8) * 8, width), jnp.float32)],
        ),
        input_output_aliases={others + i: i for i in range(len(jax.tree.leaves(latents)))},
        compiler_params=pltpu.CompilerParams(
            # Where the first step compresses for all rows, the steps must run in order.
            dimension_semantics=("arbitrary" if together else "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_LIMIT,
        ),
        interpret=interpret,
    )(*scalars, every, weights, latents)
    return written


class _Shape(NamedTuple):
    """What steps (row, j) of writing are told; step j of a row looks at its j-th window of slots.

    Attributes:
        tokens: T, new tokens of a row.
        window: slots of a step, a power of two.
        scale_window: slots of a block of scales, a multiple of `window`.
        capacity: S.
        rank: r.
        together: all rows' tokens are compressed in the first step; else each step compresses `window`.
    """

    tokens: int
    window: int
    scale_window: int
    capacity: int
    rank: int
    together: bool

    def start(self, offset: Any, j: Any) -> Any:
        """The first slot of the window: aligned, and possibly one that does not exist."""
        return offset - (offset & (self.window - 1)) + j * self.window

    def block(self, size: int, offset: Any, j: Any) -> Any:
        """The block of `size` slots that holds the window, or the one nearest to it."""
        slot = jnp.clip(self.start(offset, j), 0, self.capacity - 1)
        return jax.lax.div(slot, jnp.int32(size))

    def is_new(self, size: int, offset: Any, j: Any) -> Any:
        """Whether that block is another than in the row's step before, and so holds nothing of it yet."""
        return (j == 0) | (self.block(size, offset, j) != self.block(size, offset, jnp.maximum(j - 1, 0)))

    def cache_specs(self, latents: Latents) -> Any:
        """The blocks of the cache's arrays in a step."""

        def slots_first(array: jax.Array) -> Any:
            return pl.BlockSpec(
                (None, None, self.window, array.shape[3]),
                lambda b, j, layer, offsets, counts: (layer[0], b, self.block(self.window, offsets[b], j), 0),
            )

        if latents.scale is None or latents.k_rope is None:
            return Latents(slots_first(latents.values))
        size = self.scale_window
        scale: Any = pl.BlockSpec(
            (None, None, latents.scale.shape[2], size),
            lambda b, j, layer, offsets, counts: (layer[0], b, 0, self.block(size, offsets[b], j)),
        )
        return Latents(slots_first(latents.values), scale, slots_first(latents.k_rope))


def _write_window(
    layer: Any,
    offsets: Any,
    counts: Any,
    tokens: _Tokens,
    weights: _Weights,
    old: Any,
    new: Any,
    buffer: Any,
    *,
    shape: _Shape,
) -> None:
    """One step: compresses what is due, then puts the window's tokens into it."""
    row, j = pl.program_id(0), pl.program_id(1)
    offset, count, window = offsets[row], counts[row], shape.window
    into_window = offset & (window - 1)

    if shape.together:

        @pl.when((row == 0) & (j == 0))
        def _() -> None:
            every = tokens.x.shape[0]
            _to_buffer(buffer, window, every, _compress(tokens, weights, shape.rank))

        first = window + row * shape.tokens + j * window - into_window
    else:

        @pl.when(j > 0)
        def _() -> None:
            buffer[:window] = buffer[window : 2 * window]

        @pl.when(j * window < count)
        def _() -> None:
            _to_buffer(buffer, window, window, _compress(tokens, weights, shape.rank))

        first = window - into_window

    # The array before is in `old`; a block seen in the step before already holds what that step wrote.
    for before, after, size in zip(old, new, (window, shape.scale_window, window), strict=True):
        if after is not None:

            @pl.when(shape.is_new(size, offset, j))
            def _(before: Any = before, after: Any = after) -> None:
                after[...] = before[...]

    start = shape.start(offset, j)

    # start ≤ slot < capacity holds for some token of the window only where its block is the window itself.
    @pl.when((start + window > offset) & (start < offset + count) & (start >= 0) & (start < shape.capacity))
    def _() -> None:
        latent = _rows_from(buffer, first, window)
        slots = start + jax.lax.broadcasted_iota(jnp.int32, (window, 1), 0)
        real = (slots >= offset) & (slots < offset + count)
        if old.scale is None:
            new.values[...] = jnp.where(real, latent.astype(new.values.dtype), new.values[...])
            return
        codes, scales = _quantize(latent[:, : shape.rank], new.values.dtype)
        new.values[...] = jnp.where(real, codes, new.values[...])
        k_rope = latent[:, shape.rank :].astype(new.k_rope.dtype)
        new.k_rope[...] = jnp.where(real, k_rope, new.k_rope[...])
        _write_scales(scales, new.scale, start, offset, count, shape)


def _rows_from(buffer: Any, start: Any, size: int) -> jax.Array:
    """buffer[start : start + size] for any start: Mosaic reads whole tiles of 8 rows, so they are turned."""
    aligned = pl.multiple_of(start & ~7, 8)
    rows = buffer[pl.ds(aligned, size + 8)]
    return pltpu.roll(rows, size + 8 - (start & 7), 0)[:size]


def _to_buffer(buffer: Any, start: int, size: int, latent: tuple[jax.Array, jax.Array]) -> None:
    c, k_rope = latent
    buffer[start : start + size, : c.shape[1]] = c
    buffer[start : start + size, c.shape[1] :] = k_rope


def _write_scales(
    scales: list[jax.Array], ref: Any, start: Any, offset: Any, count: Any, shape: _Shape
) -> None:
    """Puts the window's scales, a column (window, 1) a group, into their block (groups, scale_window)."""
    window, size = shape.window, shape.scale_window
    groups = ref.shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (window, max(groups, 128)), 1)
    table = jnp.zeros(lane.shape, jnp.float32)
    for group, scale in enumerate(scales):
        table = jnp.where(lane == group, scale, table)
    # A square is turned, since Mosaic turns whole tiles only.
    table = jnp.concatenate([table] * (size // window), axis=0).T[:groups]
    block = start - (start & (size - 1))
    slots = block + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    real = (slots >= start) & (slots < start + window) & (slots >= offset) & (slots < offset + count)
    real &= jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0) < len(scales)
    ref[...] = jnp.where(real, table, ref[...])


def _quantize(c: jax.Array, dtype: Any) -> tuple[jax.Array, list[jax.Array]]:
    """As `latents.quantize`, group by group: codes (tokens, r) and a scale (tokens, 1) each."""
    largest = LARGEST[jnp.dtype(dtype).name]
    codes, scales = [], []
    for start in range(0, c.shape[1], GROUP):
        part = c[:, start : start + GROUP]
        scale = jnp.max(jnp.abs(part), axis=1, keepdims=True) / largest
        code = part / jnp.where(scale == 0, 1, scale)
        if jnp.issubdtype(dtype, jnp.integer):
            code = jnp.round(code)
        codes.append(jnp.clip(code, -largest, largest).astype(dtype))
        scales.append(scale)
    return jnp.concatenate(codes, axis=1), scales


def _compress(tokens: _Tokens, weights: _Weights, rank: int) -> tuple[jax.Array, jax.Array]:
    """c (tokens, r) and the rotated k_rope (tokens, e), fp32, of the refs' tokens."""
    x = tokens.x[...]
    z = _product(x, weights.kernel[...]) + weights.bias[...]
    c, k_rope = z[:, :rank], z[:, rank:]
    if weights.affine is not None:
        c = c.astype(x.dtype)
        text, vision = (
            _product(c, weights.affine.matrix[m]) + weights.affine.bias[m : m + 1].astype(jnp.float32)
            for m in (0, 1)
        )
        c = jnp.where(tokens.modality[...] == 0, text, vision)
    return c, _rotate(k_rope, tokens.turn[...])


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x · kernelᵀ in fp32."""
    return jax.lax.dot_general(
        x,
        kernel,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _rotate(k_rope: jax.Array, turn: jax.Array) -> jax.Array:
    """As `reference.rotate_key` with turn [cos ‖ sin]."""
    rope = k_rope.shape[1]
    half = rope // 2
    source = jax.lax.broadcasted_iota(jnp.int32, (rope, rope), 0)
    target = jax.lax.broadcasted_iota(jnp.int32, (rope, rope), 1)
    even_first = source == jnp.where(target < half, 2 * target, 2 * (target - half) + 1)
    # Lanes are not moved one by one; a product with zeros and ones moves them, exactly at this precision.
    halves = jnp.dot(
        k_rope,
        even_first.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    first = jax.lax.broadcasted_iota(jnp.int32, turn.shape, 1) < half
    swapped = pltpu.roll(turn, half, 1)
    cos, sin = jnp.where(first, turn, swapped), jnp.where(first, -swapped, turn)
    return halves * cos + pltpu.roll(halves, half, 1) * sin


def _arguments(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    affine: Affine | None,
    modality: jax.Array | None,
) -> tuple[_Tokens, _Weights]:
    """The arguments with all rows' tokens in one axis."""
    turn = jnp.concatenate([cos, sin], axis=-1).astype(jnp.float32)
    if bias is None:
        bias = jnp.zeros((kernel.shape[0],), jnp.float32)
    tokens = _Tokens(
        x.reshape(-1, x.shape[-1]),
        turn.reshape(-1, turn.shape[-1]),
        None if affine is None or modality is None else modality.reshape(-1, 1).astype(jnp.int32),
    )
    if affine is not None:
        affine = Affine(affine.matrix.astype(x.dtype), affine.bias)
    return tokens, _Weights(kernel, bias.astype(jnp.float32)[None], affine)


def _resident(array: jax.Array) -> pl.BlockSpec:
    """The whole array, fetched once and held once."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim, pipeline_mode=pl.Buffered(1))


def _key(x: jax.Array, kernel: jax.Array, rope: int) -> str:
    return f"dim{x.shape[-1]} rank{kernel.shape[0] - rope} rope{rope} {x.dtype.name}"


def refusal(
    x: jax.Array, kernel: jax.Array, cos: jax.Array, affine: Affine | None, latents: Latents | None = None
) -> str | None:
    """Why a TPU cannot take these arguments; an interpreted kernel takes all."""
    if chip().platform != "tpu":
        return None
    rope, dim = 2 * cos.shape[-1], x.shape[-1]
    rank = kernel.shape[0] - rope
    for name, size in (("r", rank), ("e", rope), ("D", dim)):
        if size % 128:
            return f"{name} is {size}; a TPU takes multiples of 128"
    numbers = kernel.size + (0 if affine is None else affine.matrix.size)
    # A tile of x is worked on while the next one comes; of a tile of fp32 latents there are a few.
    tile = 256 if latents is None or x.shape[0] * x.shape[1] > _TOGETHER else _TOGETHER
    needed = x.dtype.itemsize * (numbers + 2 * tile * dim) + 4 * 6 * tile * kernel.shape[0]
    if needed > _VMEM_LIMIT:
        most = _VMEM_LIMIT >> 20
        return f"kernel {kernel.shape} and its tiles need {needed >> 20} MiB of VMEM; a TPU takes {most}"
    return None
