"""Files of questions that were chosen (`iv3 data choose`), one a line, those that were not kept included."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from iv3jax.errors import UserError
from iv3jax.mcr.environment import Chosen
from iv3jax.paths import PathArgument, make_path


@dataclass(frozen=True)
class Choice:
    """A question and why it was kept or not.

    Attributes:
        number, name: as in Chosen.
        scores: of the model's own answers: temporal IoU, or 1 for right and 0 for wrong.
        teacher: of the teacher's, for distillation.
        kept: whether it is worth learning from.
    """

    number: int
    name: str
    scores: tuple[float, ...]
    teacher: tuple[float, ...]
    kept: bool


def write_choices(path: PathArgument, choices: Iterable[Choice]) -> None:
    """Writes the file, over one that is there."""
    place = make_path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(asdict(one)) + "\n" for one in choices))


def read_questions(path: PathArgument) -> list[Chosen]:
    """The questions that a file keeps.

    Raises:
        UserError: no such file, a line that is no choice, or none that is kept.
    """
    place = make_path(path)
    try:
        lines = place.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: no such file of questions; iv3 data choose writes one") from None
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
            chosen = Chosen(int(one["number"]), str(one["name"]))
            keep = bool(one["kept"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path}: line {number}: not a line of iv3 data choose") from None
        if keep:
            kept.append(chosen)
    if not kept:
        raise UserError(f"{path}: keeps no question; choose among more of them")
    return kept
