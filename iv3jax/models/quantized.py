"""Weight-only quantisation: the formats, quantising on the host, and products that dequantise by blocks.

What is quantised is every `layers.Linear`: the projections of decoder, tower and mergers, and lm_head.
Embeddings (also where they are tied to the head), norms and biases stay as they are. Which format a model
has is its `Execution.weights`; the modules declare the parameters, `checkpoint.load` fills them.

A kernel (*in, *out) has its input axes flattened to K rows, cut into groups (the last may be shorter):

    kernel_codes   int8 (K, *out), or uint8 (⌈K/2⌉, *out) with rows 2j and 2j+1 in byte j's low and high half
    kernel_scale   bf16 (⌈K/group⌉, *out)

    int8   groups of 128 rows; w ≈ code · scale, scale = max|w| / 127
    nf4    groups of 64 rows; w ≈ LEVELS[code] · scale, scale = max|w|  (QLoRA, arXiv 2305.14314, appendix E)

Scales are rounded to bf16 before the codes are chosen, so the codes make up for the rounding: on normal
weights the relative error is 0.65 % (int8) and 9.2 % (nf4) with either, less than 0.2 % of it due to bf16,
while scales in fp32 would make 4.5 bits a weight of nf4's 4.25, and 8.25 of int8's 8.125.

Own code rather than qwix 0.1.8, because its products of bf16 activations with quantised weights dequantise
the complete weight first, its nf4 codes are uint4, a byte each on the host, and it finds weights by replacing
jax.lax.dot_general while a model runs, where ours declare their parameters and logical axes themselves.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.typing import Array, DType

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat4: quantiles of the normal distribution, −1, 0 and 1 among them (QLoRA, appendix E)."""

BLOCK = 1 << 22
"""Most elements of a kernel dequantised at one time: 8 MB in bf16. One group of rows may be more."""

_SLAB = 1 << 20
"""Elements quantised at one time on the host: what it needs beside the tensor and its codes."""


