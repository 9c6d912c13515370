"""Programs for chips that are not here: what tests of compiled kernels share."""

import importlib.util
import re

import jax
import numpy as np
import pytest

from iv3jax.chips import compile_for

CHIPS = ("v5e", "v5p", "h100")

has_compilers = all(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda12_plugin"))
needs_compilers = pytest.mark.skipif(not has_compilers, reason="needs libtpu and jax-cuda12-plugin")


def struct(shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype) if dtype != "bfloat16" else jax.numpy.bfloat16)


def moved_arrays(compiled, smallest: int) -> list[str]:
    """Copies and transposes in a compiled program of at least `smallest` numbers."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(r"= \(?\w+\[([\d,]*)\]\S* (copy|transpose|copy-start)\(", line)
        if match and np.prod([int(n) for n in match[1].split(",") if n], dtype=np.int64) >= smallest:
            found.append(line.strip()[:200])
    return found


__all__ = ["CHIPS", "compile_for", "moved_arrays", "needs_compilers", "struct"]
