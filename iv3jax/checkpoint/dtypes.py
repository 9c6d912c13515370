"""The dtypes of tensors in files: their names, which one holds several, and casts that keep what fits."""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from iv3jax.errors import UserError

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MANTISSA = {"F32": 23, "F16": 10, "BF16": 7}

DTYPES: Mapping[str, np.dtype] = {name: jnp.dtype(word) for name, word in _NAMES.items()}
"""safetensors' names of the dtypes that can be read → numpy's."""

KEPT = ("F32", "BF16", "F16")
"""The dtypes in which parameters can live, and which a file can be written in."""


def safetensors_name(dtype: np.dtype) -> str:
    """numpy's dtype → safetensors' name.

    Raises:
        UserError: a dtype in which no parameter is written.
    """
    for name in KEPT:
        if DTYPES[name] == dtype:
            return name
    raise UserError(f"parameters of dtype {dtype} cannot be written; {_list(KEPT)} can")


def torch_name(name: str) -> str:
    """safetensors' name → the one in a config.json: BF16 → bfloat16."""
    return _NAMES[name]


def parse_dtype(word: str) -> str:
    """`bfloat16`, `float16`, `float32` → safetensors' name.

    Raises:
        UserError: another word.
    """
    for name in KEPT:
        if _NAMES[name] == word:
            return name
    raise UserError(f"dtype {word!r} is not one of {_list(KEPT)}")


def common(names: Iterable[str]) -> str:
    """The dtype that holds the numbers of all of these without loss: their own, or F32 where they differ."""
    distinct = set(names)
    return distinct.pop() if len(distinct) == 1 else "F32"


def cast(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`value` in another dtype, rounded to nearest even. NaNs keep sign and payload, as far as it fits.

    numpy's own casts make every NaN the same one, so that a widened bf16 tensor would not come back.

    Raises:
        OverflowError: a finite number becomes infinite.
    """
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore", invalid="ignore"):
        out = value.astype(dtype)
        finite = np.isfinite(out)
    if finite.all():
        return out
    old, new = np.ascontiguousarray(value)[~finite], out[~finite]
    # numpy warns of the sort of NaN that these are looking for.
    with np.errstate(invalid="ignore"):
        lost, nan = int(np.isfinite(old).sum()), np.isnan(old)
    if lost:
        raise OverflowError(f"{lost} numbers do not fit {dtype}")
    names = {DTYPES[name]: name for name in _MANTISSA}
    if value.dtype in names and dtype in names:
        new[nan] = _cast_nans(old[nan], _MANTISSA[names[value.dtype]], dtype, _MANTISSA[names[dtype]])
        out[~finite] = new
    return out


def _cast_nans(value: np.ndarray, mantissa: int, dtype: np.dtype, new_mantissa: int) -> np.ndarray:
    """NaNs bit by bit: the sign, an exponent of ones, and the upper bits of the payload."""
    bits = bits_of(value).astype(np.uint32)
    width, new_width = 8 * value.itemsize, 8 * dtype.itemsize
    payload = bits & np.uint32((1 << mantissa) - 1)
    shift = new_mantissa - mantissa
    payload = np.left_shift(payload, shift) if shift >= 0 else np.right_shift(payload, -shift)
    # A payload that vanished would leave an infinity; the quiet bit keeps it a NaN.
    payload = np.where(payload == 0, np.uint32(1 << (new_mantissa - 1)), payload)
    exponent = np.uint32(((1 << (new_width - 1 - new_mantissa)) - 1) << new_mantissa)
    new = (bits >> (width - 1)) << (new_width - 1) | exponent | payload
    return new.astype(f"uint{new_width}").view(dtype)


def bits_of(value: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: equal exactly where every bit is."""
    return value.view(f"uint{8 * value.itemsize}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(_NAMES[name] for name in names)
