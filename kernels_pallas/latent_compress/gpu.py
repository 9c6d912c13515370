"""The latent compressor for a GPU (Triton): a program a tile of tokens and a stretch of columns.

Columns of c and of k_rope are different programs of one grid. The pairs that are turned together lie side by
side in the checkpoint; a program reads their rows of the weight as two products, so that nothing is moved.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import blocks
from kernels_pallas.latent_compress.reference import Affine
from kernels_pallas.latents import GROUP, LARGEST, Latents
from kernels_pallas.product import product

_FEW = 64
"""Up to this many tokens, more and narrower programs share the reading of the weight."""


class _Inputs(NamedTuple):
    """What programs read; arrays or refs. N tokens of all rows.

    Attributes:
        x: (N, D).
        kernel: (r+e, D).
        bias: (r+e,) fp32.
        cos, sin: (N, e/2) fp32.
        c: (N, r), what the affine map takes, or None without one.
        affine: the map, its bias fp32, or None.
        modality: (N,) int32, or None.
    """

    x: Any
    kernel: Any
    bias: Any
    cos: Any
    sin: Any
    c: Any
    affine: Any
    modality: Any


class _Places(NamedTuple):
    """Where tokens go in the cache: layer (1,), each token's row and slot (N,), slot S for nowhere."""

    layer: Any
    row: Any
    slot: Any


def latent_compress(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    affine: Affine | None,
    modality: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """As `ops.latent_compress`. With an affine map, c before it comes from a product of XLA's."""
    rows, tokens, _ = x.shape
    inputs = _inputs(x, kernel, bias, cos, sin, affine, modality)
    shape = _Shape.of("latent_compress", inputs, None)
    call = _call(
        partial(_program, shape=shape),
        shape,
        jax.ShapeDtypeStruct((rows * tokens, shape.width), x.dtype),
        interpret=interpret,
    )
    return call(inputs).reshape(rows, tokens, shape.width)


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
    interpret: bool,
) -> Latents:
    """As `ops.latent_compress_into`, without the flag; of an affine map as `latent_compress`."""
    rows, tokens, _ = x.shape
    inputs = _inputs(x, kernel, bias, cos, sin, affine, modality)
    shape = _Shape.of("latent_compress_into", inputs, latents)
    token = jnp.arange(tokens, dtype=jnp.int32)
    slot = offsets[:, None] + token
    goes = (token < counts[:, None]) & (slot >= 0) & (slot < latents.capacity)
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], slot.shape)
    places = _Places(layer.reshape(1), row.reshape(-1), jnp.where(goes, slot, latents.capacity).reshape(-1))
    arrays = [array for array in latents if array is not None]
    others = len(jax.tree.leaves((inputs, places)))
    call = _call(
        partial(_write_program, shape=shape),
        shape,
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays],
        aliases={others + i: i for i in range(len(arrays))},
        interpret=interpret,
    )
    return Latents(*call(inputs, places, arrays))


def refusal(latents: Latents) -> str | None:
    """Why the cache cannot be written on a GPU."""
    size = latents.values.size
    if latents.values.dtype.itemsize == 1 and 2**31 < size <= 2**32:
        # Pallas counts in 32 bits, with a sign, up to 4 GiB.
        return f"latents.values has {size} bytes; accepted are at most 2 GiB, or more than 4 GiB"
    return None


