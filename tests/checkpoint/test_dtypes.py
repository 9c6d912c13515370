"""Casts between the dtypes of files: numpy's rounding, and NaNs that survive being widened."""

import ml_dtypes
import numpy as np
import pytest

from iv3jax.checkpoint.dtypes import DTYPES, bits_of, cast, common, parse_dtype, safetensors_name, torch_name
from iv3jax.errors import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("narrow", [BF16, np.dtype(np.float16)])
def test_every_number_of_16_bits_survives_being_widened(narrow):
    """All 65 536 patterns: NaN payloads, signalling ones too, zeros of both signs, subnormals, infinities."""
    value = np.arange(2**16, dtype=np.uint16).view(narrow)
    wide = cast(value, np.dtype(np.float32))
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(bits_of(cast(wide, narrow)), bits_of(value))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(np.isnan(wide), np.isnan(value))
        whole = np.isfinite(value)
    np.testing.assert_array_equal(wide[whole].astype(np.float64), value[whole].astype(np.float64))


def test_rounding_is_to_nearest_even():
    value = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    bits = bits_of(value).astype(np.uint64)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(bits_of(cast(value, BF16)), expected)
    np.testing.assert_array_equal(cast(value, np.dtype(np.float16)), value.astype(np.float16))


def test_nans_that_are_narrowed_stay_nans():
    """Even where the whole payload lies in the bits that are cut."""
    bits = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0x7FABCDEF, 0x7F800000, 0xFF800000], np.uint32)
    for narrow in (BF16, np.dtype(np.float16)):
        out = cast(bits.view(np.float32), narrow)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(np.isnan(out), [True, True, True, True, False, False])
        np.testing.assert_array_equal(np.signbit(out), [False, True, False, False, False, True])


def test_numbers_that_do_not_fit():
    value = np.array([1.0, 7e4, -1e5, np.inf], np.float32)
    with pytest.raises(OverflowError, match="2 numbers do not fit float16"):
        cast(value, np.dtype(np.float16))
    assert np.isinf(cast(value[[0, 3]], np.dtype(np.float16))[1])
    assert cast(value, value.dtype) is value


def test_names():
    assert [parse_dtype(word) for word in ("float32", "bfloat16", "float16")] == ["F32", "BF16", "F16"]
    assert [torch_name(name) for name in DTYPES] == ["float64", "float32", "float16", "bfloat16"]
    assert safetensors_name(BF16) == "BF16"
    assert (common(["BF16", "BF16"]), common(["BF16", "F16"]), common(["F32", "BF16"])) == (
        "BF16",
        "F32",
        "F32",
    )
    for word in ("float8", "F32", "", "float64"):
        with pytest.raises(UserError, match="is not one of float32, bfloat16, float16"):
            parse_dtype(word)
    with pytest.raises(UserError, match="int8 cannot be written"):
        safetensors_name(np.dtype(np.int8))
