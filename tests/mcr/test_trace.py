"""Traces: what they say of a trajectory, as JSON and as text."""

from functools import lru_cache
from pathlib import Path

import jax
import loops
import numpy as np
import pytest

from iv3jax.errors import UserError
from iv3jax.mcr.language import TOOLS, Spoken, write
from iv3jax.mcr.prompts import Prompts
from iv3jax.mcr.rewards import make_facts
from iv3jax.mcr.rollout import rollout
from iv3jax.mcr.trace import Trace, make_trace, read_traces, show, write_traces
from iv3jax.mcr.trajectories import FORCED, FREE, OBSERVATION, PROMPT, Trajectories

pytestmark = pytest.mark.medium
KEY = jax.random.key(7)


@lru_cache(maxsize=2)
def some(capacity: int | None = None) -> tuple[Prompts, Trajectories]:
    own = loops.lab()
    prompts = loops.prompts_of(own, first=60)  # they see a dozen frames
    return prompts, jax.device_get(rollout(*own.given(prompts, capacity=capacity), KEY, loops.GROUP)[0])


def trace(row: int, capacity: int | None = None) -> Trace:
    prompts, found = some(capacity)
    return make_trace(loops.lab().tokenizer, found, row, np.asarray(prompts.ids) + 40, {"total": 1.0})


def test_a_trace_says_what_the_trajectory_holds() -> None:
    own = loops.lab()
    _, found = some()
    for row in range(len(found.length)):
        made = trace(row)
        kinds = found.kinds[row]
        assert made["prompt"] == 100 + row // loops.GROUP and made["rollout"] == row % loops.GROUP
        assert made["tokens"] == {
            "prompt": int(np.sum(kinds == PROMPT)),
            "free": int(np.sum(kinds == FREE)),
            "forced": int(np.sum(kinds == FORCED)),
            "observation": int(np.sum(kinds == OBSERVATION)),
        }
        for number, step in enumerate(made["steps"]):
            call = jax.tree.map(lambda x, n=number, r=row: x[r, n], found.calls)
            assert TOOLS.index(step["tool"]) == call.tools
            text = own.tokenizer.decode(call.text[: call.length].tolist())
            assert text == (f" {step['text']}" if step["text"] else "")
            if step["tool"] in ("zoom", "crop"):
                assert round(10 * step["numbers"][0]) == call.numbers[0]
            said = write(Spoken(step["tool"], tuple(step["numbers"]), step["text"], step["thought"]))
            spoken = np.isin(kinds, (FREE, FORCED)) & (found.record.steps[row] == number)
            assert said == own.tokenizer.decode(found.tokens[row][spoken].tolist())
        assert made["steps"][-1]["tool"] == "answer" and made["answer"] == made["steps"][-1]["text"]
        assert made["steps"][-1]["observation"] is None and not made["overflow"]
        total = sum(step["logprob"] for step in made["steps"])
        assert total == pytest.approx(float(found.record.logprobs[row].sum()), abs=1e-2)


def test_a_step_that_was_cut_off_has_no_tool() -> None:
    _, found = some(160)
    row = int(np.argmax(found.overflow))
    made = trace(row, 160)
    assert made["overflow"] and made["answer"] is None
    assert show(made).splitlines()[-2] == "overflow: no answer"
    cut = [step["tool"] is None for step in made["steps"]]
    assert not any(cut[:-1])


def test_frames_and_the_question_can_be_read() -> None:
    _, found = some()
    shown = [
        step["observation"]
        for row in range(len(found.length))
        for step in trace(row)["steps"]
        if step["tool"] == "zoom" and "[" in step["observation"]
    ]
    assert shown and all(" seconds>[2 vision tokens]" in text and text.startswith("<") for text in shown)
    question = trace(0)["question"]
    assert question.startswith("user\n<0.2 seconds>[2 vision tokens]<")
    assert question.endswith("[2 vision tokens]when?\nassistant\n")


def test_files_are_read_back(tmp_path: Path) -> None:
    traces = [trace(row) for row in range(3)]
    traces[0]["question"] = "one\u2028two\x85three\r"
    path = tmp_path / "new" / "traces.jsonl"
    write_traces(path, traces)
    assert read_traces(path) == traces
    with pytest.raises(UserError, match="no such file"):
        read_traces(tmp_path / "other.jsonl")
    for line, message in (
        ("{", "line 1: not a line of JSON"),
        ('{"prompt": 1}', "line 1: not a trace; it lacks"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=message):
            read_traces(path)


def test_show() -> None:
    step = {"tokens": {}, "logprob": -1.5}
    zoom = {
        "thought": "look",
        "tool": "zoom",
        "numbers": [12.0, 20.5],
        "text": "",
        "observation": "<12.0\nhere",
    }
    answer = {"thought": "", "tool": "answer", "numbers": [], "text": "a dog", "observation": None}
    made = {
        "prompt": 3,
        "rollout": 1,
        "question": "what is it?",
        "steps": [{**zoom, **step}, {**answer, **step}],
        "answer": "a dog",
        "overflow": False,
        "tokens": {"prompt": 9, "free": 5},
        "reward": {"total": 1.0, "format": 0.5},
    }
    assert show(made).splitlines() == [
        "prompt 3, rollout 1: 9 prompt, 5 free tokens",
        "  what is it?",
        "step 1, log-prob -1.50",
        "  thinks  look",
        "  calls   zoom 12 20.5",
        "  sees    <12.0",
        "          here",
        "step 2, log-prob -1.50",
        "  calls   answer a dog",
        "answer: a dog",
        "reward: total 1.000, format 0.500",
    ]
    assert show({**made, "reward": 0.25}).endswith("reward: 0.250")
    assert "reward" not in show({**made, "reward": None})


def test_facts_are_those_of_the_trajectory() -> None:
    own = loops.lab()
    prompts, found = some()
    times = np.asarray(prompts.world.times)
    seen = 0
    for row in range(len(found.length)):
        facts, made = make_facts(own.tokenizer, found, row, times, 2), trace(row)
        assert facts.answer == made["answer"] and facts.steps == len(made["steps"])
        shown = found.record.visual[row][found.kinds[row] == OBSERVATION]
        moments = {times[row // loops.GROUP, i // 2] / 10 for i in shown[shown >= 0]}
        assert set(facts.seen) == {(t, t) for t in moments}
        seen += len(moments)
    assert seen > 4
    _, cut = some(160)
    assert make_facts(own.tokenizer, cut, int(np.argmax(cut.overflow)), times, 2).answer is None