@dataclass(frozen=True)
class Format:
    """How a kernel is stored.

    Attributes:
        group: input rows that share a scale.
        packed: rows in one element of the codes.
        code_dtype: dtype of the codes.
        code_rms: root mean square of a code drawn uniformly, in units of the scale.
    """

    group: int
    packed: int
    code_dtype: DType
    code_rms: float

    def codes_shape(self, rows: int, out_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `kernel_codes` for a kernel of this many input rows."""
        return (-(-rows // self.packed), *out_shape)

    def scale_shape(self, rows: int, out_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `kernel_scale` for a kernel of this many input rows."""
        return (-(-rows // self.group), *out_shape)

    def init_codes(self, key: Array, shape: tuple[int, ...], dtype: DType) -> Array:
        """Random codes, every value equally often: the initialiser of `kernel_codes`."""
        bits = jax.random.bits(key, shape, jnp.uint8)
        return bits if self.packed == 2 else jnp.maximum(bits.astype(jnp.int8), jnp.int8(-127)).astype(dtype)


FORMATS = {
    "int8": Format(128, 1, jnp.int8, 127 / math.sqrt(3)),
    "nf4": Format(64, 2, jnp.uint8, math.sqrt(sum(level**2 for level in LEVELS) / len(LEVELS))),
}
"""What `Execution.weights` may name."""


class NotFiniteError(ValueError):
    """A tensor that has no scale."""


def quantize(kernel: np.ndarray, inputs: int, weights: str) -> tuple[np.ndarray, np.ndarray]:
    """One kernel on the host → its codes and scales, as the head of this file describes them.

    Args:
        kernel: (*in, *out) floats of any kind, strided as they may be.
        inputs: how many of its axes are input axes.
        weights: a key of FORMATS.

    Raises:
        NotFiniteError: a weight is infinite or not a number.
    """
    how = FORMATS[weights]
    rows, out_shape = math.prod(kernel.shape[:inputs]), kernel.shape[inputs:]
    # Columns first, as checkpoints lie: a view of them then, and a group's rows are neighbours.
    columns = kernel.reshape(rows, -1).T
    count, groups = len(columns), -(-rows // how.group)
    codes = np.empty(how.codes_shape(rows, (count,)), how.code_dtype)
    scale = np.empty((groups, count), jnp.bfloat16)
    step = max(1, _SLAB // rows)
    for start in range(0, count, step):
        part = columns[start : start + step].astype(np.float32)
        part = np.pad(part, ((0, 0), (0, groups * how.group - rows))).reshape(len(part), groups, how.group)
        largest = np.max(np.abs(part), axis=-1)
        rounded = (largest / np.float32(127 if weights == "int8" else 1)).astype(jnp.bfloat16)
        divisor = np.where(rounded == 0, 1, rounded).astype(np.float32)
        if not np.isfinite(divisor).all():
            raise NotFiniteError("holds weights that are not finite, which cannot be quantised")
        part /= divisor[..., None]
        chosen = _codes(part.reshape(len(part), -1), weights)[:, : len(codes)]
        codes[:, start : start + step], scale[:, start : start + step] = chosen.T, rounded.T
    return codes.reshape(-1, *out_shape), scale.reshape(-1, *out_shape)


def _codes(scaled: np.ndarray, weights: str) -> np.ndarray:
    """(columns, rows) in units of the scale → the nearest codes, packed along the rows."""
    if weights == "int8":
        # The scale's rounding can leave the largest weight at 127.25.
        return np.clip(np.rint(scaled), -127, 127).astype(np.int8)
    index = np.zeros(scaled.shape, np.uint8)
    for low, high in pairwise(LEVELS):
        index += scaled > np.float32((low + high) / 2)
    return index[:, 0::2] | index[:, 1::2] << 4


def dequantize(codes: Array, scale: Array, rows: int, weights: str, dtype: DType) -> Array:
    """Codes and scales → (rows, *out) in `dtype`, each product rounded once."""
    if weights == "int8":
        values = codes.astype(jnp.float32)
    else:
        index = jnp.stack([codes & 15, codes >> 4], axis=1)
        values = _levels(index.reshape(-1, *codes.shape[1:])[:rows])
    spread = jnp.repeat(scale, FORMATS[weights].group, axis=0)[:rows]
    return (values * spread.astype(jnp.float32)).astype(dtype)


def _levels(index: Array) -> Array:
    """LEVELS[index] in fp32, bit by bit: selects run as vectors everywhere, look-ups in a table do not."""
    values: list = [jnp.float32(level) for level in LEVELS]
    for bit in range(4):
        is_set = (index >> bit & 1).astype(bool)
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def matmul(x: Array, codes: Array, scale: Array, weights: str, dtype: DType, block: int = BLOCK) -> Array:
    """x·W with at most `block` elements of W dequantised at one time.

    Gradients flow to x, whose backward pass dequantises by blocks again; the weights have none.

    Args:
        x: (…, K). codes, scale: as `quantize` makes them.
        weights: a key of FORMATS.
        dtype: dtype of x and W in the products, which are summed in fp32.

    Returns:
        (…, *out) fp32.
    """
    return _product(_How(weights, x.shape[-1], dtype, block), x.astype(dtype), codes, scale)


@dataclass(frozen=True)
class _How:
    """What is known of a product before any number is: format, K, dtype of the factors, `block`."""

    weights: str
    rows: int
    dtype: DType
    block: int

    @property
    def group(self) -> int:
        return FORMATS[self.weights].group

    def steps(self, out_shape: tuple[int, ...]) -> int:
        """How many blocks of equally many groups to cut the rows into; 1 takes a shorter last one too."""
        columns, whole = math.prod(out_shape), self.rows // self.group
        if self.rows * columns <= self.block or not whole:
            return 1
        fitting = [
            n for n in range(1, whole) if whole % n == 0 and whole // n * self.group * columns <= self.block
        ]
        return fitting[0] if fitting else whole


class _Blocks(NamedTuple):
    """A kernel cut into `steps` blocks and a rest, the rows of its last and shorter group.

    Block i takes groups i, i+steps, …: where the rows are split over devices, each device has a share of
    every block and cuts it out of its own rows. codes (size, steps, rows of a group, *out), scale
    (size, steps, *out).
    """

    how: _How
    steps: int
    codes: Array
    scale: Array
    rest: Array | None

    @classmethod
    def of(cls, how: _How, steps: int, x: Array, codes: Array, scale: Array) -> Self:
        whole, out_shape = how.rows // how.group, scale.shape[1:]
        packed = how.group // FORMATS[how.weights].packed
        rest = None
        if left := how.rows - whole * how.group:
            codes_left = here(x, codes[whole * packed :])
            rest = dequantize(codes_left, scale[whole:], left, how.weights, how.dtype)
        codes = codes[: whole * packed].reshape(-1, steps, packed, *out_shape)
        return cls(how, steps, codes, scale[:whole].reshape(-1, steps, *out_shape), rest)

    def block(self, i: Array) -> Array:
        """Block i, dequantised."""
        codes, scale = (
            jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False) for x in (self.codes, self.scale)
        )
        rows = len(scale) * self.how.group
        return dequantize(codes.reshape(-1, *scale.shape[1:]), scale, rows, self.how.weights, self.how.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, x: Array, codes: Array, scale: Array) -> Array:
    """x (…, K) · W → (…, *out) fp32."""
    if (steps := how.steps(scale.shape[1:])) == 1:
        return _times(x, dequantize(here(x, codes), scale, how.rows, how.weights, how.dtype))
    blocks = _Blocks.of(how, steps, x, codes, scale)
    lead, whole = x.shape[:-1], how.rows - how.rows % how.group
    parts = x[..., :whole].reshape(*lead, -1, steps, how.group)

    def add(i: Array, total: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(parts, i, parts.ndim - 2, keepdims=False)
        return total + _times(part.reshape(*lead, -1), blocks.block(i))

    y = jax.lax.fori_loop(0, steps, add, jnp.zeros((*lead, *scale.shape[1:]), jnp.float32))
    return y if blocks.rest is None else y + _times(x[..., whole:], blocks.rest)


def _forward(how: _How, x: Array, codes: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(how, x, codes, scale), (codes, scale)


def _backward(how: _How, saved: tuple[Array, Array], dy: Array) -> tuple[Array, np.ndarray, Array]:
    """dx (…, K) = dy (…, *out) · Wᵀ."""
    codes, scale = saved
    out_shape = scale.shape[1:]
    dy = dy.astype(how.dtype)
    if (steps := how.steps(out_shape)) == 1:
        kernel = dequantize(here(dy, codes), scale, how.rows, how.weights, how.dtype)
        dx = _times_transposed(dy, kernel)
    else:
        blocks = _Blocks.of(how, steps, dy, codes, scale)
        lead = dy.shape[: dy.ndim - len(out_shape)]
        parts = jax.lax.map(lambda i: _times_transposed(dy, blocks.block(i)), jnp.arange(steps))
        parts = jnp.moveaxis(parts.reshape(steps, *lead, -1, how.group), 0, -2)
        dx = parts.reshape(*lead, -1)
        if blocks.rest is not None:
            dx = jnp.concatenate([dx, _times_transposed(dy, blocks.rest)], axis=-1)
    return dx.astype(how.dtype), np.zeros(saved[0].shape, jax.dtypes.float0), jnp.zeros_like(saved[1])


_product.defvjp(_forward, _backward)


def here(x: Array, codes: Array) -> Array:
    """The codes, but not before x is known.

    XLA moves what does not change out of a loop, and what needs nothing to the front of a program: without
    this, decoding with unrolled layers would dequantise the whole model once and keep it. A cosine is never
    above 2, also that of a NaN, which XLA does not know; it sees through barriers, on a CPU at least.
    """
    never = jnp.cos(x[(0,) * x.ndim].astype(jnp.float32)) > 2
    return codes + never.astype(codes.dtype)


def _times(x: Array, kernel: Array) -> Array:
    """(…, K) · (K, *out) → (…, *out) fp32."""
    return jnp.tensordot(x, kernel, axes=1, preferred_element_type=jnp.float32)


def _times_transposed(dy: Array, kernel: Array) -> Array:
    """(…, *out) · (K, *out)ᵀ → (…, K) fp32."""
    out = tuple(range(1, kernel.ndim))
    axes = tuple(range(dy.ndim - len(out), dy.ndim))
    return jnp.tensordot(dy, kernel, axes=(axes, out), preferred_element_type=jnp.float32)
