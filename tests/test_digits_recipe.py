"""The digits' experiment, from nothing: it reaches its goals and answers about a new file.

The commands are run in processes of their own, because tests have eight fake devices.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from iv3jax.data.digits import interval_iou


def run(*argv: str | Path) -> str:
    """Standard output of a command with one device, which must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, argv)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_digits_experiment_reaches_its_goals(tmp_path: Path):
    model = tmp_path / "model"
    run("iv3jax.cli", "train", "--config", "digits", "--out", tmp_path)
    bench = json.loads(run("iv3jax.cli", "bench", "digits", "--model", model, "--samples", "300", "--json"))
    rows = {row["name"]: row for row in bench["rows"]}
    print(json.dumps(rows, indent=2))
    reading, finding = rows["read the number"], rows["when, one number"]
    assert reading["score"] >= 0.80 and finding["score"] >= 0.70
    # Without the digits' pixels there is nothing to read, and no better guess than the best fixed interval.
    assert reading["control"] <= 0.05 and finding["control"] <= finding["blind"] + 0.02
    # Real files, written and read back, are no worse than the noise of 30 of them.
    assert rows["read the number, mp4 file"]["score"] >= 0.65
    assert rows["when, one number, mp4 file"]["score"] >= 0.60

    video = tmp_path / "video.mp4"
    number, start, end = re.findall(r"[\d.]+", run("iv3jax.data.digits", video))
    question = f"When is the number {number} shown?"
    answer = json.loads(run("iv3jax.cli", "ask", video, question, "--model", model, "--json"))
    times = [float(word) for word in re.findall(r"\d+\.\d", answer["text"])]
    assert len(times) == 2
    assert interval_iou((times[0], times[1]), (float(start), float(end))) > 0.5
