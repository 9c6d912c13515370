"""One line of `iv3 bench conversion --part text`, of any layout, and on other calibration text.

    python -m iv3jax.bench.conversion_row iv3 --rope-dim 24 --rank 96 --budget dynamic \\
        [--distilled [--steps 4]]
    python -m iv3jax.bench.conversion_row transmla --rope-dim 32 --freqfold 4 --rank 88 \\
        --calibrated-on calibration own

`--calibrated-on` takes texts, each for the same share of as many tokens: the handbook ("calibration", the
default), what is not tested of the two that are, and "own", texts that the source samples. Without
`--freqfold` each layer chooses its pairs. Prints the line as JSON: on each text the excess log-perplexity
over the source's and its standard error, nats a token. Figures and steps are shared with the bench
(`runs/bench_conversion`); those of other calibration text lie in a folder below.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from iv3jax.bench.conversion import FOLDER
from iv3jax.bench.conversion_distill import RATES
from iv3jax.bench.conversion_text import CALIBRATION, HANDBOOK, METHODS, OWN, ROWS, Bench, Point
from iv3jax.bench.packages import CACHE
from iv3jax.bench.texts import TEXTS
from iv3jax.errors import UserError


def main(arguments: Sequence[str]) -> int:
    """Converts and measures; the exit code."""
    parser = ArgumentParser(
        prog="python -m iv3jax.bench.conversion_row",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--rope-dim", type=int, required=True)
    parser.add_argument("--freqfold", type=int)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--budget", choices=("uniform", "dynamic", "none"), default="uniform")
    parser.add_argument("--distilled", action="store_true")
    parser.add_argument("--steps", type=int, help="of the distillation (default: one pass, 16)")
    parser.add_argument("--calibrated-on", choices=(*TEXTS, OWN), nargs="+", default=[HANDBOOK])
    given = vars(parser.parse_args(arguments))
    try:
        found = measure(given.pop("calibrated_on"), Point(row=given["method"], size="", **given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


def measure(calibrated_on: Sequence[str], point: Point) -> dict[str, Any]:
    """The line.

    Raises:
        UserError: what a conversion, the text or its package cannot be or have.
    """
    if point.freqfold is None and point.method != "iv3":
        raise UserError(f"--freqfold is needed for {point.method}: only iv3 lets layers choose their pairs")
    if point.distilled and point.method not in RATES:
        raise UserError(
            f"--distilled: there is a learning rate for {' and '.join(RATES)} only, not {point.method}"
        )
    if point.steps is not None and not (point.distilled and 1 <= point.steps <= CALIBRATION // ROWS):
        raise UserError(f"--steps {point.steps}: from 1 to {CALIBRATION // ROWS}, beside --distilled")
    folder = FOLDER if list(calibrated_on) == [HANDBOOK] else FOLDER / "-".join(calibrated_on)
    return Bench.open(folder, CACHE, calibrated_on).measured(point)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
