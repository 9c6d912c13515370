"""Traces: trajectories for people, as JSON and as text. One JSON object a line of a file:

prompt       the prompt's id
rollout      its number in the prompt's group
question     the prompt as text; pictures and frames are `[4 vision tokens]` here and below
steps        a list, in order, of
    thought      what was thought before the call
    tool         the tool's name; null where a full cache cut the step off
    numbers      its numbers: seconds, or tenths of the picture for a crop's region
    text         its text
    observation  what the tool said; null after the last step
    tokens       how many of the step were free, forced and observation
    logprob      the sum over its free tokens
answer       the answer's text, or null
overflow     whether a full cache ended the rollout
tokens       how many were prompt, free, forced and observation
reward       whatever the caller gives: a number, or numbers by name; null without any
"""

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.language import parse
from iv3jax.mcr.trajectories import FORCED, FREE, KIND_NAMES, OBSERVATION, PAD, PROMPT, Record, Trajectories
from iv3jax.paths import PathArgument, make_path

Trace = dict[str, Any]
"""The JSON object above."""

Reward = float | dict[str, float] | None


class _Tokens(NamedTuple):
    """One row of a Record on the host, (T,) each."""

    tokens: np.ndarray
    kinds: np.ndarray
    logprobs: np.ndarray
    visual: np.ndarray
    steps: np.ndarray


def make_trace(
    tokenizer: Tokenizer, trajectories: Trajectories, row: int, ids: np.ndarray, reward: Reward = None
) -> Trace:
    """One trajectory as a trace.

    Args:
        trajectories: on the host or not. row: which of the R.
        ids: (P,) those of the prompts.
        reward: of this trajectory.
    """
    prompt = int(trajectories.prompt[row])
    first = int(np.argmax(np.asarray(trajectories.prompt) == prompt))
    record = _row(trajectories.record, row)
    said = np.isin(record.kinds, (FREE, FORCED, OBSERVATION))
    count = int(record.steps[said].max(initial=-1)) + 1
    tools = np.asarray(trajectories.calls.tools[row])
    steps = [_step(tokenizer, record, record.steps == i, complete=tools[i] >= 0) for i in range(count)]
    answered = bool(trajectories.answered[row])
    return {
        "prompt": int(ids[prompt]),
        "rollout": row - first,
        "question": _text(tokenizer, record, record.kinds == PROMPT),
        "steps": steps,
        "answer": steps[-1]["text"] if answered else None,
        "overflow": bool(trajectories.overflow[row]),
        "tokens": _counts(record, record.kinds != PAD, (PROMPT, FREE, FORCED, OBSERVATION)),
        "reward": reward,
    }


def write_traces(path: PathArgument, traces: Iterable[Trace]) -> None:
    """Writes a file of traces, local or on a store; parent folders are made."""
    file = make_path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(json.dumps(trace, ensure_ascii=False) + "\n" for trace in traces), encoding="utf-8"
    )


def read_traces(path: PathArgument) -> list[Trace]:
    """The traces of a file.

    Raises:
        UserError: there is no such file, or a line is no trace.
    """
    try:
        text = make_path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    # Not splitlines: what is written may hold characters that it takes for ends of lines.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [_check(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def show(trace: Trace) -> str:
    """A trace to be read: several lines, without one at the end."""
    return "\n".join(_lines(trace))


def _lines(trace: Trace) -> Iterator[str]:
    counts = ", ".join(f"{count} {name}" for name, count in trace["tokens"].items())
    yield f"prompt {trace['prompt']}, rollout {trace['rollout']}: {counts} tokens"
    yield from _indented(trace["question"])
    for number, step in enumerate(trace["steps"], 1):
        yield f"step {number}, log-prob {step['logprob']:.2f}"
        if step["thought"]:
            yield from _indented(step["thought"], "  thinks  ")
        if step["tool"] is None:
            yield "  cut off: the cache is full"
            continue
        words = [step["tool"], *(f"{number:g}" for number in step["numbers"]), *filter(None, [step["text"]])]
        yield from _indented(" ".join(words), "  calls   ")
        if step["observation"] is not None:
            yield from _indented(step["observation"], "  sees    ")
    yield "overflow: no answer" if trace["overflow"] else f"answer: {trace['answer']}"
    reward = trace["reward"]
    if isinstance(reward, dict):
        yield "reward: " + ", ".join(f"{name} {value:.3f}" for name, value in reward.items())
    elif reward is not None:
        yield f"reward: {reward:.3f}"


def _indented(text: str, first: str = "  ") -> Iterator[str]:
    for number, line in enumerate(text.split("\n")):
        yield (first if number == 0 else " " * len(first)) + line


def _step(tokenizer: Tokenizer, record: _Tokens, here: np.ndarray, complete: bool) -> Trace:
    """A step; `here` (T,) bool are its tokens."""
    here = here & (record.kinds != PROMPT) & (record.kinds != PAD)
    said = _text(tokenizer, record, here & (record.kinds != OBSERVATION))
    seen = here & (record.kinds == OBSERVATION)
    observation = None
    if seen.any():
        # The frame of the turn is not what the tool said.
        observation = _text(tokenizer, record, seen).removeprefix("\nuser\n").removesuffix("\nassistant\n")
    common = {
        "observation": observation,
        "tokens": _counts(record, here, (FREE, FORCED, OBSERVATION)),
        "logprob": round(float(record.logprobs[here].sum()), 4),
    }
    if not complete:
        return {"thought": said, "tool": None, "numbers": [], "text": "", **common}
    spoken = parse(said)
    return {
        "thought": spoken.thought,
        "tool": spoken.name,
        "numbers": list(spoken.numbers),
        "text": spoken.text,
        **common,
    }


def _row(record: Record, row: int) -> _Tokens:
    return _Tokens(*(np.asarray(getattr(record, name)[row]) for name in _Tokens._fields))


def _counts(record: _Tokens, here: np.ndarray, kinds: Iterable[int]) -> dict[str, int]:
    return {KIND_NAMES[kind]: int(np.sum(here & (record.kinds == kind))) for kind in kinds}


def _text(tokenizer: Tokenizer, record: _Tokens, here: np.ndarray) -> str:
    """The text of some tokens (T,) bool, without special ones; each run of vision tokens as their number."""
    tokens, visual = record.tokens[here], record.visual[here] >= 0
    pieces = []
    edges = [0, *(np.flatnonzero(visual[1:] != visual[:-1]) + 1), len(tokens)]
    for start, end in pairwise(edges):
        if start == end:
            continue
        if visual[start]:
            pieces.append(f"[{end - start} vision tokens]")
        else:
            pieces.append(tokenizer.decode(tokens[start:end].tolist()))
    return "".join(pieces)


_NAMES = {"prompt", "rollout", "question", "steps", "answer", "overflow", "tokens", "reward"}


def _check(line: str, where: str) -> Trace:
    try:
        trace = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(trace, dict) or (missing := _NAMES - trace.keys()):
        lacks = f"; it lacks {', '.join(sorted(missing))}" if isinstance(trace, dict) else ""
        raise UserError(f"{where}: not a trace{lacks}")
    return trace
