"""`iv3 trace show` on a file that was written by hand."""

import json
from pathlib import Path

import pytest

from iv3jax.cli import main

STEP = {
    "thought": "near 12",
    "tool": "zoom",
    "numbers": [11.0, 13.0],
    "text": "",
    "observation": "[2 vision tokens]",
}
LAST = {"thought": "it is 42", "tool": "answer", "numbers": [], "text": "42", "observation": None}
COUNTS = {"tokens": {"free": 3}, "logprob": -1.5}


def trace(number: int) -> dict:
    return {
        "prompt": number,
        "rollout": 0,
        "question": "Which number is shown at 12.0 seconds?",
        "steps": [STEP | COUNTS, LAST | COUNTS],
        "answer": "42",
        "overflow": False,
        "tokens": {"prompt": 9, "free": 6},
        "reward": {"total": 1.1, "exact": 1.0},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "20.jsonl"
    path.write_text("".join(json.dumps(trace(number)) + "\n" for number in (7, 8)))
    return path


def test_traces_are_shown(file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["trace", "show", str(file), "--number", "2"]) == 0
    out = capsys.readouterr().out
    for words in (
        "prompt 8",
        "at 12.0 seconds?",
        "thinks  near 12",
        "calls   zoom 11 13",
        "answer: 42",
        "total 1.100",
    ):
        assert words in out
    assert "prompt 7" not in out
    assert main(["trace", "show", str(file)]) == 0
    assert capsys.readouterr().out.count("answer: 42") == 2


def test_what_is_not_there(file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["trace", "show", str(file), "--number", "3"]) == 2
    assert "has traces 1 to 2, no number 3" in capsys.readouterr().err
    assert main(["trace", "show", str(file.parent / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
