"""Which configs a checkpoint goes on with."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from iv3jax.errors import UserError
from iv3jax.train.changes import check_changes
from iv3jax.train.config import TrainConfig, experiment

CONFIG = experiment("rl:tiny")


def recorded(config: TrainConfig) -> dict:
    return json.loads(json.dumps(asdict(config)))


def test_its_own_config_and_ones_that_compute_alike() -> None:
    check_changes(recorded(CONFIG), CONFIG, Path("run"))
    check_changes(recorded(CONFIG), replace(CONFIG, remat="full"), Path("run"))


def test_a_field_that_came_later_had_its_default() -> None:
    old = recorded(CONFIG)
    del old["collect"]["questions"], old["distill"]
    check_changes(old, CONFIG, Path("run"))
    with pytest.raises(UserError, match=r"with distill\.top = 64, not 8"):
        check_changes(old, replace(CONFIG, distill=replace(CONFIG.distill, top=8)), Path("run"))


def test_others_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="with seed = 0, not 3"):
        check_changes(recorded(CONFIG), replace(CONFIG, seed=3), Path("run"))
    with pytest.raises(UserError, match="unknown field 'sed'; did you mean"):
        check_changes(recorded(CONFIG) | {"sed": 1}, CONFIG, Path("run"))
