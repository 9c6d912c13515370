"""Experiments: filled once, checked field by field, with the nearest name in the error."""

import pytest

from iv3jax.errors import UserError
from iv3jax.train.config import TrainConfig, build, experiment


def test_overrides_reach_nested_fields():
    config = experiment("digits", ["steps=7", "optimizer.learning_rate=0.5", "digits.seconds=[5, 6]"])
    assert (config.steps, config.optimizer.learning_rate, config.digits.seconds) == (7, 0.5, (5.0, 6.0))
    assert experiment("digits:smoke").steps < 10 < experiment("digits").steps


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepss=3", "unknown field 'stepss'; did you mean 'steps'"),
        ("optimizer.clipp=3", "did you mean 'clip'"),
        ("steps=3.5", "3.5 is no int"),
        ("steps=true", "True is no int"),
        ("preset=3", "3 is no str"),
        ("digits=3", "has fields of its own"),
        ("steps.more=3", "steps has no fields"),
        ("steps", "write key=value"),
    ],
)
def test_bad_overrides_are_named(override: str, words: str):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        experiment("digits", [override])


def test_unknown_experiments_and_variants():
    with pytest.raises(UserError, match="no experiment configs/nothing"):
        experiment("nothing")
    with pytest.raises(UserError, match="no variant 'large'"):
        experiment("digits:large")


def test_build_keeps_defaults():
    assert build(TrainConfig, {}, "test") == TrainConfig()
