"""`python -m iv3jax.data.tasks NAME OUT.mp4 [key=value …]`: an episode as a file, with its questions."""

import sys
from pathlib import Path

import numpy as np

from iv3jax.data.digits import write_video
from iv3jax.data.tasks import TASKS
from iv3jax.errors import UserError


def main(arguments: list[str]) -> None:
    """Writes test sample 0 of the options' seed at the clip's own size and rate.

    Raises:
        UserError: arguments that make no sense; or a video over 100 seconds: its files show two digits only.
    """
    if len(arguments) < 2 or arguments[0] not in TASKS:
        raise UserError(
            f"usage: python -m iv3jax.data.tasks NAME OUT.mp4 [key=value …]; NAME: {', '.join(TASKS)}"
        )
    name, out, *options = arguments
    case = TASKS[name](("split=test", *options)).case(0)
    episode = case.episode
    if episode.duration > 100:
        raise UserError(
            f"{name}.seconds: files of at most 100 seconds can be written, not {episode.duration:g}"
        )
    rng = np.random.default_rng(episode.look)
    write_video(Path(out), rng, episode.split, episode.duration, episode.events)
    for question in case.questions:
        print(question.text, question.answer)
    for event in episode.events:
        print(f"  {event.number:02} from {event.start} to {event.end} seconds")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
