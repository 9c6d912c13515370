"""Distillation as a whole run, tiny: from each kind of teacher, gone on with exactly, refused early."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copy

import jax
import numpy as np
import pytest
from test_rl_run import SMALL as RL
from test_rl_run import lines, one_device  # noqa: F401 — a fixture

from iv3jax.checkpoint.load import load
from iv3jax.checkpoint.save import save
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.errors import UserError
from iv3jax.mcr.trace import read_traces
from iv3jax.train.choices import Choice, read_questions, write_choices
from iv3jax.train.choose import choose
from iv3jax.train.collect_config import CollectConfig, TracesConfig
from iv3jax.train.config import CheckpointConfig, experiment
from iv3jax.train.distill import DistillConfig
from iv3jax.train.run import run

SMALL = replace(
    RL,
    stage="distill",
    collect=CollectConfig(prompts=4, group=1, attempts=1, frames=2),
    distill=DistillConfig(frames=4, room=80),
    traces=TracesConfig(),
    checkpoint=CheckpointConfig(every=1, keep=4),
)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A model with grouped keys and the same tokenizer; its answers are random, and its own."""
    folder = save(load("tiny_gqa", random_weights=True), tmp_path / "teacher")
    copy(TINY_FOLDER / "tokenizer.json", folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exact", "top_k", "sampled"])
def test_a_run_comes_nearer_to_its_teacher(kind: str, teacher: str, tmp_path: Path):
    config = replace(
        SMALL,
        steps=12,
        optimizer=replace(SMALL.optimizer, learning_rate=3e-3),
        checkpoint=CheckpointConfig(),
        distill=DistillConfig(kind, teacher, top=32),
    )
    run(config, tmp_path / "run")
    found = lines(tmp_path / "run")
    losses = [line["loss"] for line in found]
    assert np.isfinite(losses).all() and found[0]["entropy"] > 0
    assert found[0]["answered"] == 1 and "reward" in found[0]
    if kind != "sampled":
        # Another teacher's distribution is approached; a single token's advantage is too noisy to show it.
        assert losses[0] > 0 and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


@pytest.mark.slow
def test_fine_tuning_on_the_words_of_a_teacher(tmp_path: Path):
    """One that was trained, so that its words can be learned: what is read is its own, not the student's."""
    teacher = Path(__file__).parents[2] / "launch/models/teacher"
    config = replace(
        SMALL,
        steps=12,
        optimizer=replace(SMALL.optimizer, learning_rate=3e-3),
        checkpoint=CheckpointConfig(),
        distill=DistillConfig("sequence", str(teacher)),
        traces=TracesConfig(every=12),
    )
    run(config, tmp_path / "run")
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    answers = [trace["answer"] for trace in read_traces(tmp_path / "run/traces/12.jsonl")]
    # Numbers, as the teacher was taught; the student, of random weights, says anything.
    assert sum(answer.isdigit() for answer in answers) >= len(answers) / 2


@pytest.mark.slow
def test_it_goes_on_exactly_and_the_teacher_stays(tmp_path: Path):
    """The teacher is the model as the run began, also after it went on."""
    whole = run(SMALL, tmp_path / "whole")
    found = lines(tmp_path / "whole")
    assert found[0]["loss"] > 0
    first = run(replace(SMALL, steps=2), tmp_path / "first")
    assert first.exists()
    for name in ("checkpoints",):
        assert {path.name for path in (tmp_path / "first" / name).iterdir()} == {"1", "2"}
    kept = tmp_path / "again"
    (tmp_path / "whole" / "checkpoints").rename(tmp_path / "kept")
    for step in ("3", "4"):
        for path in sorted((tmp_path / "kept" / step).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "kept" / step).rmdir()
    kept.mkdir()
    (tmp_path / "kept").rename(kept / "checkpoints")
    again = run(SMALL, kept)
    theirs = [line["loss"] for line in lines(kept)]
    assert theirs == [line["loss"] for line in found][2:]
    jax.tree.map(np.testing.assert_array_equal, load(whole).params, load(again).params)


@pytest.mark.slow
def test_questions_are_chosen_and_then_asked_alone(teacher: str, tmp_path: Path):
    config = replace(SMALL, distill=DistillConfig(teacher=teacher))
    for stage in (config, replace(RL, collect=replace(RL.collect, prompts=2))):
        found = list(choose(stage, 4, answers=2))
        assert len(found) == 4 and [one.number for one in found] == [0, 1, 2, 3]
        assert all(len(one.scores) == 2 for one in found)
        assert all(len(one.teacher) == (2 if stage is config else 0) for one in found)
    kept = [replace(one, kept=one.number in (1, 3)) for one in found]
    write_choices(tmp_path / "questions.jsonl", kept)
    asked = replace(RL, collect=replace(RL.collect, questions=str(tmp_path / "questions.jsonl"), attempts=1))
    run(replace(asked, steps=2), tmp_path / "run")
    names = {
        json.loads(line)["prompt"] for line in (tmp_path / "run/traces/2.jsonl").read_text().splitlines()
    }
    assert names <= {0, 1, 2, 3}
    with pytest.raises(UserError, match="has been chosen already"):
        next(choose(asked, 4))
    with pytest.raises(UserError, match="make it 2 or more"):
        next(choose(RL, 4, answers=1))
    other = replace(asked, seed=5)
    with pytest.raises(UserError, match="choose anew"):
        run(other, tmp_path / "other")


def test_files_of_questions(tmp_path: Path):
    path = tmp_path / "new" / "questions.jsonl"
    write_choices(path, [Choice(i, f"read:{i}", (0.0, 1.0), (), i % 2 == 1) for i in range(4)])
    assert [one.number for one in read_questions(path)] == [1, 3]
    with pytest.raises(UserError, match="iv3 data choose writes one"):
        read_questions(tmp_path / "none.jsonl")
    for text, words in (
        ("{", "line 1: not a line"),
        ('{"number": 1}\n', "line 1: not a line"),
        ('{"number": 1, "name": "a", "kept": false}\n', "keeps no question"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_questions(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.kind=exakt", "did you mean 'exact'"),
        ("distill.frames=2", "let it see more than the student with distill.frames above 2"),
        ("collect.attempts=2", "learns from every rollout"),
        ("distill.top=0", "top 0 must be 1 or more"),
        ("distill.teachr=x", "did you mean 'teacher'"),
        ("rollout.budget=320", "there is no room for the prompt"),
    ],
)
def test_what_cannot_work_is_refused_at_the_door(override: str, words: str):
    with pytest.raises(UserError, match=words):
        experiment("opd:tiny", [override])


@pytest.mark.medium
def test_a_teacher_with_another_vocabulary_is_refused_before_compiling(teacher: str, tmp_path: Path):
    path = Path(teacher) / "tokenizer.json"
    text = json.loads(path.read_text())
    vocabulary = text["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(text))
    with pytest.raises(UserError, match="another vocabulary than the student"):
        run(replace(SMALL, distill=DistillConfig(teacher=teacher)), tmp_path / "run")
    with pytest.raises(UserError, match="nowhere"):
        run(replace(SMALL, distill=DistillConfig(teacher="runs/nowhere")), tmp_path / "run")
