"""What a compiled program says of itself: collectives and their bytes, read from its text."""

import math
import re

_BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "s8": 1, "u8": 1}
_SHAPE = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def collective_bytes(text: str) -> dict[str, int]:
    """Kind of collective → bytes of the results on one device, from `compiled.as_text()`.

    A loop's body counts once, so programs are looked at with their loops unrolled or of one turn.
    """
    found: dict[str, int] = {}
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            shapes = [
                math.prod(int(n) for n in dims.split(",") if n) * _BYTES.get(dtype, 1)
                for dtype, dims in _SHAPE.findall(match[1])
            ]
            # An asynchronous one names its operand and then its result.
            size = shapes[1] if match[3] and len(shapes) > 1 else sum(shapes)
            found[match[2]] = found.get(match[2], 0) + size
    return found
