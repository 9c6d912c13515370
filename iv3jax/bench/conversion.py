"""`iv3 bench conversion`: what conversions to M²LA cost, ours beside the published ones.

Two tables: real weights on real text (conversion_text.py), and a tiny model with q/k norm on its own task in
videos (conversion_video.py). Figures are kept as they are found; the same command goes on where it stopped.
"""

from pathlib import Path
from typing import Any

from iv3jax.bench import conversion_text, conversion_video
from iv3jax.errors import UserError

FOLDER = Path("runs/bench_conversion")
PARTS = ("text", "video")


def bench_conversion(
    part: str | None = None, model: str | None = None, videos: int = 100, seed: int = 1, folder: Path = FOLDER
) -> dict[str, Any]:
    """One part's result under its name, or both's.

    Args:
        part: one of PARTS, or None.
        model: of "video", the source's folder; None trains one.
        videos, seed: of "video", see there.
        folder: where figures and models are kept.

    Raises:
        UserError: no such part, or what a part cannot have or make.
    """
    if part not in (None, *PARTS):
        raise UserError(f"--part {part}: there are {', '.join(PARTS)}")
    found = {}
    if part != "video":
        found["text"] = conversion_text.bench_text(folder)
    if part != "text":
        found["video"] = conversion_video.bench_video(folder, model, videos, seed)
    return found


def format_table(result: dict[str, Any]) -> str:
    """The parts' tables for people."""
    modules = {"text": conversion_text, "video": conversion_video}
    return "\n".join(modules[part].format_table(found) for part, found in result.items())