class _Shape(NamedTuple):
    """Sizes that programs are made for.

    Attributes:
        every: N. rank: r. pairs: e/2. dim: D.
        tokens: of a program. columns: of c in a program. turned: pairs in a program. Powers of two.
        depth: of x, and of c under an affine map, that are multiplied at a time.
    """

    every: int
    rank: int
    pairs: int
    dim: int
    tokens: int
    columns: int
    turned: int
    depth: int

    @staticmethod
    def of(op: str, inputs: _Inputs, latents: Latents | None) -> "_Shape":
        count, dim = inputs.x.shape
        pairs = inputs.cos.shape[1]
        rank = inputs.kernel.shape[0] - 2 * pairs
        few = count <= _FEW
        quantized = latents is not None and latents.quantized
        key = f"dim{dim} rank{rank} rope{2 * pairs} {inputs.x.dtype.name}"
        if latents is not None:
            key += f" {latents.values.dtype.name}{' few' if few else ''}"
        heuristic = {"tokens": 16 if few else 64, "columns": 32 if few else 128, "depth": 128 if few else 64}
        sizes = blocks.pick(op, key, heuristic)
        # One program must see all numbers that share a scale.
        columns = min(GROUP if quantized else sizes["columns"], pl.next_power_of_2(rank))
        turned = min(max(sizes["columns"] // 2, 16), pl.next_power_of_2(pairs))
        return _Shape(count, rank, pairs, dim, sizes["tokens"], columns, turned, sizes["depth"])

    @property
    def width(self) -> int:
        return self.rank + 2 * self.pairs

    @property
    def stretches(self) -> int:
        """Programs that share the columns of c; the ones after them have k_rope's."""
        return pl.cdiv(self.rank, self.columns)

    @property
    def grid(self) -> tuple[int, int]:
        # Programs of the same tokens follow each other, so that they find x in the L2 cache.
        return self.stretches + pl.cdiv(self.pairs, self.turned), pl.cdiv(self.every, self.tokens)


def _call(
    program: Any, shape: _Shape, out_shape: Any, *, interpret: bool, aliases: dict[int, int] | None = None
) -> Any:
    return pl.pallas_call(
        program,
        out_shape=out_shape,
        grid=shape.grid,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )


def _inputs(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    affine: Affine | None,
    modality: jax.Array | None,
) -> _Inputs:
    """The arguments with all rows' tokens in one axis."""
    x, cos, sin = (a.reshape(-1, a.shape[-1]) for a in (x, cos, sin))
    rank = kernel.shape[0] - 2 * cos.shape[-1]
    bias = jnp.zeros((kernel.shape[0],), jnp.float32) if bias is None else bias.astype(jnp.float32)
    c = None
    if affine is not None and modality is not None:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        c = (product(x, kernel[:rank], jnp.float32, precision) + bias[:rank]).astype(x.dtype)
        affine = Affine(affine.matrix.astype(x.dtype), affine.bias.astype(jnp.float32))
        modality = modality.reshape(-1).astype(jnp.int32)
    return _Inputs(x, kernel, bias, cos, sin, c, affine, modality)


def _program(inputs: _Inputs, out: Any, *, shape: _Shape) -> None:
    """One program of `latent_compress`."""
    stretch, token, known = _place(shape)

    @pl.when(stretch < shape.stretches)
    def _() -> None:
        c, column = _latent(inputs, stretch, known, shape)
        mask = (token < shape.every)[:, None] & (column < shape.rank)[None]
        plgpu.store(out.at[token[:, None], column[None]], c.astype(out.dtype), mask=mask)

    @pl.when(stretch >= shape.stretches)
    def _() -> None:
        halves, pair = _key(inputs, stretch - shape.stretches, known, shape)
        mask = (token < shape.every)[:, None] & (pair < shape.pairs)[None]
        for half, turned in enumerate(halves):
            column = shape.rank + half * shape.pairs + pair
            plgpu.store(out.at[token[:, None], column[None]], turned.astype(out.dtype), mask=mask)


def _write_program(inputs: _Inputs, places: _Places, old: list[Any], *new: Any, shape: _Shape) -> None:
    """One program of `latent_compress_into`; `old` is the same memory as `new`, and is not looked at."""
    del old
    stretch, token, known = _place(shape)
    cache: Any = Latents(*new)
    layer = places.layer[0]
    row, slot = places.row[known], places.slot[known]
    slot = jnp.where(token < shape.every, slot, cache.values.shape[2])
    goes = slot < cache.values.shape[2]

    def put(array: Any, column: jax.Array, inside: jax.Array, value: jax.Array) -> None:
        plgpu.store(
            array.at[layer, row[:, None], slot[:, None], column[None]],
            value.astype(array.dtype),
            mask=goes[:, None] & inside[None],
        )

    @pl.when(stretch < shape.stretches)
    def _() -> None:
        c, column = _latent(inputs, stretch, known, shape)
        if cache.scale is not None:
            c, scale = _quantize(jnp.where((column < shape.rank)[None], c, 0.0), cache.values.dtype)
            plgpu.store(cache.scale.at[layer, row, stretch, slot], scale, mask=goes)
        put(cache.values, column, column < shape.rank, c)

    @pl.when(stretch >= shape.stretches)
    def _() -> None:
        halves, pair = _key(inputs, stretch - shape.stretches, known, shape)
        keys, start = (cache.values, shape.rank) if cache.k_rope is None else (cache.k_rope, 0)
        for half, turned in enumerate(halves):
            put(keys, start + half * shape.pairs + pair, pair < shape.pairs, turned)


def _quantize(c: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """As `latents.quantize` of one group: codes (tokens, columns), still fp32, and scales (tokens,)."""
    largest = LARGEST[jnp.dtype(dtype).name]
    scale = jnp.max(jnp.abs(c), axis=1) / largest
    code = c / jnp.where(scale == 0, 1.0, scale)[:, None]
    if jnp.issubdtype(dtype, jnp.integer):
        # Triton has no rounding to even.
        code = jnp.floor(code + 0.5)
    return jnp.clip(code, -largest, largest), scale


def _place(shape: _Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The program's stretch of columns, its tokens, and the same to read: the last one for those past it.

    Places to write are never bent back like that, though they are masked: interpreted, a masked number is
    written with what was there, and must not lie on another's place.
    """
    token = pl.program_id(1) * shape.tokens + jnp.arange(shape.tokens, dtype=jnp.int32)
    return pl.program_id(0), token, jnp.minimum(token, shape.every - 1)


def _latent(
    inputs: _Inputs, stretch: jax.Array, token: jax.Array, shape: _Shape
) -> tuple[jax.Array, jax.Array]:
    """c (tokens, columns) fp32, and which columns of c they are; some may be past its end."""
    column = stretch * shape.columns + jnp.arange(shape.columns, dtype=jnp.int32)
    line = jnp.minimum(column, shape.rank - 1)
    if inputs.affine is None:
        (c,) = _products(inputs.x, token, [(inputs.kernel, (), line)], shape.depth)
        return c + inputs.bias[line][None], column
    matrix, bias = inputs.affine
    text, vision = _products(inputs.c, token, [(matrix, (m,), line) for m in (0, 1)], shape.depth)
    is_text = (inputs.modality[token] == 0)[:, None]
    return jnp.where(is_text, text + bias[0, line][None], vision + bias[1, line][None]), column


def _key(
    inputs: _Inputs, stretch: jax.Array, token: jax.Array, shape: _Shape
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Both halves (tokens, turned) fp32 of turned pairs, and which pairs they are, some past the end."""
    pair = stretch * shape.turned + jnp.arange(shape.turned, dtype=jnp.int32)
    known = jnp.minimum(pair, shape.pairs - 1)
    lines = [shape.rank + 2 * known, shape.rank + 2 * known + 1]
    even, odd = _products(inputs.x, token, [(inputs.kernel, (), line) for line in lines], shape.depth)
    even, odd = even + inputs.bias[lines[0]][None], odd + inputs.bias[lines[1]][None]
    cos, sin = (a[token[:, None], known[None]] for a in (inputs.cos, inputs.sin))
    return (even * cos - odd * sin, odd * cos + even * sin), pair


def _products(
    x: Any, token: jax.Array, kernels: list[tuple[Any, tuple[int, ...], jax.Array]], depth: int
) -> tuple[jax.Array, ...]:
    """x[token] · kernel[lead, line]ᵀ in fp32 for each (kernel, lead, line)."""
    dim = x.shape[1]
    depth = min(depth, pl.next_power_of_2(dim))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        place = i * depth + jnp.arange(depth, dtype=jnp.int32)

        def load(array: Any, lead: tuple[int, ...], line: jax.Array) -> jax.Array:
            if dim % depth == 0:
                return plgpu.load(array.at[(*lead, line[:, None], place[None])])
            at = array.at[(*lead, line[:, None], jnp.minimum(place, dim - 1)[None])]
            mask = jnp.broadcast_to((place < dim)[None], (line.shape[0], depth))
            return plgpu.load(at, mask=mask, other=0.0)

        part = load(x, (), token)
        return tuple(
            total
            + jax.lax.dot_general(
                part,
                load(*kernel),
                (((1,), (1,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            for total, kernel in zip(sums, kernels, strict=True)
        )

    zeros = tuple(jnp.zeros((token.shape[0], line.shape[0]), jnp.float32) for *_, line in kernels)
    return jax.lax.fori_loop(0, pl.cdiv(dim, depth), step, zeros)
